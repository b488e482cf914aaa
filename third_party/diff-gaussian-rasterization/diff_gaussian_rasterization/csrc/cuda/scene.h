// SPDX-License-Identifier: Apache-2.0
// The Gaussians as the kernels of the projection and of its adjoint read them. A warp has 32 consecutive Gaussians, one per lane.
//
// Rows of coefficients are many floats long; lanes that each walked their own row would touch 32 lines of memory at a time. So a warp
// moves the rows of its Gaussians as the one consecutive piece of memory that they are, through shared memory, where a lane reads its row
// without bank conflicts because rows are an odd number of floats apart.
#pragma once

#include "device.h"

namespace s2d {

constexpr int PROJECT_THREADS = 128, PROJECT_WARPS = PROJECT_THREADS / WARP;
constexpr int MAX_ROW = 3 * (SH_MAX_COEFFS - 1);  // floats of shN; odd

struct Scene {
  int num_coeffs, degree;
  bool activated;
  float scale_modifier;
  const float *means, *log_scales, *quats, *opacity_logits, *sh0, *shN, *colors, *covars;

  __device__ __forceinline__ int row_width() const { return 3 * (num_coeffs - 1); }
};

struct Gaussian {
  float mean[3], scale[3], quat[4], inv_norm, H[9];
  float log2_opacity, d_log2_opacity;
  bool healthy;
};

template <int WIDTH>
__device__ __forceinline__ bool load_row(const float* __restrict__ data, int64 row, float* out) {
  bool finite = true;
#pragma unroll
  for (int k = 0; k < WIDTH; ++k) {
    out[k] = data[WIDTH * row + k];
    finite = finite && is_finite(out[k]);
  }
  return finite;
}

__device__ __forceinline__ void load_gaussian(const Scene& scene, int64 index, Gaussian& out) {
  out.healthy = load_row<3>(scene.means, index, out.mean);
  if (scene.covars) {
    float covar[6];
    out.healthy = load_row<6>(scene.covars, index, covar) && out.healthy;
    half_of_covariance(covar, out.H);
  } else {
    float raw_scale[3], raw_quat[4];
    out.healthy = load_row<3>(scene.log_scales, index, raw_scale) && out.healthy;
    out.healthy = load_row<4>(scene.quats, index, raw_quat) && out.healthy;
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      out.scale[k] = (scene.activated ? raw_scale[k] : exp_of(raw_scale[k])) * scene.scale_modifier;
    }
    out.healthy = normalise_quat(raw_quat, out.quat, out.inv_norm) > 0.0f && out.healthy;
    half_of_rotation_and_scale(out.quat, out.scale, out.H);
  }
  float stored;
  out.healthy = load_row<1>(scene.opacity_logits, index, &stored) && out.healthy;
  if (scene.activated) out.healthy = out.healthy && stored > 0.0f;
  activate_opacity(stored, scene.activated, out.log2_opacity, out.d_log2_opacity);
}

// Which row and where in shared memory float i of a warp's rows belongs; i below 32 * MAX_ROW + 4.
struct RowLayout {
  int width, padding, inverse;

  __device__ __forceinline__ explicit RowLayout(int width_) : width(width_), padding(1 - width_ % 2), inverse((1 << 16) / width_ + 1) {}
  __device__ __forceinline__ int row(int i) const { return (i * inverse) >> 16; }
  __device__ __forceinline__ int slot(int i) const { return i + padding * row(i); }
  __device__ __forceinline__ int begin(int row) const { return row * (width + padding); }
};

// The rows of a warp's Gaussians in a tensor, on the way between global and shared memory: 16 bytes per lane and step, so that enough is
// on its way at any time. Rows begin at multiples of 16 bytes because a warp's first Gaussian is a multiple of 32.
struct WarpRows {
  int64 first;    // Gaussian of lane 0
  int count;      // of the rows that there are
  float* shared;  // room for 32 rows, on 16 bytes

  // vector(i) for every four floats from i = 0, 4, ..., scalar(i) for what is left. AHEAD: how many reads should be on their way at a time.
  template <int AHEAD, class Vector, class Scalar>
  __device__ __forceinline__ void for_each(int width, const Vector& vector, const Scalar& scalar) const {
    const int total = count * width;
#pragma unroll AHEAD
    for (int i = 4 * (threadIdx.x % WARP); i < total; i += 4 * WARP) {
      if (i + 4 <= total) {
        vector(i);
      } else {
        for (int k = i; k < total; ++k) scalar(k);
      }
    }
  }

  // Bring the rows of the lanes in `wanted`, and maybe some of their neighbours', to shared memory.
  __device__ __forceinline__ void stage(const float* __restrict__ tensor, RowLayout layout, unsigned wanted) const {
    const float* from = tensor + layout.width * first;
    for_each<4>(
        layout.width,
        [&](int i) {
          if (((wanted >> layout.row(i)) | (wanted >> layout.row(i + 3))) & 1) put_four(layout, i, *reinterpret_cast<const float4*>(from + i));
        },
        [&](int i) { shared[layout.slot(i)] = from[i]; });
    __syncwarp();
  }

  // The lanes' own values, a row each, to shared memory.
  template <int WIDTH>
  __device__ __forceinline__ void put(const float* values) const {
    __syncwarp();  // what was there is no longer needed
    const RowLayout layout(WIDTH);
#pragma unroll
    for (int k = 0; k < WIDTH; ++k) shared[layout.begin(threadIdx.x % WARP) + k] = values[k];
    __syncwarp();
  }

  // From shared memory to the tensor.
  __device__ __forceinline__ void write(float* __restrict__ tensor, RowLayout layout) const {
    float* to = tensor + layout.width * first;
    for_each<1>(
        layout.width, [&](int i) { *reinterpret_cast<float4*>(to + i) = four(layout, i); },
        [&](int i) { to[i] = shared[layout.slot(i)]; });
  }

  __device__ __forceinline__ float4 four(RowLayout layout, int i) const {
    if (layout.padding == 0) return *reinterpret_cast<const float4*>(shared + i);
    return make_float4(shared[layout.slot(i)], shared[layout.slot(i + 1)], shared[layout.slot(i + 2)], shared[layout.slot(i + 3)]);
  }
  __device__ __forceinline__ void put_four(RowLayout layout, int i, float4 values) const {
    if (layout.padding == 0) {
      *reinterpret_cast<float4*>(shared + i) = values;
    } else {
      shared[layout.slot(i)] = values.x, shared[layout.slot(i + 1)] = values.y;
      shared[layout.slot(i + 2)] = values.z, shared[layout.slot(i + 3)] = values.w;
    }
  }
};

__device__ __forceinline__ WarpRows warp_rows(int64 first, int64 n, float* shared) {
  const int64 left = n - first;
  return {first, static_cast<int>(left < 0 ? 0 : left < WARP ? left : WARP), shared};
}

// SH(direction) + 1/2. `coeffs` is the lane's row of shN. Returns whether all coefficients are finite, those beyond the degree in use
// included.
__device__ __forceinline__ bool sh_color(const Scene& scene, int64 index, const float* coeffs, const float* basis, float* color) {
  float sh0[3], poison = 0.0f;
  bool finite = load_row<3>(scene.sh0, index, sh0);
  for (int i = 0; i < 3; ++i) color[i] = sh0[i] * basis[0] + 0.5f;
  const int used = (scene.degree + 1) * (scene.degree + 1);
#pragma unroll
  for (int k = 1; k < SH_MAX_COEFFS; ++k) {
    if (k < scene.num_coeffs) {
      for (int i = 0; i < 3; ++i) {
        const float c = coeffs[3 * (k - 1) + i];
        poison += c * 0.0f;
        if (k < used) color[i] += c * basis[k];
      }
    }
  }
  return finite && is_finite(poison);
}

__device__ __forceinline__ Camera load_camera(const float* viewmat, const float* K, int width, int height) {
  return make_camera(viewmat, K[0], K[4], K[2], K[5], width, height);
}

}  // namespace s2d
