// SPDX-License-Identifier: Apache-2.0
// Which tiles, and which blocks of them, hold a pixel centre inside the ellipse alpha = ALPHA_MIN of a Gaussian.
//
// The part of an ellipse between two horizontal lines is convex, so it spans an interval in x, and a block between the lines is touched
// exactly where its own interval meets that one. The ends are closed forms: right of the centre line the boundary bulges up to the
// rightmost point of the ellipse and recedes after it, so its maximum between the lines is where the height of that point is clamped
// to the lines; the left end is the mirror image. So a vector of block rows costs two square roots, whatever the width.
#pragma once

#include "frame.h"

namespace s2d {

// What the tile test reads of up to COUNT Gaussians.
template <int COUNT>
struct EllipseBatch {
  alignas(64) float x[COUNT], y[COUNT];
  alignas(64) float skew[COUNT], inv_s1[COUNT], s3[COUNT];  // u = 0 on x = skew * y
  alignas(64) float level[COUNT];    // u^2 + v^2 on the ellipse
  alignas(64) float right_y[COUNT];  // height of its rightmost point above the centre
  alignas(64) int32_t x0[COUNT], x1[COUNT], y0[COUNT], y1[COUNT];  // tiles under its bounding box, half-open
};

template <int COUNT>
S2D_INLINE void store_ellipses(EllipseBatch<COUNT>& out, int at, F x, F y, F s1, F s2, F s3, F log2_opacity) {
  const F level = log2_opacity + F(CULL_SLACK - LOG2_ALPHA_MIN);
  const F inv_s1 = F(1.0f) / s1, skew = F(0.0f) - s2 * inv_s1;
  store(out.x + at, x), store(out.y + at, y);
  store(out.skew + at, skew), store(out.inv_s1 + at, inv_s1), store(out.s3 + at, s3);
  store(out.level + at, level);
  store(out.right_y + at, F(0.0f) - s2 * sqrt_of(level / (s2 * s2 + s3 * s3)) / s3);
}

S2D_INLINE I to_tile(F pixel, int tile, int limit) {
  return {__builtin_convertvector(clamp_to(pixel * F(1.0f / static_cast<float>(tile)), 0.0f, static_cast<float>(limit)).v, NativeI)};
}

// Tiles under the axis-aligned bounds, half a pixel shrunk: only pixel centres count. Returns how many for each lane.
template <int COUNT>
S2D_INLINE I store_tile_ranges(EllipseBatch<COUNT>& out, int at, int tiles_x, int tiles_y, F x, F y, F half_x, F half_y) {
  const F slack(0.49f);
  const I x0 = to_tile(x - half_x, TILE_W, tiles_x), y0 = to_tile(y - half_y, TILE_H, tiles_y);
  const NativeI x_end = to_tile(x + half_x - slack, TILE_W, tiles_x - 1).v + 1;
  const NativeI y_end = to_tile(y + half_y - slack, TILE_H, tiles_y - 1).v + 1;
  const I x1 = select(x0 < I{x_end}, I{x_end}, x0), y1 = select(y0 < I{y_end}, I{y_end}, y0);
  store(out.x0 + at, x0), store(out.x1 + at, x1), store(out.y0 + at, y0), store(out.y1 + at, y1);
  return {(x1.v - x0.v) * (y1.v - y0.v)};
}

typedef int32_t TileRows __attribute__((vector_size(4 * TILE_ROWS)));

S2D_INLINE uint32_t any_bit(TileRows rows) {
  uint64_t pairs[TILE_ROWS / 2], all = 0;
  std::memcpy(pairs, &rows, sizeof pairs);
  for (uint64_t pair : pairs) all |= pair;
  return static_cast<uint32_t>(all | all >> 32);
}

// Write the tiles and masks of Gaussian g of a batch, row by row; return how many.
template <int COUNT>
S2D_INLINE uint32_t list_tiles(const EllipseBatch<COUNT>& batch, int g, int tiles_x, SlotTile* out) {
  // Rounding moves the interval by less than this, pixels, while it is shorter than 10,000.
  constexpr float margin = 1.0f / 1024.0f;
  constexpr float columns_per_pixel = 1.0f / BLOCK_W;
  alignas(64) float lane_top[LANES];
  for (int l = 0; l < LANES; ++l) lane_top[l] = static_cast<float>(l * BLOCK_H) + 0.5f;
  TileRows shifts;
  for (int r = 0; r < TILE_ROWS; ++r) shifts[r] = r * TILE_COLUMNS;

  const int x0 = batch.x0[g], x1 = batch.x1[g], y0 = batch.y0[g], y1 = batch.y1[g];
  const F skew(batch.skew[g]), inv_s1(batch.inv_s1[g]), s3(batch.s3[g]), level(batch.level[g]), right_y(batch.right_y[g]);
  const F left_y = F(0.0f) - right_y, zero(0.0f);
  const float x = batch.x[g] - static_cast<float>(x0 * TILE_W);
  const F first_offset((x - (BLOCK_W - 0.5f) - margin) * columns_per_pixel + 1.0f);  // + 1: rounds up, by truncation
  const F end_offset((x - 0.5f + margin) * columns_per_pixel + 1.0f);
  const F limit(static_cast<float>((x1 - x0) * TILE_COLUMNS));
  // Half the width of the ellipse at height y, times s1.
  const auto reach = [&](F y) {
    const F v = s3 * y;
    return sqrt_of(max_of(fnma(v, v, level), zero));
  };
  SlotTile* next = out;
  for (int top = y0; top < y1; top += LANES / TILE_ROWS) {
    const F low = load(lane_top) + F(static_cast<float>(top * TILE_H) - batch.y[g]), high = low + F(BLOCK_H - 1.0f);
    const F nearest = s3 * clamp_to(zero, low, high);
    const Mask inside = nearest * nearest <= level;
    const F at_right = clamp_to(right_y, low, high), at_left = clamp_to(left_y, low, high);
    const F right = fma(skew, at_right, reach(at_right) * inv_s1), left = fma(skew, at_left, F(0.0f) - reach(at_left) * inv_s1);
    const F first = clamp_to(fma(left, F(columns_per_pixel), first_offset), zero, limit);
    const F end = clamp_to(fma(right, F(columns_per_pixel), end_offset), first, limit);
    alignas(64) int32_t firsts[LANES], ends[LANES];
    store(firsts, I{__builtin_convertvector(zero_unless(inside, first).v, NativeI)});
    store(ends, I{__builtin_convertvector(zero_unless(inside, end).v, NativeI)});
    for (int ty = top; ty < y1 && ty < top + LANES / TILE_ROWS; ++ty) {
      TileRows from, to;
      std::memcpy(&from, firsts + (ty - top) * TILE_ROWS, sizeof from);
      std::memcpy(&to, ends + (ty - top) * TILE_ROWS, sizeof to);
      for (int tx = x0; tx < x1; ++tx) {
        const auto bound = [](TileRows column) {
          column = column < 0 ? TileRows{} : column;
          return column > TILE_COLUMNS ? TileRows{} + TILE_COLUMNS : column;
        };
        const TileRows one = TileRows{} + 1;
        const uint32_t mask = any_bit(((one << bound(to)) - (one << bound(from))) << shifts);
        // Branch-free compaction: the next tile overwrites an empty one.
        *next = {static_cast<uint32_t>(ty * tiles_x + tx), mask};
        next += mask != 0;
        from -= TILE_COLUMNS, to -= TILE_COLUMNS;
      }
    }
  }
  return static_cast<uint32_t>(next - out);
}

}  // namespace s2d
