// SPDX-License-Identifier: Apache-2.0
// Phase 1: every Gaussian to a Splat record, or to "not visible"; and the tiles and blocks that each visible one touches.
#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "parallel.h"

#include "gaussian_batch.h"
#include "tile_masks.h"

namespace s2d {
namespace {

constexpr int CHUNK = 512;  // Gaussians per task: what the tile test reads of them stays in the cache

// Where a task collects what the tile test needs.
struct Chunk {
  EllipseBatch<CHUNK> ellipses;
  uint32_t visible[CHUNK / LANES];  // bits
  int64_t tiles = 0;                // under the bounding boxes
};

// What is seen of the ellipses d^T conic d = level, alpha = ALPHA_MIN.
S2D_INLINE Mask seen_by(const Camera& camera, const Footprint<F>& fp, F level, F half_x, F half_y) {
  const F zero(0.0f);
  Mask seen = (fp.z > F(NEAR)) & (level > zero);
  for (const F& value : {half_x, half_y, fp.mean_x, fp.mean_y, fp.s1, fp.s2, fp.s3, fp.z}) seen = seen & is_finite(value);
  seen = seen & (fp.mean_x + half_x > zero) & (fp.mean_x - half_x < F(static_cast<float>(camera.width)));
  seen = seen & (fp.mean_y + half_y > zero) & (fp.mean_y - half_y < F(static_cast<float>(camera.height)));
  return seen & (fp.det > zero) & is_finite(fp.det);
}

// The colours of a batch; returns which are numbers. SH colours are clamped, given ones are not.
S2D_INLINE Mask batch_colors(const Camera& camera, const SceneArgs& scene, const GaussianBatch& batch, int64_t first, int count,
                             F* color) {
  if (scene.colors) {
    load_rows<3>(scene.colors, first, count, color);
    return is_finite(color[0]) & is_finite(color[1]) & is_finite(color[2]);
  }
  F dir[3], inv_distance, basis[SH_MAX_COEFFS];
  ShBatch sh;
  view_direction(camera, batch.mean, dir, inv_distance);
  sh_basis(scene.degree, dir[0], dir[1], dir[2], basis);
  load_sh(scene, first, count, sh);
  sh_color(scene, sh, basis, color);
  Mask numbers = sh_is_finite(scene, sh);
  for (int k = 0; k < 3; ++k) {
    numbers = numbers & is_finite(color[k]);
    color[k] = max_of(color[k], F(0.0f));
  }
  return numbers;
}

S2D_INLINE I radius_of(F half_x, F half_y) {
  constexpr float largest = 2147483520.0f;  // below 2^31
  const F radius = max_of(half_x, half_y), bounded = min_of(radius, F(largest));
  const NativeI below = __builtin_convertvector(bounded.v, NativeI);
  const Mask up = F(__builtin_convertvector(below, NativeF)) < bounded;
  return select(bounded < F(largest), select(up, I{below + 1}, I{below}), splat(INT32_MAX));
}

void store_splats(Splat* splats, uint32_t visible, const F* fields) {
  constexpr int WIDTH = sizeof(Splat) / sizeof(float);
  for (int k = 0; k < WIDTH; k += LANES) {
    F v[LANES];
    for (int i = 0; i < LANES; ++i) v[i] = fields[k + i];
    transpose(v);
    for (int l = 0; l < LANES; ++l) {
      if (visible >> l & 1) store(&splats[l].x + k, v[l]);
    }
  }
}

// Project LANES Gaussians; leave the ellipses of the visible ones in the chunk, at `at`.
void project_batch(const Frame& frame, const SceneArgs& scene, const ImageArgs& images, int64_t first, int count, int at,
                   Chunk& chunk) {
  prefetch_after(scene, first);
  GaussianBatch batch;
  load_batch(scene, first, count, batch);
  Footprint<F> fp;
  project_footprint(frame.camera, batch.mean, batch.H, fp);
  if (images.means2d_offset) {
    F offset[2];
    load_rows<2>(images.means2d_offset, first, count, offset);
    fp.mean_x = fp.mean_x + offset[0];
    fp.mean_y = fp.mean_y + offset[1];
  }
  if (frame.camera_args.antialiasing) batch.log2_opacity = batch.log2_opacity + log2_dimming(fp);
  const F level = F(2.0f * LN_2) * (batch.log2_opacity - F(LOG2_ALPHA_MIN));
  const F half_x = sqrt_of(level * fp.var_x), half_y = sqrt_of(level * fp.var_y);
  Mask seen = batch.healthy & seen_by(frame.camera, fp, level, half_x, half_y) & mask_of((2u << (count - 1)) - 1);

  F color[3];
  uint32_t visible = bits_of(seen);
  if (visible) {
    seen = seen & batch_colors(frame.camera, scene, batch, first, count, color);
    visible = bits_of(seen);
  }
  chunk.visible[at / LANES] = visible;
  const F radii = zero_unless(seen, (NativeF)radius_of(half_x, half_y).v), depths = zero_unless(seen, fp.z);
  store_first(reinterpret_cast<float*>(images.radii) + first, radii, count);
  store_first(reinterpret_cast<float*>(frame.depths.data()) + first, depths, count);
  if (!visible) return;

  const F zero(0.0f), aux = frame.camera_args.inverse_depth ? fp.inv_z : fp.z;
  const F fields[16] = {fp.mean_x, fp.mean_y, fp.s1, fp.s2, fp.s3, batch.log2_opacity, color[0], color[1],
                        color[2],  aux,       zero,   zero,   zero, zero, zero, zero};
  store_splats(frame.splats.data() + first, visible, fields);
  store_ellipses(chunk.ellipses, at, fp.mean_x, fp.mean_y, fp.s1, fp.s2, fp.s3, batch.log2_opacity);
  const I tiles = store_tile_ranges(chunk.ellipses, at, frame.tiles_x, frame.tiles_y, fp.mean_x, fp.mean_y, half_x, half_y);
  for (int l = 0; l < LANES; ++l) chunk.tiles += (visible >> l & 1) ? tiles.v[l] : 0;
}

// List the tiles of the chunk's Gaussians from `slot` on.
ChunkStats list_chunk(const Frame& frame, const Chunk& chunk, int64_t first, int count, uint32_t slot) {
  ChunkStats stats = {0, UINT32_MAX, 0};
  for (int i = 0; i < count; ++i) {
    SlotRange range = {slot, 0};
    uint32_t& depth = frame.depths[first + i];
    if (chunk.visible[i / LANES] >> i % LANES & 1) {
      range.count = list_tiles(chunk.ellipses, i, frame.tiles_x, frame.slot_tiles.data() + slot);
      slot += range.count;
    }
    frame.slot_ranges[first + i] = range;
    if (range.count) {
      ++stats.visible;
      stats.min_depth = std::min(stats.min_depth, depth);
      stats.max_depth = std::max(stats.max_depth, depth);
    } else {
      depth = 0;
    }
  }
  return stats;
}

}  // namespace

void project(Frame& frame, const SceneArgs& scene, const ImageArgs& images, int num_threads) {
  PhaseTimer timer(frame, PHASE_PROJECT);
  const int64_t n = scene.n, chunks = (n + CHUNK - 1) / CHUNK;
  frame.splats.reserve(n);
  frame.slot_ranges.reserve(n);
  frame.depths.reserve(n);
  frame.chunk_stats.reserve(chunks);
  frame.num_chunks = chunks;

  // A chunk takes as many slots as its bounding boxes have tiles, before it knows how many are touched. Where the slots of the last
  // frame do not suffice, all is done a second time: rare, and cheaper than to meet every Gaussian twice in every frame.
  std::atomic<int64_t> taken{0};
  for (;;) {
    const int64_t slots = frame.slot_tiles.capacity();
    taken = 0;
    parallel_for(chunks, num_threads, [&](int64_t index) {
      Chunk chunk;
      const int64_t first = index * CHUNK;
      const int count = static_cast<int>(std::min<int64_t>(CHUNK, n - first));
      for (int i = 0; i < count; i += LANES) {
        project_batch(frame, scene, images, first + i, std::min(LANES, count - i), i, chunk);
      }
      // One more than it needs: list_tiles may write one tile that it then drops.
      const int64_t slot = taken.fetch_add(chunk.tiles + 1, std::memory_order_relaxed);
      if (slot + chunk.tiles < slots) {
        frame.chunk_stats[index] = list_chunk(frame, chunk, first, count, static_cast<uint32_t>(slot));
      }
    });
    if (taken > UINT32_MAX) {
      throw std::length_error("the Gaussians cover more than 4 billion tiles together. Prune the largest, or render smaller images");
    }
    if (taken <= slots) break;
    frame.slot_tiles.reserve(taken);
  }
  frame.slots.reserve(taken);
}

}  // namespace s2d
