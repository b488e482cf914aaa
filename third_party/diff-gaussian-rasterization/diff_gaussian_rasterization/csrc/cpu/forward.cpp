// Phase 3: blend each tile front to back. A block of pixels at a time, so that its running sums stay in registers; the instances of
// a tile are dealt out to the lists of the blocks they touch, a batch at a time, and a block that is finished takes no more.
#include <climits>

#include "parallel.h"

#include "tile.h"

namespace s2d {
namespace {

constexpr int BATCH = 256;  // instances dealt out at a time: their Splats (16 KB) stay in the L1 cache

struct BlockState {
  F T, covered, r, g, b, aux;  // covered = sum of weights; 1 - T loses its digits where little is drawn
  F threshold;  // log2 of the least alpha that counts; infinity once the pixel is finished
  I stop;
};

// Blend the listed instances into one block. Return false when all of its pixels are finished.
S2D_INLINE bool blend_block(const Splat* splats, const Instance* instances, int32_t base, const uint16_t* list, int count, F x,
                            F y, BlockState& state) {
  F T = state.T, covered = state.covered, r = state.r, g = state.g, b = state.b, aux = state.aux, threshold = state.threshold;
  bool open = true;
  for (int k = 0; k < count; ++k) {
    const Splat& s = splats[instances[list[k]].gaussian];
    const F dx = x - F(s.x), dy = y - F(s.y);
    const F u = fma(F(s.s1), dx, F(s.s2) * dy), v = F(s.s3) * dy;
    const F power = fnma(v, v, fnma(u, u, F(s.log2_opacity)));
    const Mask counts = power >= threshold;
    F alpha = zero_unless(counts, min_of(exp2_fast(power), F(ALPHA_MAX)));
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
  for_each_pixel(frame.camera, tile, [&](int64_t pixel, int i) {
    images.rgb[3 * pixel] = r[i];
    images.rgb[3 * pixel + 1] = g[i];
    images.rgb[3 * pixel + 2] = b[i];
    images.alpha[pixel] = out.covered[i];
    images.depth[pixel] = out.depth[i];
  });
}

void blend_tile(const Frame& frame, const ImageArgs& images, int64_t index) {
  const TilePosition tile(frame, index);
  const PixelCenters centers(tile);
  const Splat* splats = frame.splats.data();
  BlockState blocks[TILE_BLOCKS];
  for (BlockState& s : blocks) {
    s.T = F(1.0f);
    s.covered = s.r = s.g = s.b = s.aux = F(0.0f);
    s.threshold = F(__builtin_inff());  // pixels beyond the image are finished before they start
    s.stop = splat(-1);
  }
  for_each_pixel(frame.camera, tile, [&](int64_t, int i) {
    blocks[i / LANES].threshold.v[i % LANES] = LOG2_ALPHA_MIN;
    blocks[i / LANES].stop.v[i % LANES] = INT32_MAX;
  });
  uint16_t lists[TILE_BLOCKS][BATCH];
  uint32_t open = tile.blocks;
  const uint32_t begin = frame.tile_begin[index], end = frame.tile_begin[index + 1];
  for (uint32_t first = begin; first < end && open; first += BATCH) {
    const Instance* instances = frame.instances.data() + first;
    const int count = static_cast<int>(end - first < BATCH ? end - first : BATCH);
    int counts[TILE_BLOCKS] = {};
    for (int i = 0; i < count; ++i) {
      __builtin_prefetch(&splats[instances[i].gaussian]);
      for (uint32_t mask = instances[i].mask & open; mask; mask &= mask - 1) {
        const int b = __builtin_ctz(mask);
        lists[b][counts[b]++] = static_cast<uint16_t>(i);
      }
    }
    for (uint32_t rest = open; rest; rest &= rest - 1) {
      const int b = __builtin_ctz(rest);
      if (!blend_block(splats, instances, static_cast<int32_t>(first - begin), lists[b], counts[b], centers.x[b % 4],
                       centers.y[b / 4], blocks[b])) {
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
