// SPDX-License-Identifier: Apache-2.0
// Phase 2: sort the visible Gaussians by depth once, then deal their instances out to the tiles in that order (a stable counting
// sort by tile). Cheaper than sorting (tile, depth) keys: the long list is moved once instead of once per digit.
//
// Each step cuts its input into consecutive parts, a task each. A task counts, then writes behind what the tasks before it write: the
// result does not depend on the number of parts.
#include <algorithm>
#include <cstring>

#include "parallel.h"

#include "frame.h"

namespace s2d {
namespace {

constexpr int64_t MIN_PART = 4096;  // Gaussians; less is not worth a task
constexpr int PARTS_PER_THREAD = 4;  // when dealing out: near Gaussians have more tiles than far ones
constexpr int MAX_DIGIT_BITS = 11;  // so many write heads stay in the L1 cache

struct Parts {
  int64_t total, count;
  Parts(int64_t total_, int64_t wanted) : total(total_), count(std::clamp<int64_t>(total_ / MIN_PART, 1, wanted)) {}
  int64_t start(int64_t part) const { return total * part / count; }
};

// Turn counts[part][bucket] into where each part starts to write each bucket.
void starts_from_counts(uint32_t* counts, int64_t parts, int64_t buckets, uint32_t* bucket_begin) {
  uint32_t total = 0;
  for (int64_t bucket = 0; bucket < buckets; ++bucket) {
    if (bucket_begin) bucket_begin[bucket] = total;
    for (int64_t part = 0; part < parts; ++part) {
      uint32_t& cell = counts[part * buckets + bucket];
      const uint32_t here = cell;
      cell = total;
      total += here;
    }
  }
  if (bucket_begin) bucket_begin[buckets] = total;
}

// One stable pass of a radix sort. for_each(begin, end, visit) calls visit(key, gaussian) for the elements of a part; put(position, key,
// gaussian) takes them in their new order.
template <class ForEach, class Put>
void radix_pass(Frame& frame, const Parts& parts, int num_threads, int shift, int bits, const ForEach& for_each, const Put& put) {
  const int64_t buckets = int64_t{1} << bits;
  const uint32_t digit_mask = static_cast<uint32_t>(buckets - 1);
  uint32_t* counts = frame.digit_counts.reserve(parts.count * buckets);
  parallel_for(parts.count, num_threads, [&](int64_t part) {
    uint32_t* mine = counts + part * buckets;
    std::memset(mine, 0, buckets * sizeof(uint32_t));
    for_each(parts.start(part), parts.start(part + 1), [&](uint32_t key, uint32_t) { ++mine[key >> shift & digit_mask]; });
  });
  starts_from_counts(counts, parts.count, buckets, nullptr);
  parallel_for(parts.count, num_threads, [&](int64_t part) {
    uint32_t* mine = counts + part * buckets;
    for_each(parts.start(part), parts.start(part + 1),
             [&](uint32_t key, uint32_t gaussian) { put(mine[key >> shift & digit_mask]++, key, gaussian); });
  });
}

// Visible Gaussians, nearest first; ties in index order. Keys are depths above the nearest: of a scene's 32 bits some 27 differ.
void sort_by_depth(Frame& frame, int64_t n, uint32_t min_depth, uint32_t max_depth, int num_threads) {
  int key_bits = 1;
  while (max_depth - min_depth >= 1ull << key_bits) ++key_bits;
  const int passes = (key_bits + MAX_DIGIT_BITS - 1) / MAX_DIGIT_BITS, bits = (key_bits + passes - 1) / passes;
  const uint32_t* depths = frame.depths.data();
  DepthKey *from = frame.keys.reserve(frame.num_visible), *to = frame.keys_swap.reserve(frame.num_visible);
  uint32_t* order = frame.order.reserve(frame.num_visible);

  const auto visible_ones = [&](int64_t begin, int64_t end, const auto& visit) {
    for (int64_t g = begin; g < end; ++g) {
      if (depths[g]) visit(depths[g] - min_depth, static_cast<uint32_t>(g));
    }
  };
  const auto sorted_ones = [&](int64_t begin, int64_t end, const auto& visit) {
    for (int64_t i = begin; i < end; ++i) visit(from[i].key, from[i].gaussian);
  };
  const auto put_key = [&](uint32_t at, uint32_t key, uint32_t gaussian) { to[at] = {key, gaussian}; };
  const auto put_last = [&](uint32_t at, uint32_t, uint32_t gaussian) { order[at] = gaussian; };

  const Parts all(n, num_threads), visible(frame.num_visible, num_threads);
  for (int pass = 0; pass < passes; ++pass) {
    const int shift = pass * bits;
    if (pass == 0 && passes == 1) {
      radix_pass(frame, all, num_threads, shift, bits, visible_ones, put_last);
    } else if (pass == 0) {
      radix_pass(frame, all, num_threads, shift, bits, visible_ones, put_key);
    } else if (pass < passes - 1) {
      radix_pass(frame, visible, num_threads, shift, bits, sorted_ones, put_key);
    } else {
      radix_pass(frame, visible, num_threads, shift, bits, sorted_ones, put_last);
    }
    std::swap(from, to);
  }
}

// Call visit(gaussian, range) for a part of the depth order. The order is random in memory, so what is needed is asked for ahead, in
// two steps.
template <class Visit>
S2D_INLINE void visit_in_order(const Frame& frame, int64_t begin, int64_t end, const Visit& visit) {
  constexpr int64_t RANGES_AHEAD = 32, TILES_AHEAD = 16;
  const uint32_t* order = frame.order.data();
  const SlotRange* ranges = frame.slot_ranges.data();
  const SlotTile* tiles = frame.slot_tiles.data();
  const int64_t last = frame.num_visible - 1;
  for (int64_t i = begin; i < end; ++i) {
    __builtin_prefetch(&ranges[order[std::min(i + RANGES_AHEAD, last)]]);
    __builtin_prefetch(&tiles[ranges[order[std::min(i + TILES_AHEAD, last)]].begin]);
    visit(order[i], ranges[order[i]]);
  }
}

}  // namespace

void bin(Frame& frame, int64_t n, int num_threads) {
  PhaseTimer timer(frame, PHASE_BIN);
  ChunkStats all = {0, UINT32_MAX, 0};
  for (int64_t chunk = 0; chunk < frame.num_chunks; ++chunk) {
    const ChunkStats& stats = frame.chunk_stats[chunk];
    all.visible += stats.visible;
    all.min_depth = std::min(all.min_depth, stats.min_depth);
    all.max_depth = std::max(all.max_depth, stats.max_depth);
  }
  frame.num_visible = all.visible;
  if (all.visible) sort_by_depth(frame, n, all.min_depth, all.max_depth, num_threads);

  const int64_t num_tiles = static_cast<int64_t>(frame.tiles_x) * frame.tiles_y;
  const Parts parts(all.visible, num_threads == 1 ? 1 : PARTS_PER_THREAD * num_threads);
  uint32_t* counts = frame.tile_counts.reserve(parts.count * num_tiles);
  parallel_for(parts.count, num_threads, [&](int64_t part) {
    uint32_t* mine = counts + part * num_tiles;
    std::memset(mine, 0, num_tiles * sizeof(uint32_t));
    visit_in_order(frame, parts.start(part), parts.start(part + 1), [&](uint32_t, SlotRange range) {
      const SlotTile* tiles = frame.slot_tiles.data() + range.begin;
      for (uint32_t k = 0; k < range.count; ++k) ++mine[tiles[k].tile];
    });
  });
  uint32_t* tile_begin = frame.tile_begin.reserve(num_tiles + 1);
  starts_from_counts(counts, parts.count, num_tiles, tile_begin);
  frame.num_instances = tile_begin[num_tiles];
  Instance* instances = frame.instances.reserve(frame.num_instances);
  parallel_for(parts.count, num_threads, [&](int64_t part) {
    uint32_t* next = counts + part * num_tiles;
    visit_in_order(frame, parts.start(part), parts.start(part + 1), [&](uint32_t gaussian, SlotRange range) {
      const SlotTile* tiles = frame.slot_tiles.data() + range.begin;
      for (uint32_t k = 0; k < range.count; ++k) instances[next[tiles[k].tile]++] = {gaussian, range.begin + k, tiles[k].mask};
    });
  });
}

}  // namespace s2d
