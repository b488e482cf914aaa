// What the forward and backward tile loops share: where pixels are, and the one evaluation of a Gaussian at a block of pixels.
#pragma once

#include "frame.h"

namespace s2d {

struct TilePosition {
  int left, top;
  uint32_t blocks;  // that hold a pixel of the image

  TilePosition(const Frame& frame, int64_t tile) {
    left = static_cast<int>(tile % frame.tiles_x) * TILE_W;
    top = static_cast<int>(tile / frame.tiles_x) * TILE_H;
    blocks = 0;
    for (int b = 0; b < TILE_BLOCKS; ++b) {
      const bool inside = left + b % 4 * BLOCK_W < frame.camera.width && top + b / 4 * BLOCK_H < frame.camera.height;
      blocks |= static_cast<uint32_t>(inside) << b;
    }
  }
};

// Pixel centres of the four columns and four rows of blocks of a tile.
struct PixelCenters {
  F x[4], y[4];

  explicit PixelCenters(const TilePosition& tile) {
    for (int k = 0; k < 4; ++k) {
      for (int l = 0; l < LANES; ++l) {
        x[k].v[l] = static_cast<float>(tile.left + k * BLOCK_W + l % BLOCK_W) + 0.5f;
        y[k].v[l] = static_cast<float>(tile.top + k * BLOCK_H + l / BLOCK_W) + 0.5f;
      }
    }
  }
};

// Visit (pixel index in the image, index in block order) of every pixel of a tile that is in the image.
template <class Fn>
S2D_INLINE void for_each_pixel(const Camera& camera, const TilePosition& tile, const Fn& fn) {
  for (int b = 0; b < TILE_BLOCKS; ++b) {
    if (!(tile.blocks >> b & 1)) continue;
    for (int l = 0; l < LANES; ++l) {
      const int x = tile.left + b % 4 * BLOCK_W + l % BLOCK_W, y = tile.top + b / 4 * BLOCK_H + l / BLOCK_W;
      if (x < camera.width && y < camera.height) fn(static_cast<int64_t>(y) * camera.width + x, b * LANES + l);
    }
  }
}

}  // namespace s2d
