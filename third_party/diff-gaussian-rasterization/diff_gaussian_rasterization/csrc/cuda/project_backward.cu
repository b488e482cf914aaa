// SPDX-License-Identifier: Apache-2.0
// Phase 5: from the sums of each splat to the gradients of the raw parameters and of the cameras; or, in training without autograd, on to
// the new values of the parameters. One thread per Gaussian. Conventions and the order of launches: project.cu.
//
// project_backward                       grid ceil(N / 128), block 128, no dynamic shared memory
//   n, num_coeffs, degree, activated, scale_modifier, width, height, inverse_depth, antialiasing      as for project_forward
//   with_depth       int32   1: rasterize_backward_depth made the sums
//   num_cameras      int32   C
//   means, log_scales, quats, opacity_logits, sh0, shN, colors, covars, viewmats, Ks      as for project_forward
//   radii            int32 [C, N]
//   splat_grads      [C, N, 10]
//   d_means          out [N, 3]
//   d_log_scales     out [N, 3] or 0
//   d_quats          out [N, 4] or 0
//   d_opacity_logits out [N]
//   d_sh0            out [N, 1, 3] or 0
//   d_shN            out [N, K-1, 3] or 0
//   d_colors         out [N, 3] or 0
//   d_covars         out [N, 6] or 0
//   d_means2d        out [C, N, 2] or 0
//   camera_sums      in/out float64 [C, 19] or 0; zeros before the launch
// Gradients are summed over the cameras and written once, zeros included: nothing but camera_sums needs filling before. A gradient
// pointer may be 0 exactly where the parameter's own pointer is 0 (d_means2d: where nobody asks).
//
// project_update                         grid ceil(N / 128), block 128, no dynamic shared memory; one camera
//   n, num_coeffs, degree, width, height, with_depth      as above; not activated, scale_modifier 1, no inverse depth, no antialiasing
//   viewmat          [4, 4]
//   K                [3, 3]
//   radii            int32 [N]
//   splat_grads      [N, 10]
//   means, log_scales, quats, opacity_logits, sh0, shN          in/out as above, shN 0 where K = 1
//   then exp_avg of these six, then exp_avg_sq of these six     in/out, same shapes
//   rates            [6, 6] on the device: a row per tensor of lr, beta1, beta2, 1 - beta1, 1 - beta2, eps, each rounded from float64
//   drawn_logits     [N] what project_forward took for opacity_logits, or 0: these themselves
//   opacity_slope    [N] derivative of drawn_logits by opacity_logits; 0 exactly where drawn_logits is
//   opacity_penalty  float32; > 0: all rows are updated, else those with radii > 0
//   scale_x, scale_y float32 of the 2D gradients in the statistics
//   grad_sum         in/out [N] or 0
//   num_views        in/out [N] or 0
//   lengths          [1, N] that go to grad_sum instead of the lengths of the sums, or 0
//   camera_sums      in/out float64 [1, 19] or 0; zeros before the launch
//
// finish_cameras                         grid C, block 32, no dynamic shared memory
//   viewmats         [C, 4, 4]
//   camera_sums      float64 [C, 19]
//   d_viewmats       out [C, 4, 4]
//   d_intrinsics     out [C, 4]: by fx, fy, cx, cy
#include "adam.h"
#include "scene.h"

namespace s2d {

// The gradients of one Gaussian but for shN, whose row lies in shared memory.
struct Gradients {
  float mean[3], scale[3], quat[4], opacity, color[3], covar[6];  // color: of sh0, or of given colours
  float mean2d[2];
};

__device__ __forceinline__ float finite_or_zero(float value) { return is_finite(value) ? value : 0.0f; }

template <int WIDTH>
__device__ __forceinline__ void add(const float* values, float* to) {
#pragma unroll
  for (int k = 0; k < WIDTH; ++k) to[k] += finite_or_zero(values[k]);
}

// Colour gradients. `coeffs` and `d_coeffs` are the lane's rows of shN and of its gradient, which may be the same; the gradient is added to
// what `accumulate` says is there.
__device__ __forceinline__ void sh_adjoint(const Camera& camera, const Scene& scene, int64 index, const float* mean,
                                           const float* coeffs, float* d_coeffs, bool accumulate, const float* d_rgb,
                                           Gradients& out, float* d_mean, float* d_center) {
  float dir[3], inv_distance, basis[SH_MAX_COEFFS], color[3], d_color[3], weights[SH_MAX_COEFFS];
  view_direction(camera, mean, dir, inv_distance);
  sh_basis(scene.degree, dir[0], dir[1], dir[2], basis);
  sh_color(scene, index, coeffs, basis, color);
  for (int i = 0; i < 3; ++i) d_color[i] = color[i] > 0.0f ? d_rgb[i] : 0.0f;  // elsewhere it was clamped
  const int used = (scene.degree + 1) * (scene.degree + 1);
#pragma unroll
  for (int k = 1; k < SH_MAX_COEFFS; ++k) {
    weights[k] = 0.0f;
    if (k < scene.num_coeffs) {
      for (int i = 0; i < 3; ++i) {
        const int at = 3 * (k - 1) + i;
        if (k < used) weights[k] += coeffs[at] * d_color[i];
        const float value = k < used ? finite_or_zero(d_color[i] * basis[k]) : 0.0f;
        d_coeffs[at] = accumulate ? d_coeffs[at] + value : value;
      }
    }
  }
  for (int i = 0; i < 3; ++i) out.color[i] += finite_or_zero(d_color[i] * basis[0]);
  if (scene.degree == 0) return;
  float d_dir[3];
  sh_direction_gradient(scene.degree, dir[0], dir[1], dir[2], weights, d_dir);
  direction_adjoint(dir, inv_distance, d_dir, d_mean, d_center);
}

// Add the gradients through one camera; `camera_grads` becomes this Gaussian's part of the camera's sums.
__device__ __forceinline__ void add_view(const Camera& camera, const Scene& scene, int64 index, const Gaussian& gaussian,
                                         const float* __restrict__ splat_grads, bool inverse_depth, bool antialiasing, bool with_depth,
                                         const float* coeffs, float* d_coeffs, bool accumulate, Gradients& out,
                                         float* camera_grads) {
  float sums[NUM_SUMS], d_mean[3], d_H[9];
#pragma unroll
  for (int k = 0; k < NUM_SUMS; k += 2) {
    const float2 pair = *reinterpret_cast<const float2*>(splat_grads + k);
    sums[k] = pair.x, sums[k + 1] = pair.y;
  }
  Footprint<float> fp;
  FootprintGrad<float> grad;
  project_footprint(camera, gaussian.mean, gaussian.H, fp);
  footprint_gradient(fp, sums, antialiasing, with_depth, inverse_depth, grad);
  footprint_adjoint(camera, gaussian.mean, gaussian.H, fp, grad, d_mean, d_H, camera_grads, camera_grads + 9);
  for (int k = 12; k < 15; ++k) camera_grads[k] = 0.0f;
  if (scene.colors) {
    add<3>(sums + SUM_R, out.color);
  } else {
    sh_adjoint(camera, scene, index, gaussian.mean, coeffs, d_coeffs, accumulate, sums + SUM_R, out, d_mean, camera_grads + 12);
  }
  add<3>(d_mean, out.mean);
  out.opacity += finite_or_zero(LN_2 * gaussian.d_log2_opacity * sums[SUM_G]);
  out.mean2d[0] = finite_or_zero(grad.mean_x), out.mean2d[1] = finite_or_zero(grad.mean_y);
  if (scene.covars) {
    float d_covar[6];
    covariance_adjoint(fp, grad, d_covar);
    add<6>(d_covar, out.covar);
  } else {
    float by_stored[3], d_R[9], d_scale[3], d_quat[4];
    for (int k = 0; k < 3; ++k) by_stored[k] = scene.activated ? scene.scale_modifier : gaussian.scale[k];
    half_adjoint(gaussian.quat, gaussian.scale, by_stored, d_H, d_scale, d_R);
    rotation_adjoint(gaussian.quat, gaussian.inv_norm, d_R, d_quat);
    add<3>(d_scale, out.scale);
    add<4>(d_quat, out.quat);
  }
  intrinsics_adjoint(camera, gaussian.H, fp, grad, camera_grads + 15);
}

// Add a block's parts to a camera's sums: float32 in a warp, float64 above. Called by all threads.
__device__ __forceinline__ void add_camera_sums(const float* mine, bool visible, double* __restrict__ sums) {
  __shared__ float partial[PROJECT_WARPS][CAMERA_SUMS];
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
  for (int k = 0; k < CAMERA_SUMS; ++k) {
    float value = visible ? finite_or_zero(mine[k]) : 0.0f;
    for (int step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(FULL_WARP, value, step);
    if (lane == 0) partial[warp][k] = value;
  }
  __syncthreads();
  if (threadIdx.x < CAMERA_SUMS) {
    double total = 0.0;
    for (int w = 0; w < PROJECT_WARPS; ++w) total += partial[w][threadIdx.x];
    if (total != 0.0) atomicAdd(sums + threadIdx.x, total);
  }
  __syncthreads();
}

template <int WIDTH>
__device__ __forceinline__ void write_values(const WarpRows& rows, const float* values, float* __restrict__ tensor) {
  if (!tensor) return;
  rows.put<WIDTH>(values);
  rows.write(tensor, RowLayout(WIDTH));
}

// A tensor under Adam: its pointers, and its row of the rates.
struct Updated {
  float *param, *m, *v;
  const float* rates;
};

// Update the rows in `updated` with the gradients in shared memory.
__device__ __forceinline__ void update_rows(const WarpRows& rows, RowLayout layout, unsigned updated, const Updated& t) {
  const AdamRates rates = {t.rates[0], t.rates[1], t.rates[2], t.rates[3], t.rates[4], t.rates[5]};
  const int64 begin = layout.width * rows.first;
  float *const param = t.param + begin, *const m = t.m + begin, *const v = t.v + begin;
  rows.for_each<1>(
      layout.width,
      [&](int i) {
        unsigned seen = 0;
        for (int k = 0; k < 4; ++k) seen |= (updated >> layout.row(i + k) & 1) << k;
        adam_four(rates, seen, rows.four(layout, i), param + i, m + i, v + i);
      },
      [&](int i) {
        if (updated >> layout.row(i) & 1) adam(rates, rows.shared[layout.slot(i)], param[i], m[i], v[i]);
      });
}

template <int WIDTH>
__device__ __forceinline__ void update_values(const WarpRows& rows, const float* values, unsigned updated, const Updated& t) {
  rows.put<WIDTH>(values);
  update_rows(rows, RowLayout(WIDTH), updated, t);
}

__device__ __forceinline__ void add_statistics(const Gradients& grads, int64 index, float scale_x, float scale_y,
                                               const float* __restrict__ lengths, float* __restrict__ grad_sum,
                                               float* __restrict__ num_views) {
  const float x = scale_x * grads.mean2d[0], y = scale_y * grads.mean2d[1];
  grad_sum[index] += lengths ? finite_or_zero(lengths[index]) : sqrtf(x * x + y * y);
  num_views[index] += 1.0f;
}

}  // namespace s2d

extern "C" __global__ void __launch_bounds__(128) project_backward(
    long long n, int num_coeffs, int degree, int activated, float scale_modifier, int width, int height, int inverse_depth,
    int antialiasing, int with_depth, int num_cameras, const float* __restrict__ means, const float* __restrict__ log_scales,
    const float* __restrict__ quats, const float* __restrict__ opacity_logits, const float* __restrict__ sh0,
    const float* __restrict__ shN, const float* __restrict__ colors, const float* __restrict__ covars,
    const float* __restrict__ viewmats, const float* __restrict__ Ks, const int* __restrict__ radii,
    const float* __restrict__ splat_grads, float* __restrict__ d_means, float* __restrict__ d_log_scales,
    float* __restrict__ d_quats, float* __restrict__ d_opacity_logits, float* __restrict__ d_sh0, float* __restrict__ d_shN,
    float* __restrict__ d_colors, float* __restrict__ d_covars, float* __restrict__ d_means2d,
    double* __restrict__ camera_sums) {
  using namespace s2d;
  __shared__ Camera camera;
  __shared__ __align__(16) float coeffs[PROJECT_WARPS][WARP * MAX_ROW], d_coeffs[PROJECT_WARPS][WARP * MAX_ROW];
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int64 index = static_cast<int64>(blockIdx.x) * PROJECT_THREADS + threadIdx.x, first = index - lane;
  const Scene scene = {num_coeffs, degree, activated != 0, scale_modifier, means, log_scales, quats, opacity_logits, sh0, shN,
                       colors, covars};
  const bool has_rows = shN && num_coeffs > 1;
  const RowLayout layout(has_rows ? scene.row_width() : 1);
  float *my_coeffs = coeffs[warp] + layout.begin(lane), *my_d_coeffs = d_coeffs[warp] + layout.begin(lane);

  Gaussian gaussian;
  Gradients grads = {};
  bool loaded = false;
  for (int view = 0; view < num_cameras; ++view) {
    __syncthreads();
    if (threadIdx.x == 0) camera = load_camera(viewmats + 16 * view, Ks + 9 * view, width, height);
    __syncthreads();
    const int64 row = view * n + index;
    const bool visible = index < n && radii[row] > 0;
    const unsigned fresh = __ballot_sync(FULL_WARP, visible && !loaded);
    if (has_rows && fresh) warp_rows(first, n, coeffs[warp]).stage(shN, layout, fresh);
    float camera_grads[CAMERA_SUMS];
    grads.mean2d[0] = grads.mean2d[1] = 0.0f;
    if (visible) {
      if (!loaded) load_gaussian(scene, index, gaussian);
      add_view(camera, scene, index, gaussian, splat_grads + NUM_SUMS * row, inverse_depth, antialiasing, with_depth, my_coeffs,
               my_d_coeffs, loaded, grads, camera_grads);
      loaded = true;
    }
    if (d_means2d && index < n) {
      *reinterpret_cast<float2*>(d_means2d + 2 * row) = make_float2(grads.mean2d[0], grads.mean2d[1]);
    }
    if (camera_sums) add_camera_sums(camera_grads, visible, camera_sums + CAMERA_SUMS * view);
  }

  const WarpRows rows = warp_rows(first, n, d_coeffs[warp]);
  if (has_rows) {
    if (!loaded) {
      for (int k = 0; k < layout.width; ++k) my_d_coeffs[k] = 0.0f;
    }
    __syncwarp();
    rows.write(d_shN, layout);
  }
  write_values<3>(rows, grads.mean, d_means);
  write_values<3>(rows, grads.scale, d_log_scales);
  write_values<4>(rows, grads.quat, d_quats);
  write_values<3>(rows, grads.color, colors ? d_colors : d_sh0);
  write_values<6>(rows, grads.covar, d_covars);
  if (index < n) d_opacity_logits[index] = grads.opacity;
}

extern "C" __global__ void __launch_bounds__(128) project_update(
    long long n, int num_coeffs, int degree, int width, int height, int with_depth, const float* __restrict__ viewmat,
    const float* __restrict__ K, const int* __restrict__ radii, const float* __restrict__ splat_grads, float* means,
    float* log_scales, float* quats, float* opacity_logits, float* sh0, float* shN, float* m_means, float* m_log_scales,
    float* m_quats, float* m_opacity_logits, float* m_sh0, float* m_shN, float* v_means, float* v_log_scales, float* v_quats,
    float* v_opacity_logits, float* v_sh0, float* v_shN, const float* __restrict__ rates, const float* __restrict__ drawn_logits,
    const float* __restrict__ opacity_slope, float opacity_penalty, float scale_x, float scale_y, float* __restrict__ grad_sum,
    float* __restrict__ num_views, const float* __restrict__ lengths, double* __restrict__ camera_sums) {
  using namespace s2d;
  __shared__ Camera camera;
  __shared__ __align__(16) float coeffs[PROJECT_WARPS][WARP * MAX_ROW];
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int64 index = static_cast<int64>(blockIdx.x) * PROJECT_THREADS + threadIdx.x, first = index - lane;
  const Scene scene = {num_coeffs, degree, false, 1.0f, means, log_scales, quats, drawn_logits ? drawn_logits : opacity_logits, sh0,
                       shN, nullptr, nullptr};
  const bool has_rows = num_coeffs > 1;
  const RowLayout layout(has_rows ? scene.row_width() : 1);
  float* my_coeffs = coeffs[warp] + layout.begin(lane);
  if (threadIdx.x == 0) camera = load_camera(viewmat, K, width, height);
  __syncthreads();

  const bool visible = index < n && radii[index] > 0;
  const unsigned wanted = __ballot_sync(FULL_WARP, visible);
  const WarpRows rows = warp_rows(first, n, coeffs[warp]);
  if (has_rows && wanted) rows.stage(shN, layout, wanted);
  Gradients grads = {};
  float camera_grads[CAMERA_SUMS];
  if (visible) {
    Gaussian gaussian;
    load_gaussian(scene, index, gaussian);
    add_view(camera, scene, index, gaussian, splat_grads + NUM_SUMS * index, false, false, with_depth, my_coeffs, my_coeffs, false,
             grads, camera_grads);
    if (opacity_slope) grads.opacity = finite_or_zero(opacity_slope[index] * grads.opacity);
    if (grad_sum) add_statistics(grads, index, scale_x, scale_y, lengths, grad_sum, num_views);
  } else if (has_rows && opacity_penalty > 0.0f) {
    for (int k = 0; k < layout.width; ++k) my_coeffs[k] = 0.0f;
  }
  if (camera_sums) add_camera_sums(camera_grads, visible, camera_sums);
  if (opacity_penalty > 0.0f && index < n) {
    const float opacity = 1.0f / (1.0f + expf(-opacity_logits[index]));
    grads.opacity += finite_or_zero(opacity_penalty / static_cast<float>(n) * opacity * (1.0f - opacity));
  }

  const unsigned updated = opacity_penalty > 0.0f ? FULL_WARP : wanted;
  if (!updated) return;  // the whole warp, behind the last barrier of the block
  if (has_rows) {
    __syncwarp();
    update_rows(rows, layout, updated, {shN, m_shN, v_shN, rates + 30});
  }
  update_values<3>(rows, grads.mean, updated, {means, m_means, v_means, rates});
  update_values<3>(rows, grads.scale, updated, {log_scales, m_log_scales, v_log_scales, rates + 6});
  update_values<4>(rows, grads.quat, updated, {quats, m_quats, v_quats, rates + 12});
  update_values<1>(rows, &grads.opacity, updated, {opacity_logits, m_opacity_logits, v_opacity_logits, rates + 18});
  update_values<3>(rows, grads.color, updated, {sh0, m_sh0, v_sh0, rates + 24});
}

extern "C" __global__ void __launch_bounds__(32) finish_cameras(const float* __restrict__ viewmats,
                                                                const double* __restrict__ camera_sums,
                                                                float* __restrict__ d_viewmats, float* __restrict__ d_intrinsics) {
  using namespace s2d;
  if (threadIdx.x != 0) return;
  const int view = blockIdx.x;
  const double* sums = camera_sums + CAMERA_SUMS * view;
  const Camera camera = make_camera(viewmats + 16 * view, 1.0f, 1.0f, 0.0f, 0.0f, 1, 1);  // W and t are all that is asked of it
  viewmat_gradient(camera, sums, d_viewmats + 16 * view);
  for (int k = 0; k < 4; ++k) d_intrinsics[4 * view + k] = static_cast<float>(sums[15 + k]);
}
