// SPDX-License-Identifier: Apache-2.0
// Phase 4: from image cotangents to ten sums per instance. A tile's instances are walked back to front; each adds up over the blocks
// it touches in registers, then one transposed reduction gives its slot. No atomics: every slot has one writer.
//
// With alpha = 2^p, p = L - u^2 - v^2, per pixel and instance:
//   dLoss/dalpha = T (c . v) - S / (1 - alpha)    T = transmittance in front, S = sum of w (c . v) behind, background included
//   G = alpha dLoss/dalpha                        (= dLoss / d ln alpha; 0 where alpha is clamped)
// and the slot gets the sums of G, G u, G v, G u^2, G u v, G v^2, w v_r, w v_g, w v_b, w v_aux.
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

template <bool DEPTH>
S2D_INLINE void backward_instance(const Splat& s, const TilePosition& tile, const PixelCenters& centers, int32_t index, uint32_t mask,
                                  BlockPixels* blocks, float* sums) {
  const TileEllipse ellipse(s, tile);
  const F s1(s.s1), s2(s.s2), s3(s.s3), u0(ellipse.u0), v0(ellipse.v0), L(s.log2_opacity);
  const F red(s.rgb[0]), green(s.rgb[1]), blue(s.rgb[2]), aux(s.aux);
  const I here = splat(index);
  F total[NUM_SUMS];
  for (F& value : total) value = F(0.0f);
  for (; mask; mask &= mask - 1) {
    const int k = __builtin_ctz(mask);
    BlockPixels& block = blocks[k];
    const F y = centers.y[k / TILE_COLUMNS];
    const F u = fma(s1, centers.x[k % TILE_COLUMNS], fma(s2, y, u0)), v = fma(s3, y, v0);
    const F power = fnma(v, v, fnma(u, u, L));
    const Mask counts = (power >= F(LOG2_ALPHA_MIN)) & (here < block.stop);
    const F raw = exp2_where(counts, power);
    const F alpha = min_of(raw, F(ALPHA_MAX));
    const F inverse = reciprocal(F(1.0f) - alpha);
    const F T = block.T * inverse;  // in front of this instance
    const F w = alpha * T;
    F cv = fma(blue, block.b, fma(green, block.g, red * block.r));
    if (DEPTH) cv = fma(aux - block.depth, block.aux, cv);
    const F d_alpha = fnma(block.S, inverse, T * cv);
    block.S = fma(w, cv, block.S);
    block.T = T;
    const F G = zero_unless(raw <= F(ALPHA_MAX), raw * d_alpha);
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
  }
  transposed_sum<NUM_SUMS>(total, sums);
}

template <bool DEPTH>
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

  constexpr int AHEAD = 4;  // instances whose Splats are on their way from memory
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
      std::fill(sums, sums + NUM_SUMS, 0.0f);
      continue;
    }
    backward_instance<DEPTH>(splats[instance.gaussian], tile, centers, i, mask, pixels, sums);
  }
}

}  // namespace

void backward_tiles(Frame& frame, const CotangentArgs& cotangents, int num_threads) {
  PhaseTimer timer(frame, PHASE_BACKWARD_TILES);
  const int64_t num_tiles = static_cast<int64_t>(frame.tiles_x) * frame.tiles_y;
  parallel_for(num_tiles, num_threads, [&](int64_t tile) {
    if (cotangents.depth) {
      backward_tile<true>(frame, cotangents, tile);
    } else {
      backward_tile<false>(frame, cotangents, tile);
    }
  });
}

}  // namespace s2d
