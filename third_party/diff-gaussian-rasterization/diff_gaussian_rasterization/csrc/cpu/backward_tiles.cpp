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

struct PixelState {
  F T[TILE_BLOCKS], S[TILE_BLOCKS];
  F r[TILE_BLOCKS], g[TILE_BLOCKS], b[TILE_BLOCKS];  // cotangents of the colour
  F aux[TILE_BLOCKS], depth[TILE_BLOCKS];            // c . v has the term (aux of the instance - depth) * aux
  I stop[TILE_BLOCKS];
  int32_t block_stop[TILE_BLOCKS];  // the largest stop of a block
};

template <bool DEPTH>
void load_pixels(const Frame& frame, const CotangentArgs& cotangents, const TilePosition& tile, const TileState& saved,
                 PixelState& state) {
  alignas(64) float r[TILE_BLOCKS * LANES] = {}, g[TILE_BLOCKS * LANES] = {}, b[TILE_BLOCKS * LANES] = {};
  alignas(64) float alpha[TILE_BLOCKS * LANES] = {}, depth[TILE_BLOCKS * LANES] = {};
  for_each_pixel(frame.camera, tile, [&](int64_t pixel, int i) {
    if (cotangents.rgb) {
      r[i] = cotangents.rgb[3 * pixel];
      g[i] = cotangents.rgb[3 * pixel + 1];
      b[i] = cotangents.rgb[3 * pixel + 2];
    }
    if (cotangents.alpha) alpha[i] = cotangents.alpha[pixel];
    if (DEPTH) depth[i] = cotangents.depth[pixel];
  });
  const CameraArgs& args = frame.camera_args;
  for (int k = 0; k < TILE_BLOCKS; ++k) {
    const F T = load(saved.T + k * LANES);
    state.T[k] = T;
    state.r[k] = load(r + k * LANES), state.g[k] = load(g + k * LANES), state.b[k] = load(b + k * LANES);
    const F by_T = fma(state.r[k], F(args.background[0]),
                       fma(state.g[k], F(args.background[1]), state.b[k] * F(args.background[2]))) - load(alpha + k * LANES);
    state.S[k] = T * by_T;
    if (DEPTH) {
      const F covered = load(saved.covered + k * LANES), v = load(depth + k * LANES);
      if (args.inverse_depth) {
        state.aux[k] = v;
        state.depth[k] = F(0.0f);
      } else {
        state.aux[k] = select(covered > F(0.0f), v / covered, F(0.0f));
        state.depth[k] = load(saved.depth + k * LANES);
      }
    }
    state.stop[k] = load(saved.stop + k * LANES);
    state.block_stop[k] = *std::max_element(saved.stop + k * LANES, saved.stop + (k + 1) * LANES);
  }
}

template <bool DEPTH>
S2D_INLINE void backward_instance(const Splat& s, int32_t index, uint32_t mask, const PixelCenters& centers, PixelState& state,
                                  float* sums) {
  const F sx(s.x), sy(s.y), s1(s.s1), s2(s.s2), s3(s.s3), L(s.log2_opacity), r(s.rgb[0]), g(s.rgb[1]), b(s.rgb[2]), z(s.aux);
  const I here = splat(index);
  F total[NUM_SUMS];
  for (F& value : total) value = F(0.0f);
  for (; mask; mask &= mask - 1) {
    const int k = __builtin_ctz(mask);
    const F dx = centers.x[k % 4] - sx, dy = centers.y[k / 4] - sy;
    const F u = fma(s1, dx, s2 * dy), v = s3 * dy;
    const F power = fnma(v, v, fnma(u, u, L));
    const Mask counts = (power >= F(LOG2_ALPHA_MIN)) & (here < state.stop[k]);
    if (!any(counts)) continue;
    const F raw = zero_unless(counts, exp2_fast(power));
    const F alpha = min_of(raw, F(ALPHA_MAX));
    const F inverse = reciprocal(F(1.0f) - alpha);
    const F T = state.T[k] * inverse;  // in front of this instance
    const F w = alpha * T;
    F cv = fma(b, state.b[k], fma(g, state.g[k], r * state.r[k]));
    if (DEPTH) cv = fma(z - state.depth[k], state.aux[k], cv);
    const F d_alpha = fnma(state.S[k], inverse, T * cv);
    state.S[k] = fma(w, cv, state.S[k]);
    state.T[k] = T;
    const F G = zero_unless(raw <= F(ALPHA_MAX), raw * d_alpha);
    const F Gu = G * u, Gv = G * v;
    total[SUM_G] = total[SUM_G] + G;
    total[SUM_GU] = total[SUM_GU] + Gu;
    total[SUM_GV] = total[SUM_GV] + Gv;
    total[SUM_GUU] = fma(Gu, u, total[SUM_GUU]);
    total[SUM_GUV] = fma(Gu, v, total[SUM_GUV]);
    total[SUM_GVV] = fma(Gv, v, total[SUM_GVV]);
    total[SUM_R] = fma(w, state.r[k], total[SUM_R]);
    total[SUM_GREEN] = fma(w, state.g[k], total[SUM_GREEN]);
    total[SUM_B] = fma(w, state.b[k], total[SUM_B]);
    if (DEPTH) total[SUM_AUX] = fma(w, state.aux[k], total[SUM_AUX]);
  }
  transposed_sum<NUM_SUMS>(total, sums);
}

template <bool DEPTH>
void backward_tile(const Frame& frame, const CotangentArgs& cotangents, int64_t index) {
  const uint32_t begin = frame.tile_begin[index], count = frame.tile_begin[index + 1] - begin;
  if (!count) return;
  const TilePosition tile(frame, index);
  const PixelCenters centers(tile);
  PixelState state;
  load_pixels<DEPTH>(frame, cotangents, tile, frame.tile_states[index], state);

  // Blocks wake up, back to front, at the instance before the one that finished their last pixel.
  std::pair<int32_t, uint32_t> wake[TILE_BLOCKS];
  for (int b = 0; b < TILE_BLOCKS; ++b) wake[b] = {state.block_stop[b], 1u << b};
  std::sort(wake, wake + TILE_BLOCKS, [](const auto& a, const auto& b) { return a > b; });
  int awake = 0;
  uint32_t blocks = 0;

  const Instance* instances = frame.instances.data() + begin;
  Slot* slots = frame.slots.data();
  for (int32_t i = static_cast<int32_t>(count) - 1; i >= 0; --i) {
    while (awake < TILE_BLOCKS && wake[awake].first > i) blocks |= wake[awake++].second;
    const Instance& instance = instances[i];
    if (i >= 4) __builtin_prefetch(&frame.splats[instances[i - 4].gaussian]);
    float* sums = slots[instance.slot].sums;
    const uint32_t mask = instance.mask & blocks;
    if (!mask) {
      std::fill(sums, sums + NUM_SUMS, 0.0f);
      continue;
    }
    backward_instance<DEPTH>(frame.splats[instance.gaussian], i, mask, centers, state, sums);
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
