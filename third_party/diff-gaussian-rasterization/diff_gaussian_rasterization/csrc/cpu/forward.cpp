// SPDX-License-Identifier: Apache-2.0
// Phase 3: blend each tile front to back. A block of pixels at a time, so that its running sums stay in registers; the instances of
// a tile are dealt out to the lists of the blocks they touch, a batch at a time, and a block that is finished takes no more.
#include <algorithm>
#include <climits>

#include "parallel.h"

#include "tile.h"

namespace s2d {
namespace {

constexpr int BATCH = 256;  // instances dealt out at a time: their Splats (16 KB) stay in the L1 cache
constexpr int AHEAD = 8;    // instances whose Splats are on their way from memory

struct BlockState {
  F T, covered, r, g, b, aux;  // covered = sum of weights; 1 - T loses its digits where little is drawn
  F threshold;  // log2 of the least alpha that counts; infinity once the pixel is finished
  I stop;
};

// An instance as a batch of a tile holds it.
struct Entry {
  const Splat* splat;
  TileEllipse ellipse;
};

// Which entries of a batch touch each block, in order.
struct BlockLists {
  uint16_t entries[TILE_BLOCKS][BATCH + 16];  // the vectorised writer overshoots
  int counts[TILE_BLOCKS];

  void deal(const uint32_t* masks, int count, uint32_t open) {
    std::fill(counts, counts + TILE_BLOCKS, 0);
#ifdef S2D_AVX512
    __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int i = 0; i < count; i += 16, index = _mm512_add_epi32(index, _mm512_set1_epi32(16))) {
      const __mmask16 present = static_cast<__mmask16>(count - i < 16 ? (1u << (count - i)) - 1 : 0xffff);
      const __m512i sixteen = _mm512_maskz_loadu_epi32(present, masks + i);
      for (int b = 0; b < TILE_BLOCKS; ++b) {
        const __mmask16 touch = _mm512_test_epi32_mask(sixteen, _mm512_set1_epi32(static_cast<int>(open & 1u << b)));
        const __m256i chosen = _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(touch, index));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(entries[b] + counts[b]), chosen);
        counts[b] += __builtin_popcount(touch);
      }
    }
#else
    for (int i = 0; i < count; ++i) {
      for (uint32_t mask = masks[i] & open; mask; mask &= mask - 1) {
        const int b = __builtin_ctz(mask);
        entries[b][counts[b]++] = static_cast<uint16_t>(i);
      }
    }
#endif
  }
};

// Blend the listed instances into one block. Return false when all of its pixels are finished.
S2D_INLINE bool blend_block(const Entry* entries, int32_t base, const uint16_t* list, int count, F x, F y, BlockState& state) {
  F T = state.T, covered = state.covered, r = state.r, g = state.g, b = state.b, aux = state.aux, threshold = state.threshold;
  bool open = true;
  for (int k = 0; k < count; ++k) {
    const Entry& entry = entries[list[k]];
    const Splat& s = *entry.splat;
    const F u = fma(F(s.s1), x, fma(F(s.s2), y, F(entry.ellipse.u0))), v = fma(F(s.s3), y, F(entry.ellipse.v0));
    const F power = fnma(v, v, fnma(u, u, F(s.log2_opacity)));
    const Mask counts = power >= threshold;
    F alpha = min_of(exp2_where(counts, power), F(ALPHA_MAX));
    F T_next = fnma(alpha, T, T);
    const Mask stops = T_next < F(T_MIN);
    if (__builtin_expect(any(stops), 0)) {
      alpha = zero_unless(!stops, alpha);
      T_next = select(stops, T, T_next);
      threshold = select(stops, F(__builtin_inff()), threshold);
      state.stop = select(stops, splat(base + list[k]), state.stop);
      if (!any(threshold < F(__builtin_inff()))) {
        open = false;
        k = count;  // nothing of this instance is blended: all its pixels have stopped
      }
    }
    const F w = alpha * T;
    covered = covered + w;
    r = fma(w, F(s.rgb[0]), r);
    g = fma(w, F(s.rgb[1]), g);
    b = fma(w, F(s.rgb[2]), b);
    aux = fma(w, F(s.aux), aux);
    T = T_next;
  }
  state.T = T, state.covered = covered, state.r = r, state.g = g, state.b = b, state.aux = aux, state.threshold = threshold;
  return open;
}

void write_pixels(const Frame& frame, const ImageArgs& images, const TilePosition& tile, const BlockState* blocks, TileState& out) {
  alignas(64) float r[TILE_BLOCKS * LANES], g[TILE_BLOCKS * LANES], b[TILE_BLOCKS * LANES];
  const CameraArgs& args = frame.camera_args;
  for (int k = 0; k < TILE_BLOCKS; ++k) {
    const BlockState& s = blocks[k];
    const F depth = args.inverse_depth ? s.aux : select(s.covered > F(0.0f), s.aux / s.covered, F(0.0f));
    store(out.T + k * LANES, s.T);
    store(out.covered + k * LANES, s.covered);
    store(out.depth + k * LANES, depth);
    store(out.stop + k * LANES, s.stop);
    store(r + k * LANES, fma(s.T, F(args.background[0]), s.r));
    store(g + k * LANES, fma(s.T, F(args.background[1]), s.g));
    store(b + k * LANES, fma(s.T, F(args.background[2]), s.b));
  }
  for_each_run(frame.camera, tile, [&](int64_t pixel, int i, int length) {
    const auto copy = [&](int count) {
      for (int k = 0; k < count; ++k) {
        images.rgb[3 * (pixel + k)] = r[i + k];
        images.rgb[3 * (pixel + k) + 1] = g[i + k];
        images.rgb[3 * (pixel + k) + 2] = b[i + k];
      }
      std::memcpy(images.alpha + pixel, out.covered + i, count * sizeof(float));
      std::memcpy(images.depth + pixel, out.depth + i, count * sizeof(float));
    };
    if (length == BLOCK_W) {
      copy(BLOCK_W);
    } else {
      copy(length);
    }
  });
}

void blend_tile(const Frame& frame, const ImageArgs& images, int64_t index) {
  const TilePosition tile(frame, index);
  const PixelCenters centers;
  const Splat* splats = frame.splats.data();
  BlockState blocks[TILE_BLOCKS];
  const bool inside = tile.left + TILE_W <= frame.camera.width && tile.top + TILE_H <= frame.camera.height;
  for (BlockState& s : blocks) {
    s.T = F(1.0f);
    s.covered = s.r = s.g = s.b = s.aux = F(0.0f);
    s.threshold = F(inside ? LOG2_ALPHA_MIN : __builtin_inff());  // pixels beyond the image are finished before they start
    s.stop = splat(inside ? INT32_MAX : -1);
  }
  if (!inside) for_each_run(frame.camera, tile, [&](int64_t, int i, int length) {
    for (int k = i; k < i + length; ++k) {
      blocks[k / LANES].threshold.v[k % LANES] = LOG2_ALPHA_MIN;
      blocks[k / LANES].stop.v[k % LANES] = INT32_MAX;
    }
  });
  Entry entries[BATCH];
  BlockLists lists;
  uint32_t open = tile.blocks;
  const uint32_t begin = frame.tile_begin[index], end = frame.tile_begin[index + 1];
  for (uint32_t first = begin; first < end && open; first += BATCH) {
    const Instance* instances = frame.instances.data() + first;
    const int count = static_cast<int>(end - first < BATCH ? end - first : BATCH);
    uint32_t masks[BATCH];
    for (int i = 0; i < count; ++i) {
      if (i + AHEAD < count) __builtin_prefetch(&splats[instances[i + AHEAD].gaussian]);
      const Splat& splat = splats[instances[i].gaussian];
      entries[i] = {&splat, TileEllipse(splat, tile)};
      masks[i] = instances[i].mask;
    }
    lists.deal(masks, count, open);
    for (uint32_t rest = open; rest; rest &= rest - 1) {
      const int b = __builtin_ctz(rest);
      if (!blend_block(entries, static_cast<int32_t>(first - begin), lists.entries[b], lists.counts[b], centers.x[b % TILE_COLUMNS], centers.y[b / TILE_COLUMNS],
                       blocks[b])) {
        open &= ~(1u << b);
      }
    }
  }
  write_pixels(frame, images, tile, blocks, frame.tile_states[index]);
}

}  // namespace

void forward(Frame& frame, const ImageArgs& images, int num_threads) {
  PhaseTimer timer(frame, PHASE_FORWARD);
  const int64_t num_tiles = static_cast<int64_t>(frame.tiles_x) * frame.tiles_y;
  frame.tile_states.reserve(num_tiles);
  parallel_for(num_tiles, num_threads, [&](int64_t tile) { blend_tile(frame, images, tile); });
}

}  // namespace s2d
