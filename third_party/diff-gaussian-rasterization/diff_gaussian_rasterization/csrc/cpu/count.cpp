// SPDX-License-Identifier: Apache-2.0
// Not a phase: says how much work a finished render was, and what memory its workspace holds. For benchmarks. Walks the tile lists with
// the tests that the forward and the backward pass make, so it must follow them when they change what they skip.
#include <algorithm>
#include <climits>
#include <vector>

#include "abi.h"
#include "parallel.h"
#include "tile.h"

namespace s2d {
namespace {

// Pairs (pixel, Gaussian). A block is visited as a whole: pixels of it that are finished, that the Gaussian does not reach, or that lie
// beyond the edge of the image count as visited too, because their lanes are computed.
struct PairCounts {
  int64_t blended = 0;   // alpha >= ALPHA_MIN in a pixel that is not finished: what no renderer can do without
  int64_t forward = 0;   // visited by the forward pass: all blocks of the masks, up to the Gaussian that finishes the block's last pixel
  int64_t backward = 0;  // visited by the backward pass: as forward, without that last Gaussian
  int64_t listed = 0;    // all blocks of the masks that hold a pixel of the image
};

PairCounts count_tile(const Frame& frame, int64_t index) {
  const TilePosition tile(frame, index);
  const PixelCenters centers;
  const TileState& state = frame.tile_states[index];
  const Instance* instances = frame.instances.data() + frame.tile_begin[index];
  const int32_t count = static_cast<int32_t>(frame.tile_begin[index + 1] - frame.tile_begin[index]);
  int32_t last[TILE_BLOCKS];
  for (int b = 0; b < TILE_BLOCKS; ++b) last[b] = *std::max_element(state.stop + b * LANES, state.stop + (b + 1) * LANES);
  PairCounts out;
  for (int32_t i = 0; i < count; ++i) {
    const Splat& s = frame.splats[instances[i].gaussian];
    const TileEllipse ellipse(s, tile);
    out.listed += __builtin_popcount(instances[i].mask & tile.blocks) * LANES;
    for (uint32_t rest = instances[i].mask & tile.blocks; rest; rest &= rest - 1) {
      const int b = __builtin_ctz(rest);
      if (i > last[b]) continue;
      out.forward += LANES;
      if (i == last[b]) continue;
      out.backward += LANES;
      const F x = centers.x[b % TILE_COLUMNS], y = centers.y[b / TILE_COLUMNS];
      const F u = fma(F(s.s1), x, fma(F(s.s2), y, F(ellipse.u0))), v = fma(F(s.s3), y, F(ellipse.v0));
      const F power = fnma(v, v, fnma(u, u, F(s.log2_opacity)));
      const Mask blended = (power >= F(LOG2_ALPHA_MIN)) & (splat(i) < load(state.stop + b * LANES));
      out.blended += __builtin_popcount(bits_of(blended));
    }
  }
  return out;
}

}  // namespace
}  // namespace s2d

// counts[4] of the last forward pass: pairs blended, visited by the forward pass, visited by the backward pass, in the lists.
S2D_EXPORT int s2d_frame_pairs(const void* handle, int64_t* counts, int32_t num_threads) {
  return s2d::guarded([&] {
    const s2d::Frame& frame = *static_cast<const s2d::Frame*>(handle);
    const int64_t num_tiles = static_cast<int64_t>(frame.tiles_x) * frame.tiles_y;
    std::vector<s2d::PairCounts> tiles(num_tiles);
    s2d::parallel_for(num_tiles, num_threads, [&](int64_t tile) { tiles[tile] = s2d::count_tile(frame, tile); });
    std::fill(counts, counts + 4, 0);
    for (const s2d::PairCounts& tile : tiles) {
      counts[0] += tile.blended;
      counts[1] += tile.forward;
      counts[2] += tile.backward;
      counts[3] += tile.listed;
    }
  });
}

// bytes[3] that the workspace holds, room to grow included: what grows with the Gaussians, with the instances, with the image.
S2D_EXPORT void s2d_frame_memory(const void* handle, int64_t* bytes) {
  const s2d::Frame& f = *static_cast<const s2d::Frame*>(handle);
  bytes[0] = f.splats.bytes() + f.slot_ranges.bytes() + f.depths.bytes() + f.chunk_stats.bytes() + f.keys.bytes() +
             f.keys_swap.bytes() + f.order.bytes() + f.camera_sums.bytes();
  bytes[1] = f.slot_tiles.bytes() + f.instances.bytes() + f.slots.bytes();
  bytes[2] = f.digit_counts.bytes() + f.tile_counts.bytes() + f.tile_begin.bytes() + f.tile_states.bytes();
}
