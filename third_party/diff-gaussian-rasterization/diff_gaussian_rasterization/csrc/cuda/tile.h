// SPDX-License-Identifier: Apache-2.0
// What the passes over the tiles share: where pixels are, and the splats of a tile in shared memory.
//
// Where a tile's memory begins follows from its first instance alone, so nothing is counted or listed for it. With b instances before tile
// number t and n in it, it has ceil(n / 256) segments: numbers b / 256 + t and following; and between them ceil(n / 256) - 1 states: numbers
// b / 256 and following (divisions round down). Those of different tiles never meet, since (b + n) / 256 >= b / 256 + ceil(n / 256) - 1.
#pragma once

#include "ellipse.h"

namespace s2d {

struct TilePosition {
  int view, left, top;  // pixels

  __device__ __forceinline__ TilePosition(int tile, int tiles_x, int tiles_y) {
    view = tile / (tiles_x * tiles_y);
    const int in_view = tile - view * tiles_x * tiles_y;
    left = in_view % tiles_x * TILE;
    top = in_view / tiles_x * TILE;
  }
  __device__ __forceinline__ int64 pixel(int column, int row, int width, int height) const {
    return (static_cast<int64>(view) * height + top + row) * width + left + column;
  }
};

// The corner of a block of 8 x 4 pixels in its tile, by its bit in a mask.
__device__ __forceinline__ int block_column(int block) { return block % 2 * BLOCK_W; }
__device__ __forceinline__ int block_row(int block) { return block / 2 * BLOCK_H; }

// Splats relative to a tile: u = s1 x + s2 y + u0, v = s3 y + v0 for the position (x, y) from its corner. Not from that of the image: the
// terms stay small, so nothing is lost when they cancel.
template <int COUNT>
struct StagedSplats {
  float4 place[COUNT];  // u0, v0, s1, s2
  float4 rest[COUNT];   // s3, log2_opacity, r, g
  float2 last[COUNT];   // b, aux
  unsigned char mask[COUNT];  // the blocks that each touches; 0 behind the last

  // One splat per thread: number i of `count` instances. Returns its index.
  __device__ __forceinline__ int load(int i, int count, const float* __restrict__ splats, const int* __restrict__ instances,
                                      const TilePosition& tile) {
    mask[i] = 0;
    if (i >= count) return -1;
    const int index = instances[i];
    const Splat s = load_splat(splats, index);
    const float dx = tile.left - s.x, dy = tile.top - s.y;
    place[i] = make_float4(__fmaf_rn(s.s1, dx, s.s2 * dy), s.s3 * dy, s.s1, s.s2);
    rest[i] = make_float4(s.s3, s.log2_opacity, s.r, s.g);
    last[i] = make_float2(s.b, s.aux);
    mask[i] = static_cast<unsigned char>(block_mask(make_ellipse<false>(-dx, -dy, s.s1, s.s2, s.s3, s.log2_opacity)));
    return index;
  }
};

}  // namespace s2d
