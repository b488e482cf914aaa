// SPDX-License-Identifier: Apache-2.0
// Phase 2: sort the visible Gaussians by depth once, then deal their instances out to the tiles in that order (a stable counting
// sort by tile). Cheaper than sorting (tile, depth) keys: the long list is moved once instead of once per digit.
#include <cstring>

#include "parallel.h"

#include "frame.h"

namespace s2d {
namespace {

// Least-significant-digit radix sort of (depth bits << 32 | gaussian) by the depth bits; stable, so ties stay in index order.
void sort_by_depth(Buffer<uint64_t>& keys, Buffer<uint64_t>& swap, int64_t n) {
  constexpr int BITS = 11, BUCKETS = 1 << BITS, PASSES = 3;
  uint32_t counts[PASSES][BUCKETS] = {};
  uint64_t *from = keys.data(), *to = swap.reserve(n);
  for (int64_t i = 0; i < n; ++i) {
    for (int pass = 0; pass < PASSES; ++pass) ++counts[pass][from[i] >> (32 + BITS * pass) & (BUCKETS - 1)];
  }
  for (int pass = 0; pass < PASSES; ++pass) {
    uint32_t sum = 0;
    bool trivial = false;
    for (uint32_t& count : counts[pass]) {
      trivial |= count == n;
      const uint32_t here = count;
      count = sum;
      sum += here;
    }
    if (trivial) continue;
    for (int64_t i = 0; i < n; ++i) to[counts[pass][from[i] >> (32 + BITS * pass) & (BUCKETS - 1)]++] = from[i];
    std::swap(from, to);
  }
  if (from != keys.data()) std::memcpy(keys.data(), from, n * sizeof(uint64_t));
}

}  // namespace

void bin(Frame& frame, int64_t n, int num_threads) {
  PhaseTimer timer(frame, PHASE_BIN);
  const int64_t num_tiles = static_cast<int64_t>(frame.tiles_x) * frame.tiles_y;
  const uint32_t* slot_count = frame.slot_count.data();
  uint64_t* order = frame.order.reserve(n);
  int64_t visible = 0;
  for (int64_t g = 0; g < n; ++g) {
    if (!slot_count[g]) continue;
    uint32_t depth_bits;  // positive floats compare like their bits
    std::memcpy(&depth_bits, &frame.splats[g].z, 4);
    order[visible++] = static_cast<uint64_t>(depth_bits) << 32 | static_cast<uint64_t>(g);
  }
  frame.num_visible = visible;
  sort_by_depth(frame.order, frame.order_swap, visible);

  // Each chunk of the depth order counts, then writes behind what the chunks before it wrote: any number of chunks gives the
  // same lists.
  const int64_t chunks = visible < 4096 ? 1 : num_threads;
  const auto chunk_start = [&](int64_t chunk) { return visible * chunk / chunks; };
  uint32_t* counts = frame.tile_counts.reserve(chunks * num_tiles);
  parallel_for(chunks, num_threads, [&](int64_t chunk) {
    uint32_t* mine = counts + chunk * num_tiles;
    std::memset(mine, 0, num_tiles * sizeof(uint32_t));
    for (int64_t i = chunk_start(chunk); i < chunk_start(chunk + 1); ++i) {
      const uint32_t g = static_cast<uint32_t>(order[i]);
      const uint32_t* tiles = frame.slot_tile.data() + frame.slot_begin[g];
      for (uint32_t k = 0; k < slot_count[g]; ++k) ++mine[tiles[k]];
    }
  });
  uint32_t* tile_begin = frame.tile_begin.reserve(num_tiles + 1);
  uint32_t total = 0;
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    tile_begin[tile] = total;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      uint32_t& cell = counts[chunk * num_tiles + tile];
      const uint32_t here = cell;
      cell = total;
      total += here;
    }
  }
  tile_begin[num_tiles] = total;
  frame.num_instances = total;
  Instance* instances = frame.instances.reserve(total);
  parallel_for(chunks, num_threads, [&](int64_t chunk) {
    uint32_t* next = counts + chunk * num_tiles;
    for (int64_t i = chunk_start(chunk); i < chunk_start(chunk + 1); ++i) {
      const uint32_t g = static_cast<uint32_t>(order[i]);
      const uint32_t begin = frame.slot_begin[g];
      for (uint32_t slot = begin; slot < begin + slot_count[g]; ++slot) {
        instances[next[frame.slot_tile[slot]]++] = {g, slot, frame.slot_mask[slot]};
      }
    }
  });
}

}  // namespace s2d
