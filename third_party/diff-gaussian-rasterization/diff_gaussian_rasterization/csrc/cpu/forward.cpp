// SPDX-License-Identifier: Apache-2.0
// Phase 3: blend each tile front to back. A block of pixels at a time, so that its running sums stay in registers; the instances of
// a tile are dealt out to the lists of the blocks they touch, a batch at a time, and a block that is finished takes no more.
#include <algorithm>
#include <climits>

#include "parallel.h"

#include "tile.h"

namespace s2d {
namespace {

constexpr int BATCH = 256;  // instances dealt out at a time: their TileSplats (16 KB) stay in the L1 cache
constexpr int AHEAD = 8;    // instances whose Splats are on their way from memory
constexpr int CHUNK = 16;   // instances whose alphas are computed before they are blended

struct BlockState {
  F T;        // product of 1 - alpha, also past the end: below T_MIN from the instance on that finished the pixel
  F final_T;  // without that instance
  F covered, r, g, b, aux;  // covered = sum of weights; 1 - T loses its digits where little is drawn
  I stop;
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
    for (int b = 0; b < TILE_BLOCKS; ++b) entries[b][counts[b]] = 0;  // read as the one behind the last
  }
};

// Blend the listed instances into one block. Return false when all of its pixels are finished.
//
// A chunk's alphas first, through memory, then its blending: an alpha is a chain of sixteen dependent operations, and with all of one
// instance's work in a row the processor's window holds too few instances to fill the pipes. No branch at a pixel's end: T falls
// and never rises, so that comparing it with T_MIN says for each instance what the pixel still takes.
S2D_INLINE bool blend_block(const TileSplat* splats, const uint16_t* list, int count, F x, F y, BlockState& state) {
  if (!count) return true;
  BlockState s = state;
  s.stop = select(s.T >= F(T_MIN), splat(splats[list[0]].index), s.stop);
  for (int first = 0; first < count; first += CHUNK, list += CHUNK) {
    const int n = count - first < CHUNK ? count - first : CHUNK;
    alignas(64) float alphas[CHUNK * LANES];
    for (int k = 0; k < n; ++k) {
      const TileSplat& splat = splats[list[k]];
      F u, v;
      splat.whiten(x, y, u, v);
      const F power = fnma(v, v, fnma(u, u, F(splat.log2_opacity)));
      store(alphas + k * LANES, min_of(exp2_where(power >= F(LOG2_ALPHA_MIN), power), F(ALPHA_MAX)));
    }
    for (int k = 0; k < n; ++k) {
      const TileSplat& instance = splats[list[k]];
      const F alpha = load(alphas + k * LANES), T_next = fnma(alpha, s.T, s.T);
      const Mask open = T_next >= F(T_MIN);
      s.stop = select(open, splat(splats[list[k + 1]].index), s.stop);  // finished by the next, as far as is known
      const F w = zero_unless(open, alpha * s.T);
      s.T = T_next;
      s.final_T = select(open, T_next, s.final_T);
      s.covered = s.covered + w;
      s.r = fma(w, F(instance.rgb[0]), s.r);
      s.g = fma(w, F(instance.rgb[1]), s.g);
      s.b = fma(w, F(instance.rgb[2]), s.b);
      s.aux = fma(w, F(instance.aux), s.aux);
    }
    if (!any(s.T >= F(T_MIN))) break;
  }
  const Mask open = s.T >= F(T_MIN);
  s.stop = select(open, splat(INT32_MAX), s.stop);
  s.T = zero_unless(open, s.T);  // before it becomes too small for a normal number
  state = s;
  return any(open);
}

void write_pixels(const Frame& frame, const ImageArgs& images, const TilePosition& tile, const BlockState* blocks, TileState& out) {
  alignas(64) float r[TILE_BLOCKS * LANES], g[TILE_BLOCKS * LANES], b[TILE_BLOCKS * LANES];
  const CameraArgs& args = frame.camera_args;
  for (int k = 0; k < TILE_BLOCKS; ++k) {
    const BlockState& s = blocks[k];
    const F depth = args.inverse_depth ? s.aux : select(s.covered > F(0.0f), s.aux / s.covered, F(0.0f));
    store(out.T + k * LANES, s.final_T);
    store(out.covered + k * LANES, s.covered);
    store(out.depth + k * LANES, depth);
    store(out.stop + k * LANES, s.stop);
    store(r + k * LANES, fma(s.final_T, F(args.background[0]), s.r));
    store(g + k * LANES, fma(s.final_T, F(args.background[1]), s.g));
    store(b + k * LANES, fma(s.final_T, F(args.background[2]), s.b));
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
    s.T = s.final_T = F(inside ? 1.0f : 0.0f);  // pixels beyond the image are finished before they start
    s.covered = s.r = s.g = s.b = s.aux = F(0.0f);
    s.stop = splat(inside ? INT32_MAX : -1);
  }
  if (!inside) for_each_run(frame.camera, tile, [&](int64_t, int i, int length) {
    for (int k = i; k < i + length; ++k) {
      BlockState& s = blocks[k / LANES];
      s.T.v[k % LANES] = s.final_T.v[k % LANES] = 1.0f;
      s.stop.v[k % LANES] = INT32_MAX;
    }
  });
  TileSplat batch[BATCH];
  BlockLists lists;
  uint32_t open = tile.blocks;
  const uint32_t begin = frame.tile_begin[index], end = frame.tile_begin[index + 1];
  for (uint32_t first = begin; first < end && open; first += BATCH) {
    const Instance* instances = frame.instances.data() + first;
    const int count = static_cast<int>(end - first < BATCH ? end - first : BATCH);
    uint32_t masks[BATCH];
    for (int i = 0; i < count; ++i) {
      if (i + AHEAD < count) __builtin_prefetch(&splats[instances[i + AHEAD].gaussian]);
      batch[i].set(splats[instances[i].gaussian], tile, static_cast<int32_t>(first - begin) + i);
      masks[i] = instances[i].mask;
    }
    lists.deal(masks, count, open);
    for (uint32_t rest = open; rest; rest &= rest - 1) {
      const int b = __builtin_ctz(rest);
      const F x = centers.x[b % TILE_COLUMNS], y = centers.y[b / TILE_COLUMNS];
      if (!blend_block(batch, lists.entries[b], lists.counts[b], x, y, blocks[b])) {
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
