// SPDX-License-Identifier: Apache-2.0
// What the forward and backward tile loops share: where pixels are, and the one evaluation of a Gaussian at a block of pixels.
#pragma once

#include <cstddef>
#include <cstring>

#include "frame.h"

namespace s2d {

struct TilePosition {
  int left, top;    // pixels
  uint32_t blocks;  // that hold a pixel of the image

  TilePosition(const Frame& frame, int64_t tile) {
    left = static_cast<int>(tile % frame.tiles_x) * TILE_W;
    top = static_cast<int>(tile / frame.tiles_x) * TILE_H;
    blocks = 0;
    for (int b = 0; b < TILE_BLOCKS; ++b) {
      const bool inside = left + b % TILE_COLUMNS * BLOCK_W < frame.camera.width && top + b / TILE_COLUMNS * BLOCK_H < frame.camera.height;
      blocks |= static_cast<uint32_t>(inside) << b;
    }
  }
};

// Pixel centres of the columns and rows of blocks, from the tile's corner.
struct PixelCenters {
  F x[TILE_COLUMNS], y[TILE_ROWS];

  PixelCenters() {
    for (int l = 0; l < LANES; ++l) {
      for (int k = 0; k < TILE_COLUMNS; ++k) x[k].v[l] = static_cast<float>(k * BLOCK_W + l % BLOCK_W) + 0.5f;
      for (int k = 0; k < TILE_ROWS; ++k) y[k].v[l] = static_cast<float>(k * BLOCK_H + l / BLOCK_W) + 0.5f;
    }
  }
};

// The whitened coordinates as affine functions of the position in a tile: u = s1 x + s2 y + u0, v = s3 y + v0. From the tile's corner,
// not from that of the image: the terms stay small, so nothing is lost when they cancel.
struct TileEllipse {
  float u0, v0;

  TileEllipse() = default;
  TileEllipse(const Splat& s, const TilePosition& tile) {
    const float x = static_cast<float>(tile.left) - s.x, y = static_cast<float>(tile.top) - s.y;
    u0 = s.s1 * x + s.s2 * y;
    v0 = s.s3 * y;
  }
};

// An instance as the loops over a tile's blocks read it: its Splat, copied as a whole, with what depends on the tile in the place of what
// is no longer asked for.
struct alignas(64) TileSplat {
  float u0, v0;  // Splat: x, y
  float s1, s2, s3, log2_opacity, rgb[3], aux;
  int32_t index;  // in the tile's list. Splat: padding
  float rest[5];

  // In place: a temporary of single fields that is then read as a whole would wait for each of their stores.
  S2D_INLINE void set(const Splat& s, const TilePosition& tile, int32_t index_) {
    std::memcpy(static_cast<void*>(this), &s, sizeof *this);
    const TileEllipse ellipse(s, tile);
    u0 = ellipse.u0, v0 = ellipse.v0;
    index = index_;
  }

  S2D_INLINE void whiten(F x, F y, F& u, F& v) const {
    u = fma(F(s1), x, fma(F(s2), y, F(u0)));
    v = fma(F(s3), y, F(v0));
  }
};
static_assert(sizeof(TileSplat) == sizeof(Splat) && offsetof(TileSplat, s1) == offsetof(Splat, s1), "a copy of a Splat");
static_assert(offsetof(TileSplat, log2_opacity) == offsetof(Splat, log2_opacity) && offsetof(TileSplat, rgb) == offsetof(Splat, rgb) &&
                  offsetof(TileSplat, aux) == offsetof(Splat, aux) && offsetof(TileSplat, index) == offsetof(Splat, padding),
              "a copy of a Splat");

// Visit the pixels of a tile that are in the image, in runs along a row: fn(index of the first pixel in the image, its index in block
// order, length). Most runs are BLOCK_W long, which the caller can unroll.
template <class Fn>
S2D_INLINE void for_each_run(const Camera& camera, const TilePosition& tile, const Fn& fn) {
  for (int b = 0; b < TILE_BLOCKS; ++b) {
    const int left = tile.left + b % TILE_COLUMNS * BLOCK_W, top = tile.top + b / TILE_COLUMNS * BLOCK_H;
    const int columns = camera.width - left < BLOCK_W ? camera.width - left : BLOCK_W;
    const int rows = camera.height - top < BLOCK_H ? camera.height - top : BLOCK_H;
    if (columns <= 0) continue;
    for (int row = 0; row < rows; ++row) {
      fn(static_cast<int64_t>(top + row) * camera.width + left, b * LANES + row * BLOCK_W, columns);
    }
  }
}

}  // namespace s2d
