// SPDX-License-Identifier: Apache-2.0
// Phase 4: from image cotangents to ten sums per instance. A tile's instances are walked back to front; each adds up over the blocks
// it touches in registers, then one transposed reduction gives its slot. No atomics: every slot has one writer.
//
// With alpha = 2^-n, n = u^2 + v^2 - L, per pixel and instance:
//   q = alpha / (1 - alpha) = 1 / (2^n - 1)
//   w = alpha T' = q T          T = transmittance behind the instance, T' = T + w = in front of it
//   G = dLoss / d ln alpha = w (c . v) - q S     S = sum of w (c . v) behind, background included; 0 where alpha is clamped
// and the slot gets the sums of G, G u, G v, G u^2, G u v, G v^2, w v_r, w v_g, w v_b, w v_aux, and where it is asked for the length of
// (G u, G v) carried to the position, pixel by pixel: gradients that point in all directions cancel in the sum, but not in that.
#include <algorithm>
#include <climits>

#include "parallel.h"

#include "tile.h"
#include "transposed_sum.h"

namespace s2d {
namespace {

// One block of pixels. A block's vectors lie side by side: arrays of each kind would be 4 KB apart from one another, and a load that
// agrees with an earlier store in its low 12 address bits waits for it.
struct BlockPixels {
  F T, S;
  F r, g, b;     // cotangents of the colour
  F aux, depth;  // c . v has the term (aux of the instance - depth) * aux
  I stop;
};

template <bool DEPTH>
void load_pixels(const Frame& frame, const CotangentArgs& cotangents, const TilePosition& tile, const TileState& saved,
                 BlockPixels* blocks) {
  alignas(64) float r[TILE_BLOCKS * LANES] = {}, g[TILE_BLOCKS * LANES] = {}, b[TILE_BLOCKS * LANES] = {};
  alignas(64) float alpha[TILE_BLOCKS * LANES] = {}, depth[TILE_BLOCKS * LANES] = {};
  for_each_run(frame.camera, tile, [&](int64_t pixel, int i, int length) {
    const auto copy = [&](int count) {
      for (int k = 0; cotangents.rgb && k < count; ++k) {
        r[i + k] = cotangents.rgb[3 * (pixel + k)];
        g[i + k] = cotangents.rgb[3 * (pixel + k) + 1];
        b[i + k] = cotangents.rgb[3 * (pixel + k) + 2];
      }
      if (cotangents.alpha) std::memcpy(alpha + i, cotangents.alpha + pixel, count * sizeof(float));
      if (DEPTH) std::memcpy(depth + i, cotangents.depth + pixel, count * sizeof(float));
    };
    if (length == BLOCK_W) {
      copy(BLOCK_W);
    } else {
      copy(length);
    }
  });
  const CameraArgs& args = frame.camera_args;
  for (int k = 0; k < TILE_BLOCKS; ++k) {
    BlockPixels& block = blocks[k];
    const F T = load(saved.T + k * LANES);
    block.T = T;
    block.r = load(r + k * LANES), block.g = load(g + k * LANES), block.b = load(b + k * LANES);
    const F by_T = fma(block.r, F(args.background[0]),
                       fma(block.g, F(args.background[1]), block.b * F(args.background[2]))) - load(alpha + k * LANES);
    block.S = T * by_T;
    if (DEPTH) {
      const F covered = load(saved.covered + k * LANES), v = load(depth + k * LANES);
      if (args.inverse_depth) {
        block.aux = v;
        block.depth = F(0.0f);
      } else {
        block.aux = select(covered > F(0.0f), v / covered, F(0.0f));
        block.depth = load(saved.depth + k * LANES);
      }
    }
    block.stop = load(saved.stop + k * LANES);
  }
}

// Instances that are worked on together, back to front, and their (instance, block) pairs. First q of all pairs, through memory, then the
// sums: one long loop without a dependency from pair to pair keeps the pipes full, which a few blocks of one instance cannot.
struct Group {
  static constexpr int INSTANCES = 16, PAIRS = 64;  // full from either on

  TileSplat splats[INSTANCES];
  float* sums[INSTANCES];                    // where each one's go
  int ends[INSTANCES];                       // of each one's pairs
  uint16_t pairs[PAIRS + TILE_BLOCKS + 16];  // instance * TILE_BLOCKS + block; the vectorised writer overshoots
  alignas(64) float q[(PAIRS + TILE_BLOCKS) * LANES];
  int count = 0, num_pairs = 0;

  bool full() const { return count == INSTANCES || num_pairs >= PAIRS; }

  S2D_INLINE void add(uint32_t mask, float* slot) {
    const int base = count * TILE_BLOCKS;
#ifdef S2D_AVX512
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int part = 0; part < TILE_BLOCKS; part += 16) {
      const __mmask16 touch = static_cast<__mmask16>(mask >> part);
      const __m512i codes = _mm512_maskz_compress_epi32(touch, _mm512_add_epi32(lanes, _mm512_set1_epi32(base + part)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(pairs + num_pairs), _mm512_cvtepi32_epi16(codes));
      num_pairs += __builtin_popcount(touch);
    }
#else
    for (; mask; mask &= mask - 1) pairs[num_pairs++] = static_cast<uint16_t>(base + __builtin_ctz(mask));
#endif
    sums[count] = slot;
    ends[count++] = num_pairs;
  }
};

void compute_q(Group& group, const PixelCenters& centers, const BlockPixels* blocks) {
  for (int j = 0; j < group.num_pairs; ++j) {
    const TileSplat& s = group.splats[group.pairs[j] / TILE_BLOCKS];
    const int k = group.pairs[j] % TILE_BLOCKS;
    F u, v;
    s.whiten(centers.x[k % TILE_COLUMNS], centers.y[k / TILE_COLUMNS], u, v);
    const F n = fma(v, v, fms(u, u, F(s.log2_opacity)));
    const Mask counts = (n <= F(-LOG2_ALPHA_MIN)) & (splat(s.index) < blocks[k].stop);
    store(group.q + j * LANES, reciprocal_where(counts, max_of(exp2_of(n) - F(1.0f), F(1.0f / ALPHA_MAX - 1.0f))));
  }
}

template <bool DEPTH, bool LENGTHS>
void sum_group(const Frame& frame, const Group& group, const PixelCenters& centers, BlockPixels* blocks) {
  constexpr int WIDTH = NUM_SUMS + LENGTHS;
  const F q_clamped = reciprocal(F(1.0f / ALPHA_MAX - 1.0f));
  const float scale_x = 0.5f * frame.camera_args.width / (WHITEN * WHITEN), scale_y = 0.5f * frame.camera_args.height / (WHITEN * WHITEN);
  for (int i = 0, j = 0; i < group.count; ++i) {
    const TileSplat& s = group.splats[i];
    const F x_by_u(scale_x * s.s1), y_by_u(scale_y * s.s2), y_by_v(scale_y * s.s3);
    F total[WIDTH];
    for (F& value : total) value = F(0.0f);
    for (; j < group.ends[i]; ++j) {
      const int k = group.pairs[j] % TILE_BLOCKS;
      BlockPixels& block = blocks[k];
      F u, v;
      s.whiten(centers.x[k % TILE_COLUMNS], centers.y[k / TILE_COLUMNS], u, v);
      const F q = load(group.q + j * LANES), w = q * block.T;
      F cv = fma(F(s.rgb[2]), block.b, fma(F(s.rgb[1]), block.g, F(s.rgb[0]) * block.r));
      if (DEPTH) cv = fma(F(s.aux) - block.depth, block.aux, cv);
      const F wcv = w * cv;
      const F G = zero_unless(q < q_clamped, fnma(q, block.S, wcv));
      block.S = block.S + wcv;
      block.T = block.T + w;
      const F Gu = G * u, Gv = G * v;
      total[SUM_G] = total[SUM_G] + G;
      total[SUM_GU] = total[SUM_GU] + Gu;
      total[SUM_GV] = total[SUM_GV] + Gv;
      total[SUM_GUU] = fma(Gu, u, total[SUM_GUU]);
      total[SUM_GUV] = fma(Gu, v, total[SUM_GUV]);
      total[SUM_GVV] = fma(Gv, v, total[SUM_GVV]);
      total[SUM_R] = fma(w, block.r, total[SUM_R]);
      total[SUM_GREEN] = fma(w, block.g, total[SUM_GREEN]);
      total[SUM_B] = fma(w, block.b, total[SUM_B]);
      if (DEPTH) total[SUM_AUX] = fma(w, block.aux, total[SUM_AUX]);
      if constexpr (LENGTHS) {
        const F x = x_by_u * Gu, y = fma(y_by_u, Gu, y_by_v * Gv);
        total[SUM_LENGTH] = total[SUM_LENGTH] + sqrt_of(fma(x, x, y * y));
      }
    }
    transposed_sum<WIDTH>(total, group.sums[i]);
  }
}

template <bool DEPTH, bool LENGTHS>
void finish_group(const Frame& frame, Group& group, const PixelCenters& centers, BlockPixels* blocks) {
  compute_q(group, centers, blocks);
  sum_group<DEPTH, LENGTHS>(frame, group, centers, blocks);
  group.count = group.num_pairs = 0;
}

template <bool DEPTH, bool LENGTHS>
void backward_tile(const Frame& frame, const CotangentArgs& cotangents, int64_t index) {
  const uint32_t begin = frame.tile_begin[index], count = frame.tile_begin[index + 1] - begin;
  if (!count) return;
  const TilePosition tile(frame, index);
  const PixelCenters centers;
  const TileState& saved = frame.tile_states[index];
  BlockPixels pixels[TILE_BLOCKS];
  load_pixels<DEPTH>(frame, cotangents, tile, saved, pixels);

  // Blocks wake up, back to front, at the instance before the one that finished their last pixel.
  std::pair<int32_t, uint32_t> wake[TILE_BLOCKS];
  for (int b = 0; b < TILE_BLOCKS; ++b) {
    wake[b] = {*std::max_element(saved.stop + b * LANES, saved.stop + (b + 1) * LANES), 1u << b};
  }
  std::sort(wake, wake + TILE_BLOCKS, [](const auto& a, const auto& b) { return a > b; });
  int awake = 0;
  uint32_t blocks = 0;

  constexpr int AHEAD = 16;  // instances whose Splats are on their way from memory
  Group group;
  const Instance* instances = frame.instances.data() + begin;
  const Splat* splats = frame.splats.data();
  Slot* slots = frame.slots.data();
  for (int32_t i = static_cast<int32_t>(count) - 1; i >= 0; --i) {
    while (awake < TILE_BLOCKS && wake[awake].first > i) blocks |= wake[awake++].second;
    const Instance& instance = instances[i];
    if (i >= AHEAD) __builtin_prefetch(&splats[instances[i - AHEAD].gaussian]);
    float* sums = slots[instance.slot].sums;
    const uint32_t mask = instance.mask & blocks;
    if (!mask) {
      std::fill(sums, sums + NUM_SUMS + LENGTHS, 0.0f);
      continue;
    }
    __builtin_prefetch(sums, 1);
    group.splats[group.count].set(splats[instance.gaussian], tile, i);
    group.add(mask, sums);
    if (group.full()) finish_group<DEPTH, LENGTHS>(frame, group, centers, pixels);
  }
  finish_group<DEPTH, LENGTHS>(frame, group, centers, pixels);
}

}  // namespace

void backward_tiles(Frame& frame, const CotangentArgs& cotangents, int num_threads) {
  PhaseTimer timer(frame, PHASE_BACKWARD_TILES);
  const int64_t num_tiles = static_cast<int64_t>(frame.tiles_x) * frame.tiles_y;
  const auto run = cotangents.depth ? (cotangents.lengths ? backward_tile<true, true> : backward_tile<true, false>)
                                    : (cotangents.lengths ? backward_tile<false, true> : backward_tile<false, false>);
  parallel_for(num_tiles, num_threads, [&](int64_t tile) { run(frame, cotangents, tile); });
}

}  // namespace s2d
