// SPDX-License-Identifier: Apache-2.0
// Phase 5: sum the slots of each Gaussian, in tile order, and carry the sums back to its raw parameters and to the camera.
#include <algorithm>

#include "parallel.h"

#include "gaussian_batch.h"

namespace s2d {
namespace {

constexpr int64_t CHUNK = 512;  // Gaussians per task; also the unit of the camera's partial sums, so it is independent of threads
constexpr int CAMERA_SUMS = 15;  // dW[9], dt[3], d centre[3]

// Write rows of WIDTH values for the Gaussians [first, first + count); rows not in `visible` and values that are not finite
// become zero.
template <int WIDTH>
S2D_INLINE void write_rows(float* data, int64_t first, int count, uint32_t visible, const F* values, bool accumulate) {
  if (!data) return;
  alignas(64) float columns[WIDTH][LANES];
  for (int k = 0; k < WIDTH; ++k) store(columns[k], zero_unless(is_finite(values[k]), values[k]));
  for (int l = 0; l < count; ++l) {
    float* row = data + (first + l) * WIDTH;
    const bool seen = visible >> l & 1;
    for (int k = 0; k < WIDTH; ++k) {
      const float value = seen ? columns[k][l] : 0.0f;
      row[k] = accumulate ? row[k] + value : value;
    }
  }
}

void clear_rows(float* data, int width, int64_t first, int64_t count, bool accumulate) {
  if (data && !accumulate) std::fill_n(data + first * width, count * width, 0.0f);
}

struct BatchSums {
  alignas(64) float sums[16][LANES];
};

constexpr int SLOTS_AHEAD = 24;  // the slots were last written by other tiles, maybe on another core

// Sum the slots of Gaussian g into column l.
S2D_INLINE void sum_slots(const Frame& frame, int64_t g, int l, BatchSums& out) {
  alignas(64) float total[16] = {};
  const Slot* slot = frame.slots.data() + frame.slot_begin[g];
  for (uint32_t k = 0; k < frame.slot_count[g]; ++k) {
    __builtin_prefetch(&slot[k + SLOTS_AHEAD]);
    for (int i = 0; i < 16; ++i) total[i] += slot[k].sums[i];
  }
  for (int i = 0; i < NUM_SUMS; ++i) out.sums[i][l] = total[i];
}

// Gradients of the SH coefficients of Gaussian g; leaves the derivative of the loss by each basis function in `by_basis`.
void sh_backward(const SceneArgs& scene, const GradientArgs& gradients, int64_t g, Float4 d_color, const float* basis,
                 float* by_basis) {
  const int rest = scene.num_coeffs - 1, used = (scene.degree + 1) * (scene.degree + 1) - 1;
  const auto add = [&](float* target, Float4 value) {
    for (int c = 0; c < 3; ++c) target[c] = gradients.accumulate ? target[c] + value[c] : value[c];
  };
  add(gradients.sh0 + 3 * g, d_color * basis[0]);
  const float* c = scene.shN + 3 * rest * g;
  float* grad = gradients.shN + 3 * rest * g;
  for (int k = 0; k < used; ++k) {
    add(grad + 3 * k, d_color * basis[(k + 1) * LANES]);
    by_basis[(k + 1) * LANES] = c[3 * k] * d_color[0] + c[3 * k + 1] * d_color[1] + c[3 * k + 2] * d_color[2];
  }
  if (!gradients.accumulate) std::fill(grad + 3 * used, grad + 3 * rest, 0.0f);
}

// Colour gradients of a batch; adds what passes through the view direction to d_mean and to the camera centre.
void color_backward(const Frame& frame, const SceneArgs& scene, const GradientArgs& gradients, int64_t first, int count,
                    uint32_t visible, const GaussianBatch& batch, const BatchSums& sums, F* d_mean, F* d_center) {
  F dir[3], inv_distance, basis_values[SH_MAX_COEFFS];
  view_direction(frame.camera, batch.mean, dir, inv_distance);
  sh_basis(scene.degree, dir[0], dir[1], dir[2], basis_values);
  const int used = (scene.degree + 1) * (scene.degree + 1), rest = scene.num_coeffs - 1;
  alignas(64) float basis[SH_MAX_COEFFS * LANES], by_basis[SH_MAX_COEFFS * LANES] = {};
  for (int k = 0; k < used; ++k) store(basis + k * LANES, basis_values[k]);
  for (int l = 0; l < count; ++l) {
    const int64_t g = first + l;
    if (!(visible >> l & 1)) {
      clear_rows(gradients.sh0, 3, g, 1, gradients.accumulate);
      clear_rows(gradients.shN, 3 * rest, g, 1, gradients.accumulate);
      continue;
    }
    Float4 d_color{sums.sums[SUM_R][l], sums.sums[SUM_GREEN][l], sums.sums[SUM_B][l], 0.0f};
    for (int c = 0; c < 3; ++c) {
      if (!(frame.splats[g].rgb[c] > 0.0f)) d_color[c] = 0.0f;  // the colour was clamped
    }
    sh_backward(scene, gradients, g, d_color, basis + l, by_basis + l);
  }
  if (scene.degree == 0) return;
  F weights[SH_MAX_COEFFS], d_dir[3];
  for (int k = 0; k < used; ++k) weights[k] = load(by_basis + k * LANES);
  sh_direction_gradient(scene.degree, dir[0], dir[1], dir[2], weights, d_dir);
  const F radial = d_dir[0] * dir[0] + d_dir[1] * dir[1] + d_dir[2] * dir[2];  // normalisation removes it
  for (int k = 0; k < 3; ++k) {
    const F d_offset = (d_dir[k] - radial * dir[k]) * inv_distance;
    d_mean[k] = d_mean[k] + d_offset;
    d_center[k] = F(0.0f) - d_offset;
  }
}

void backward_batch(const Frame& frame, const SceneArgs& scene, const GradientArgs& gradients, bool with_depth, int64_t first,
                    int count, uint32_t visible, double* camera_sums) {
  BatchSums sums = {};
  for (int l = 0; l < count; ++l) {
    if (visible >> l & 1) sum_slots(frame, first + l, l, sums);
  }
  GaussianBatch batch;
  load_batch(scene, first, count, batch);
  Footprint<F> fp;
  project_footprint(frame.camera, batch.mean, batch.H, fp);
  const auto sum = [&](int i) { return load(sums.sums[i]); };

  // y = conic d in terms of the whitened (u, v): y = (s1 u, s2 u + s3 v) / WHITEN^2.
  constexpr float K = 1.0f / (WHITEN * WHITEN);
  FootprintGrad<F> grad;
  grad.mean_x = F(K) * fp.s1 * sum(SUM_GU);
  grad.mean_y = F(K) * (fp.s2 * sum(SUM_GU) + fp.s3 * sum(SUM_GV));
  const F guu = sum(SUM_GUU), guv = sum(SUM_GUV), gvv = sum(SUM_GVV), half_k2(0.5f * K * K);
  grad.var_x = half_k2 * fp.s1 * fp.s1 * guu;
  grad.cov_xy = half_k2 * fp.s1 * (fp.s2 * guu + fp.s3 * guv);
  grad.var_y = half_k2 * (fp.s2 * fp.s2 * guu + F(2.0f) * fp.s2 * fp.s3 * guv + fp.s3 * fp.s3 * gvv);
  for (F& value : grad.M) value = F(0.0f);
  if (frame.camera_args.antialiasing) dimming_adjoint(fp, sum(SUM_G), grad);
  grad.z = F(0.0f);
  if (with_depth) {
    grad.z = sum(SUM_AUX);
    if (frame.camera_args.inverse_depth) grad.z = F(0.0f) - grad.z * fp.inv_z * fp.inv_z;
  }

  F d_mean[3], d_H[9], camera[CAMERA_SUMS];
  footprint_adjoint(frame.camera, batch.mean, batch.H, fp, grad, d_mean, d_H, camera, camera + 9);
  for (int k = 12; k < CAMERA_SUMS; ++k) camera[k] = F(0.0f);
  const bool add = gradients.accumulate;
  if (scene.colors) {
    const F d_color[3] = {sum(SUM_R), sum(SUM_GREEN), sum(SUM_B)};
    write_rows<3>(gradients.colors, first, count, visible, d_color, add);
  } else {
    color_backward(frame, scene, gradients, first, count, visible, batch, sums, d_mean, camera + 12);
  }
  write_rows<3>(gradients.means, first, count, visible, d_mean, add);
  const F d_opacity = F(LN_2) * batch.d_log2_opacity * sum(SUM_G);
  write_rows<1>(gradients.opacity_logits, first, count, visible, &d_opacity, add);
  const F d_pixel[2] = {grad.mean_x, grad.mean_y};
  write_rows<2>(gradients.means2d, first, count, visible, d_pixel, false);

  if (scene.covars) {
    // Sigma enters through M M^T = A Sigma A^T only: its gradient is A^T grad A, off-diagonal entries counted twice.
    const auto entry = [&](int i, int j) {
      const F *x = fp.A, *y = fp.A + 3;
      return grad.var_x * x[i] * x[j] + grad.cov_xy * (x[i] * y[j] + y[i] * x[j]) + grad.var_y * y[i] * y[j];
    };
    const F two(2.0f);
    const F d_covar[6] = {entry(0, 0), two * entry(0, 1), two * entry(0, 2), entry(1, 1), two * entry(1, 2), entry(2, 2)};
    write_rows<6>(gradients.covars, first, count, visible, d_covar, add);
  } else {
    F R[9], d_R[9], d_scale[3], d_quat[4];
    rotation_from_unit_quat(batch.quat, R);
    for (int k = 0; k < 3; ++k) {
      const F by_scale = R[k] * d_H[k] + R[3 + k] * d_H[3 + k] + R[6 + k] * d_H[6 + k];
      d_scale[k] = by_scale * (scene.activated ? F(scene.scale_modifier) : batch.scale[k]);
      for (int j = 0; j < 3; ++j) d_R[3 * j + k] = d_H[3 * j + k] * batch.scale[k];
    }
    rotation_adjoint(batch.quat, batch.inv_norm, d_R, d_quat);
    write_rows<3>(gradients.log_scales, first, count, visible, d_scale, add);
    write_rows<4>(gradients.quats, first, count, visible, d_quat, add);
  }
  if (gradients.viewmat) {
    alignas(64) float lanes[LANES];
    for (int k = 0; k < CAMERA_SUMS; ++k) {
      store(lanes, zero_unless(is_finite(camera[k]), camera[k]));
      for (int l = 0; l < count; ++l) {
        if (visible >> l & 1) camera_sums[k] += static_cast<double>(lanes[l]);
      }
    }
  }
}

void clear_batch(const SceneArgs& scene, const GradientArgs& g, int64_t first, int64_t count) {
  clear_rows(g.means, 3, first, count, g.accumulate);
  clear_rows(g.opacity_logits, 1, first, count, g.accumulate);
  clear_rows(g.means2d, 2, first, count, false);
  clear_rows(scene.colors ? g.colors : g.sh0, 3, first, count, g.accumulate);
  if (!scene.colors) clear_rows(g.shN, 3 * (scene.num_coeffs - 1), first, count, g.accumulate);
  if (scene.covars) {
    clear_rows(g.covars, 6, first, count, g.accumulate);
  } else {
    clear_rows(g.log_scales, 3, first, count, g.accumulate);
    clear_rows(g.quats, 4, first, count, g.accumulate);
  }
}

// The 4x4 gradient of the camera from the sums over Gaussians; the centre is -W^T t.
void write_viewmat(const Camera& camera, const double* sums, float* out) {
  const double *dW = sums, *dt = sums + 9, *d_center = sums + 12;
  for (int i = 0; i < 3; ++i) {
    double t = dt[i];
    for (int k = 0; k < 3; ++k) {
      out[4 * i + k] = static_cast<float>(dW[3 * i + k] - static_cast<double>(camera.t[i]) * d_center[k]);
      t -= static_cast<double>(camera.W[3 * i + k]) * d_center[k];
    }
    out[4 * i + 3] = static_cast<float>(t);
  }
  std::fill(out + 12, out + 16, 0.0f);
}

}  // namespace

void backward_project(Frame& frame, const SceneArgs& scene, const GradientArgs& gradients, bool with_depth, int num_threads) {
  PhaseTimer timer(frame, PHASE_BACKWARD_PROJECT);
  const int64_t n = scene.n, chunks = (n + CHUNK - 1) / CHUNK;
  double* camera_sums = frame.camera_sums.reserve((chunks + 1) * CAMERA_SUMS);
  std::fill_n(camera_sums, (chunks + 1) * CAMERA_SUMS, 0.0);
  parallel_for(chunks, num_threads, [&](int64_t chunk) {
    const int64_t end = std::min(n, (chunk + 1) * CHUNK);
    for (int64_t first = chunk * CHUNK; first < end; first += LANES) {
      const int count = static_cast<int>(std::min<int64_t>(LANES, end - first));
      uint32_t visible = 0;
      for (int l = 0; l < count; ++l) visible |= static_cast<uint32_t>(frame.slot_count[first + l] != 0) << l;
      if (visible) {
        backward_batch(frame, scene, gradients, with_depth, first, count, visible, camera_sums + chunk * CAMERA_SUMS);
      } else {
        clear_batch(scene, gradients, first, count);
      }
    }
  });
  if (gradients.viewmat) {
    double* total = camera_sums + chunks * CAMERA_SUMS;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      for (int k = 0; k < CAMERA_SUMS; ++k) total[k] += camera_sums[chunk * CAMERA_SUMS + k];
    }
    write_viewmat(frame.camera, total, gradients.viewmat);
  }
}

}  // namespace s2d
