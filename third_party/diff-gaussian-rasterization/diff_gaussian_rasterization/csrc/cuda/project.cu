// SPDX-License-Identifier: Apache-2.0
// Phase 1: Gaussians -> Splat records, and how many tiles each touches. One thread per (camera, Gaussian).
//
// All tensors are contiguous float32 on the device unless said otherwise; "or 0" marks pointers that may be null. C cameras, N Gaussians,
// K stored SH coefficients per channel, tiles of 16 x 16 pixels: tiles_x = ceil(width / 16), tiles_y = ceil(height / 16).
//
// A render is these launches in this order; lines with "torch" are what torch does between them.
//
//   project_forward                                                                                    project.cu
//   torch   order = depth_keys.sort(dim=1, stable=True).indices                      int64 [C, N]
//   torch   ends = tile_counts.gather(1, order).flatten().cumsum(0, int64)           int64 [C * N]
//   torch   I = int(ends[-1]): the one wait for the device; it sizes what follows (no Gaussians: I = 0)
//   emit_instances_16 where C * tiles_x * tiles_y <= 32767, else emit_instances_32; not where I = 0    bin.cu
//   torch   tiles, permutation = tiles.sort(stable=True)                             int16 or int32 [I], int64 [I]
//   tile_ranges_16 / _32 (also where I = 0)                                                            bin.cu
//   rasterize_forward                                                                                  rasterize.cu
//   rasterize_backward, or rasterize_backward_depth where depth has a gradient                         rasterize_backward.cu
//   project_backward (autograd), or project_update (training without autograd, C = 1)                  project_backward.cu
//   finish_cameras, where a camera wants a gradient                                                    project_backward.cu
//
// project_forward                        grid (ceil(N / 128), C), block 128, no dynamic shared memory; not launched where N or C is 0
//   n                int64   N
//   num_coeffs       int32   K: 1, 4, 9 or 16
//   degree           int32   SH degree in use
//   activated        int32   1: log_scales holds scales, opacity_logits opacities
//   scale_modifier   float32
//   width, height    int32   pixels
//   inverse_depth    int32   1: the depth image is sum w / z
//   antialiasing     int32   1: opacity times sqrt(det / det blurred)
//   means            [N, 3]
//   log_scales       [N, 3] or 0 (with covars)
//   quats            [N, 4] or 0 (with covars)
//   opacity_logits   [N]
//   sh0              [N, 1, 3] or 0 (with colors)
//   shN              [N, K-1, 3] or 0 (with colors, or K = 1)
//   colors           [N, 3] or 0: instead of SH
//   covars           [N, 6] or 0: instead of scales and rotations
//   viewmats         [C, 4, 4]
//   Ks               [C, 3, 3]
//   means2d_offset   [C, N, 2] or 0: added to the projected means
//   splats           out [C, N, 12]; only records of visible Gaussians are written
//   depth_keys       out int32 [C, N]: the bits of z, INT32_MAX where nothing is drawn
//   tile_counts      out int32 [C, N]
//   radii            out int32 [C, N]
#include "ellipse.h"
#include "scene.h"

namespace s2d {

// A sum of rounded products together with what was rounded off.
struct Compensated {
  float value, lost;

  __device__ __forceinline__ void add(float a) {
    const float sum = __fadd_rn(value, a), part = __fadd_rn(sum, -value);
    lost += __fadd_rn(__fadd_rn(value, -__fadd_rn(sum, -part)), __fadd_rn(a, -part));
    value = sum;
  }
  __device__ __forceinline__ void add_product(float a, float b) {
    const float product = __fmul_rn(a, b);
    lost += __fmaf_rn(a, b, -product);
    add(product);
  }
};

// The centre's place in the image, rounded once. In plain float32 it is off by up to 5e-5 pixels on real scenes, because the terms of W x + t
// cancel; gradients that sum over all Gaussians, such as those of a camera, lose most of their digits there and nowhere else.
__device__ __forceinline__ void place_centre(const Camera& camera, const float* mean, Footprint<float>& fp) {
  Compensated cam[3];
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    cam[i] = {camera.t[i], 0.0f};
    for (int k = 0; k < 3; ++k) cam[i].add_product(camera.W[3 * i + k], mean[k]);
  }
  const float focal[2] = {camera.fx, camera.fy}, centre[2] = {camera.cx, camera.cy};
  float place[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float ratio = __fdiv_rn(cam[i].value, cam[2].value);
    const float rest = __fmaf_rn(-ratio, cam[2].value, cam[i].value) + __fmaf_rn(-ratio, cam[2].lost, cam[i].lost);
    Compensated at = {centre[i], focal[i] * (rest * fp.inv_z)};
    at.add_product(focal[i], ratio);
    place[i] = at.value + at.lost;
  }
  fp.mean_x = place[0], fp.mean_y = place[1];
}

struct Bounds {
  float half_x, half_y;
};

// Whether anything is seen of the ellipse d^T conic d = level, alpha = ALPHA_MIN.
__device__ __forceinline__ bool is_seen(const Camera& camera, const Footprint<float>& fp, float level, const Bounds& bounds) {
  const float values[] = {bounds.half_x, bounds.half_y, fp.mean_x, fp.mean_y, fp.s1, fp.s2, fp.s3, fp.z, fp.det};
  bool seen = fp.z > NEAR && level > 0.0f && fp.det > 0.0f;
#pragma unroll
  for (float value : values) seen = seen && is_finite(value);
  seen = seen && fp.mean_x + bounds.half_x > 0.0f && fp.mean_x - bounds.half_x < static_cast<float>(camera.width);
  return seen && fp.mean_y + bounds.half_y > 0.0f && fp.mean_y - bounds.half_y < static_cast<float>(camera.height);
}

__device__ __forceinline__ int radius_of(const Bounds& bounds) {
  constexpr float largest = 2147483520.0f;  // below 2^31
  const float radius = fmaxf(bounds.half_x, bounds.half_y);
  return radius < largest ? static_cast<int>(ceilf(radius)) : NOT_DRAWN;
}

__device__ __forceinline__ int count_tiles(const Ellipse& ellipse, int width, int height) {
  const int tiles_x = (width + TILE - 1) / TILE, tiles_y = (height + TILE - 1) / TILE;
  const TileRows rows = tile_rows(ellipse, tiles_y);
  int count = 0;
  for (int row = rows.begin; row < rows.end; ++row) {
    const TileColumns columns = tile_columns(ellipse, row, tiles_x);
    count += columns.end - columns.begin;
  }
  return count;
}

}  // namespace s2d

extern "C" __global__ void __launch_bounds__(128, 6) project_forward(
    long long n, int num_coeffs, int degree, int activated, float scale_modifier, int width, int height, int inverse_depth,
    int antialiasing, const float* __restrict__ means, const float* __restrict__ log_scales, const float* __restrict__ quats,
    const float* __restrict__ opacity_logits, const float* __restrict__ sh0, const float* __restrict__ shN,
    const float* __restrict__ colors, const float* __restrict__ covars, const float* __restrict__ viewmats,
    const float* __restrict__ Ks, const float* __restrict__ means2d_offset, float* __restrict__ splats,
    int* __restrict__ depth_keys, int* __restrict__ tile_counts, int* __restrict__ radii) {
  using namespace s2d;
  __shared__ Camera camera;
  __shared__ __align__(16) float staged[PROJECT_WARPS][WARP * MAX_ROW];
  const int view = blockIdx.y, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int64 index = static_cast<int64>(blockIdx.x) * PROJECT_THREADS + threadIdx.x, row = view * n + index;
  const Scene scene = {num_coeffs, degree, activated != 0, scale_modifier, means, log_scales, quats, opacity_logits, sh0, shN,
                       colors, covars};
  if (threadIdx.x == 0) camera = load_camera(viewmats + 16 * view, Ks + 9 * view, width, height);
  __syncthreads();

  Gaussian gaussian;
  Footprint<float> fp;
  Bounds bounds = {0.0f, 0.0f};
  bool seen = false;
  if (index < n) {
    load_gaussian(scene, index, gaussian);
    project_footprint(camera, gaussian.mean, gaussian.H, fp);
    place_centre(camera, gaussian.mean, fp);
    if (means2d_offset) {
      fp.mean_x += means2d_offset[2 * row];
      fp.mean_y += means2d_offset[2 * row + 1];
    }
    if (antialiasing) gaussian.log2_opacity += log2_dimming(fp);
    const float level = 2.0f * LN_2 * (gaussian.log2_opacity - LOG2_ALPHA_MIN);
    bounds = {sqrtf(level * fp.var_x), sqrtf(level * fp.var_y)};
    seen = gaussian.healthy && is_seen(camera, fp, level, bounds);
  }

  const unsigned wanted = __ballot_sync(FULL_WARP, seen);
  float color[3] = {0.0f, 0.0f, 0.0f};
  if (wanted && colors) {
    if (seen) seen = load_row<3>(colors, index, color);
  } else if (wanted) {
    const RowLayout layout(num_coeffs > 1 ? scene.row_width() : 1);
    if (num_coeffs > 1) warp_rows(index - lane, n, staged[warp]).stage(shN, layout, wanted);
    if (seen) {
      float dir[3], inv_distance, basis[SH_MAX_COEFFS];
      view_direction(camera, gaussian.mean, dir, inv_distance);
      sh_basis(degree, dir[0], dir[1], dir[2], basis);
      seen = sh_color(scene, index, staged[warp] + layout.begin(lane), basis, color);
      for (int k = 0; k < 3; ++k) {
        seen = seen && is_finite(color[k]);
        color[k] = fmaxf(color[k], 0.0f);
      }
    }
  }

  int count = 0;
  if (seen) {
    count = count_tiles(make_ellipse<true>(fp.mean_x, fp.mean_y, fp.s1, fp.s2, fp.s3, gaussian.log2_opacity), width, height);
    float4* record = reinterpret_cast<float4*>(splats + SPLAT_WIDTH * row);
    record[0] = make_float4(fp.mean_x, fp.mean_y, fp.s1, fp.s2);
    record[1] = make_float4(fp.s3, gaussian.log2_opacity, color[0], color[1]);
    *reinterpret_cast<float2*>(record + 2) = make_float2(color[2], inverse_depth ? fp.inv_z : fp.z);
  }
  if (index < n) {
    depth_keys[row] = count ? __float_as_int(fp.z) : NOT_DRAWN;
    tile_counts[row] = count;
    radii[row] = seen ? radius_of(bounds) : 0;
  }
}
