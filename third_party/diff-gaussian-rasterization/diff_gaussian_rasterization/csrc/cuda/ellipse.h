// SPDX-License-Identifier: Apache-2.0
// Which tiles, and which blocks of a tile, hold a pixel centre inside the ellipse alpha = ALPHA_MIN of a splat. As in csrc/cpu/tile_masks.h:
// the part of an ellipse between two horizontal lines spans an interval in x whose ends are closed forms, and what lies between the
// lines is touched exactly where its own interval meets that one.
//
// Counting the tiles and listing them are two kernels that must agree to the last bit, whatever the compiler makes of each: hence
// operations that it may not contract.
#pragma once

#include "device.h"

namespace s2d {

// Rounding moves the interval by less than this, pixels, while it is shorter than 10,000.
constexpr float TILE_MARGIN = 1.0f / 1024.0f;

struct Ellipse {
  float x, y;               // centre
  float skew, inv_s1, s3;   // u = 0 on x = skew * y
  float level;              // u^2 + v^2 on the ellipse
  float right_y;            // height of its rightmost point above the centre
};

struct Interval {
  float left, right;  // from the centre
  bool inside;        // else there is none
};

template <bool EXACT>
__device__ __forceinline__ float root(float a) {
  return EXACT ? __fsqrt_rn(a) : fast_sqrt(a);
}
template <bool EXACT>
__device__ __forceinline__ float quotient(float a, float b) {
  return EXACT ? __fdiv_rn(a, b) : a * fast_reciprocal(b);
}

template <bool EXACT>
__device__ __forceinline__ Ellipse make_ellipse(float x, float y, float s1, float s2, float s3, float log2_opacity) {
  Ellipse e;
  e.x = x, e.y = y, e.s3 = s3;
  e.level = __fadd_rn(log2_opacity, CULL_SLACK - LOG2_ALPHA_MIN);
  e.inv_s1 = quotient<EXACT>(1.0f, s1);
  e.skew = -__fmul_rn(s2, e.inv_s1);
  const float steepness2 = __fmaf_rn(s2, s2, __fmul_rn(s3, s3));
  e.right_y = -quotient<EXACT>(__fmul_rn(s2, root<EXACT>(quotient<EXACT>(e.level, steepness2))), s3);
  return e;
}

// Half the width of the ellipse at height y.
template <bool EXACT>
__device__ __forceinline__ float reach(const Ellipse& e, float y) {
  const float v = __fmul_rn(e.s3, y);
  return __fmul_rn(root<EXACT>(fmaxf(__fmaf_rn(-v, v, e.level), 0.0f)), e.inv_s1);
}

// What the ellipse spans between two heights, from its centre.
template <bool EXACT>
__device__ __forceinline__ Interval interval_between(const Ellipse& e, float low, float high) {
  const float nearest = __fmul_rn(e.s3, clamp_to(0.0f, low, high));
  const float at_right = clamp_to(e.right_y, low, high), at_left = clamp_to(-e.right_y, low, high);
  Interval out;
  out.right = __fmaf_rn(e.skew, at_right, reach<EXACT>(e, at_right));
  out.left = __fmaf_rn(e.skew, at_left, -reach<EXACT>(e, at_left));
  out.inside = __fmul_rn(nearest, nearest) <= e.level;
  return out;
}

// Rows of tiles that the ellipse may touch: [begin, end).
struct TileRows {
  int begin, end;
};

__device__ __forceinline__ TileRows tile_rows(const Ellipse& e, int tiles_y) {
  const float half_y = __fdiv_rn(__fsqrt_rn(e.level), e.s3), per_tile = 1.0f / TILE;
  const float first = __fmul_rn(__fadd_rn(e.y, -half_y), per_tile), last = __fmul_rn(__fadd_rn(e.y, half_y), per_tile);
  TileRows out;
  out.begin = static_cast<int>(clamp_to(first, 0.0f, static_cast<float>(tiles_y)));
  out.end = static_cast<int>(clamp_to(__fadd_rn(last, 1.0f), 0.0f, static_cast<float>(tiles_y)));
  return out;
}

// Columns of tiles in a row that the ellipse touches: [begin, end).
struct TileColumns {
  int begin, end;
};

__device__ __forceinline__ TileColumns tile_columns(const Ellipse& e, int row, int tiles_x) {
  constexpr float per_tile = 1.0f / TILE;
  const float low = __fadd_rn(static_cast<float>(row * TILE) + 0.5f, -e.y), high = __fadd_rn(low, TILE - 1.0f);
  const Interval span = interval_between<true>(e, low, high);
  const float limit = static_cast<float>(tiles_x);
  // + 1 rounds up, by truncation: the first tile whose last pixel centre, TILE - 0.5, is not left of the interval, and the one behind the
  // last whose first, 0.5, is not right of it.
  const float first_offset = __fmaf_rn(e.x, per_tile, 1.0f - (TILE - 0.5f + TILE_MARGIN) * per_tile);
  const float end_offset = __fmaf_rn(e.x, per_tile, 1.0f - (0.5f - TILE_MARGIN) * per_tile);
  const float first = clamp_to(__fmaf_rn(span.left, per_tile, first_offset), 0.0f, limit);
  const float end = clamp_to(__fmaf_rn(span.right, per_tile, end_offset), first, limit);
  TileColumns out;
  out.begin = static_cast<int>(first);
  out.end = span.inside ? static_cast<int>(end) : out.begin;
  return out;
}

// Bit 2 * row + column: which blocks of a tile the ellipse touches; its centre is given from the tile's corner.
__device__ __forceinline__ unsigned block_mask(const Ellipse& e) {
  unsigned mask = 0;
#pragma unroll
  for (int row = 0; row < TILE / BLOCK_H; ++row) {
    const float low = static_cast<float>(row * BLOCK_H) + 0.5f - e.y;
    const Interval span = interval_between<false>(e, low, low + (BLOCK_H - 1));
    const float left = e.x + span.left - TILE_MARGIN, right = e.x + span.right + TILE_MARGIN;
#pragma unroll
    for (int column = 0; column < TILE / BLOCK_W; ++column) {
      const bool touched = span.inside && left <= (column + 1) * BLOCK_W - 0.5f && right >= column * BLOCK_W + 0.5f;
      mask |= static_cast<unsigned>(touched) << (2 * row + column);
    }
  }
  return mask;
}

}  // namespace s2d
