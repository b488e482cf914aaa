// SPDX-License-Identifier: Apache-2.0
// Phase 1: every Gaussian to a Splat record, or to "not visible"; then the tiles and blocks that each visible one touches.
#include <stdexcept>

#include "parallel.h"

#include "gaussian_batch.h"

namespace s2d {
namespace {

constexpr int64_t CHUNK = 512;  // Gaussians per task

struct BatchSplats {
  alignas(64) float x[LANES], y[LANES], z[LANES], s1[LANES], s2[LANES], s3[LANES], log2_opacity[LANES], aux[LANES];
  alignas(64) float half_x[LANES], half_y[LANES], basis[SH_MAX_COEFFS * LANES];
};

// Project LANES Gaussians; return which of them are visible.
uint32_t project_batch(const Frame& frame, const SceneArgs& scene, const float* means2d_offset, int64_t first, int count,
                       BatchSplats& out) {
  GaussianBatch batch;
  load_batch(scene, first, count, batch);
  Footprint<F> fp;
  project_footprint(frame.camera, batch.mean, batch.H, fp);
  if (means2d_offset) {
    F offset[2];
    load_rows<2>(means2d_offset, first, count, offset);
    fp.mean_x = fp.mean_x + offset[0];
    fp.mean_y = fp.mean_y + offset[1];
  }

  if (frame.camera_args.antialiasing) {
    // log2 of the smallest float instead of minus infinity: far below ALPHA_MIN either way.
    batch.log2_opacity = batch.log2_opacity + F(0.5f) * log2_of(max_of(fp.sharp_det / fp.det, F(1e-37f)));
  }

  // The ellipse d^T conic d = level, with alpha = ALPHA_MIN on it.
  const F level = F(2.0f * LN_2) * (batch.log2_opacity - F(LOG2_ALPHA_MIN));
  const F half_x = sqrt_of(level * fp.var_x), half_y = sqrt_of(level * fp.var_y);
  const F zero(0.0f);
  Mask seen = batch.healthy & (fp.z > F(NEAR)) & (level > zero);
  for (const F& value : {half_x, half_y, fp.mean_x, fp.mean_y, fp.s1, fp.s2, fp.s3, fp.z}) {
    seen = seen & is_finite(value);
  }
  seen = seen & (fp.mean_x + half_x > zero) & (fp.mean_x - half_x < F(static_cast<float>(frame.camera.width)));
  seen = seen & (fp.mean_y + half_y > zero) & (fp.mean_y - half_y < F(static_cast<float>(frame.camera.height)));
  seen = seen & (fp.det > zero) & is_finite(fp.det);
  const uint32_t visible = bits_of(seen) & ((count == LANES) ? ALL_LANES : (1u << count) - 1);
  if (!visible) return 0;

  store(out.x, fp.mean_x), store(out.y, fp.mean_y), store(out.z, fp.z);
  store(out.s1, fp.s1), store(out.s2, fp.s2), store(out.s3, fp.s3);
  store(out.log2_opacity, batch.log2_opacity);
  store(out.aux, frame.camera_args.inverse_depth ? fp.inv_z : fp.z);
  store(out.half_x, half_x), store(out.half_y, half_y);
  if (!scene.colors) {
    F dir[3], inv_distance, basis[SH_MAX_COEFFS];
    view_direction(frame.camera, batch.mean, dir, inv_distance);
    sh_basis(scene.degree, dir[0], dir[1], dir[2], basis);
    for (int k = 0; k < (scene.degree + 1) * (scene.degree + 1); ++k) store(out.basis + k * LANES, basis[k]);
  }
  return visible;
}

struct TileRange {
  int x0, x1, y0, y1;  // half-open
  int64_t count() const { return static_cast<int64_t>(x1 - x0) * (y1 - y0); }
};

inline int to_tile(float pixel, int tile, int limit) {
  const float t = pixel / static_cast<float>(tile);
  return t <= 0.0f ? 0 : t >= static_cast<float>(limit) ? limit : static_cast<int>(t);
}

// Tiles under the axis-aligned bound of the ellipse, half a pixel shrunk: only pixel centres count.
TileRange tile_range(const Frame& frame, const Splat& s) {
  constexpr float slack = 0.49f;
  TileRange r;
  r.x0 = to_tile(s.x - s.half_x, TILE_W, frame.tiles_x);
  r.y0 = to_tile(s.y - s.half_y, TILE_H, frame.tiles_y);
  r.x1 = to_tile(s.x + s.half_x - slack, TILE_W, frame.tiles_x - 1) + 1;
  r.y1 = to_tile(s.y + s.half_y - slack, TILE_H, frame.tiles_y - 1) + 1;
  if (r.x1 < r.x0) r.x1 = r.x0;
  if (r.y1 < r.y0) r.y1 = r.y0;
  return r;
}

// Which blocks of the tile at pixel (left, top) hold a pixel centre inside the ellipse: the minimum of u^2 + v^2 over the hull of
// each block's centres against the level of the ellipse. The minimum of a convex quadratic over a rectangle lies at the centre of
// the ellipse, if inside, else on one of the two edges that face it; on each the free coordinate has a closed form.
struct BlockTest {
  F s1, s2, s3, level, along_y, along_x;  // along_y: dy = along_y * dx is best for fixed dx

  explicit BlockTest(const Splat& s) : s1(s.s1), s2(s.s2), s3(s.s3), level(s.log2_opacity - LOG2_ALPHA_MIN + CULL_SLACK) {
    along_y = F(-s.s1 * s.s2 / (s.s2 * s.s2 + s.s3 * s.s3));
    along_x = F(-s.s2 / s.s1);
  }

  S2D_INLINE F distance(F dx, F dy) const {
    const F u = fma(s1, dx, s2 * dy), v = s3 * dy;
    return fma(u, u, v * v);
  }

  S2D_INLINE Mask touches(F low_x, F low_y) const {
    const F high_x = low_x + F(BLOCK_W - 1.0f), high_y = low_y + F(BLOCK_H - 1.0f), zero(0.0f);
    const F near_x = clamp_to(zero, low_x, high_x), near_y = clamp_to(zero, low_y, high_y);
    const F on_x_edge = distance(near_x, clamp_to(along_y * near_x, low_y, high_y));
    const F on_y_edge = distance(clamp_to(along_x * near_y, low_x, high_x), near_y);
    return min_of(on_x_edge, on_y_edge) <= level;
  }
};

struct BlockOrigins {
  alignas(64) float x[TILE_BLOCKS], y[TILE_BLOCKS];
  BlockOrigins() {
    for (int b = 0; b < TILE_BLOCKS; ++b) {
      x[b] = static_cast<float>(b % TILE_COLUMNS * BLOCK_W) + 0.5f;
      y[b] = static_cast<float>(b / TILE_COLUMNS * BLOCK_H) + 0.5f;
    }
  }
};

// Write the tiles and masks of one Gaussian at `slot`; return how many.
uint32_t emit_tiles(const Frame& frame, const Splat& splat, const TileRange& range, uint32_t slot) {
  static const BlockOrigins origins;
  const BlockTest test(splat);
  uint32_t* tiles = frame.slot_tile.data() + slot;
  uint32_t* masks = frame.slot_mask.data() + slot;
  uint32_t count = 0;
  for (int ty = range.y0; ty < range.y1; ++ty) {
    for (int tx = range.x0; tx < range.x1; ++tx) {
      const F left(static_cast<float>(tx * TILE_W) - splat.x), top(static_cast<float>(ty * TILE_H) - splat.y);
      uint32_t mask = 0;
      for (int part = 0; part < TILE_BLOCKS; part += LANES) {
        mask |= bits_of(test.touches(load(origins.x + part) + left, load(origins.y + part) + top)) << part;
      }
      // Branch-free compaction: the next tile overwrites an empty one.
      tiles[count] = static_cast<uint32_t>(ty * frame.tiles_x + tx);
      masks[count] = mask;
      count += mask != 0;
    }
  }
  return count;
}

}  // namespace

void project(Frame& frame, const SceneArgs& scene, const ImageArgs& images, int num_threads) {
  PhaseTimer timer(frame, PHASE_PROJECT);
  const int64_t n = scene.n, chunks = (n + CHUNK - 1) / CHUNK;
  Splat* splats = frame.splats.reserve(n);
  uint32_t* slot_begin = frame.slot_begin.reserve(n);
  uint32_t* slot_count = frame.slot_count.reserve(n);
  int64_t* chunk_counts = frame.chunk_counts.reserve(chunks + 1);

  parallel_for(chunks, num_threads, [&](int64_t chunk) {
    BatchSplats batch;
    const int64_t end = n < (chunk + 1) * CHUNK ? n : (chunk + 1) * CHUNK;
    int64_t reserved = 0;
    for (int64_t first = chunk * CHUNK; first < end; first += LANES) {
      const int count = static_cast<int>(end - first < LANES ? end - first : LANES);
      const uint32_t visible = project_batch(frame, scene, images.means2d_offset, first, count, batch);
      for (int l = 0; l < count; ++l) {
        const int64_t g = first + l;
        slot_count[g] = 0;
        images.radii[g] = 0;
        if (!(visible >> l & 1)) continue;
        Splat s;
        Float4 color;
        if (scene.colors) {
          color = load3(scene.colors + 3 * g);
        } else {
          color = sh_color(scene, g, batch.basis + l);
        }
        if (!(__builtin_isfinite(color[0]) && __builtin_isfinite(color[1]) && __builtin_isfinite(color[2]))) continue;
        s.x = batch.x[l], s.y = batch.y[l], s.z = batch.z[l];
        s.s1 = batch.s1[l], s.s2 = batch.s2[l], s.s3 = batch.s3[l];
        s.log2_opacity = batch.log2_opacity[l];
        for (int k = 0; k < 3; ++k) s.rgb[k] = scene.colors ? color[k] : (color[k] > 0.0f ? color[k] : 0.0f);
        s.aux = batch.aux[l];
        s.half_x = batch.half_x[l], s.half_y = batch.half_y[l];
        const float radius = __builtin_ceilf(s.half_x > s.half_y ? s.half_x : s.half_y);
        images.radii[g] = radius < 2147483520.0f ? static_cast<int32_t>(radius) : INT32_MAX;
        splats[g] = s;
        const int64_t tiles = tile_range(frame, s).count();
        slot_count[g] = static_cast<uint32_t>(tiles);
        reserved += tiles;
      }
    }
    chunk_counts[chunk] = reserved;
  });

  int64_t total = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t reserved = chunk_counts[chunk];
    chunk_counts[chunk] = total;
    total += reserved;
  }
  if (total > UINT32_MAX) {
    throw std::length_error("the Gaussians cover more than 4 billion tiles together. Prune the largest, or render smaller images");
  }
  frame.slot_tile.reserve(total);
  frame.slot_mask.reserve(total);
  frame.slots.reserve(total);

  parallel_for(chunks, num_threads, [&](int64_t chunk) {
    const int64_t end = n < (chunk + 1) * CHUNK ? n : (chunk + 1) * CHUNK;
    uint32_t slot = static_cast<uint32_t>(chunk_counts[chunk]);
    for (int64_t g = chunk * CHUNK; g < end; ++g) {
      if (!slot_count[g]) continue;
      slot_begin[g] = slot;
      slot += slot_count[g];
      slot_count[g] = emit_tiles(frame, splats[g], tile_range(frame, splats[g]), slot_begin[g]);
    }
  });
}

}  // namespace s2d
