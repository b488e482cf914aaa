// SPDX-License-Identifier: Apache-2.0
// LANES Gaussians at once: raw parameters in, activated values out. Shared by the projection and its adjoint, so that both see the
// same numbers.
#pragma once

#include <algorithm>

#include "frame.h"
#include "rows.h"
#include "sh.h"

namespace s2d {

struct GaussianBatch {
  F mean[3];
  F scale[3];
  F quat[4];    // unit
  F inv_norm;   // 1 / |raw quaternion|
  F H[9];       // half of the covariance: Sigma = H H^T
  F log2_opacity;
  F d_log2_opacity;  // d log2_opacity / d stored value
  Mask healthy;
};

S2D_INLINE void load_covariance(const SceneArgs& scene, int64_t first, int count, GaussianBatch& batch) {
  // Cholesky factor of Sigma; pivots of a semidefinite matrix may come out slightly negative.
  F c[6];
  load_rows<6>(scene.covars, first, count, c);
  for (const F& value : c) batch.healthy = batch.healthy & is_finite(value);
  const F zero(0.0f);
  const auto column = [&](F pivot, F value) { return select(pivot > zero, value / pivot, zero); };
  const F l00 = sqrt_of(max_of(c[0], zero)), l10 = column(l00, c[1]), l20 = column(l00, c[2]);
  const F l11 = sqrt_of(max_of(c[3] - l10 * l10, zero)), l21 = column(l11, c[4] - l20 * l10);
  const F l22 = sqrt_of(max_of(c[5] - l20 * l20 - l21 * l21, zero));
  const F H[9] = {l00, zero, zero, l10, l11, zero, l20, l21, l22};
  for (int k = 0; k < 9; ++k) batch.H[k] = H[k];
}

S2D_INLINE void load_scale_and_rotation(const SceneArgs& scene, int64_t first, int count, GaussianBatch& batch) {
  F raw[3], q[4], R[9];
  load_rows<3>(scene.log_scales, first, count, raw);
  load_rows<4>(scene.quats, first, count, q);
  for (int k = 0; k < 3; ++k) {
    batch.healthy = batch.healthy & is_finite(raw[k]);
    batch.scale[k] = (scene.activated ? raw[k] : exp_of(raw[k])) * F(scene.scale_modifier);
  }
  // Dividing by the largest component first keeps the squares of huge and of tiny quaternions in range.
  const F largest = max_of(max_of(abs_of(q[0]), abs_of(q[1])), max_of(abs_of(q[2]), abs_of(q[3])));
  for (int k = 0; k < 4; ++k) batch.healthy = batch.healthy & is_finite(q[k]);
  batch.healthy = batch.healthy & (largest > F(0.0f));
  for (int k = 0; k < 4; ++k) q[k] = q[k] / largest;
  const F inv = F(1.0f) / sqrt_of(q[0] * q[0] + q[1] * q[1] + q[2] * q[2] + q[3] * q[3]);
  for (int k = 0; k < 4; ++k) batch.quat[k] = q[k] * inv;
  batch.inv_norm = inv / largest;
  rotation_from_unit_quat(batch.quat, R);
  for (int j = 0; j < 3; ++j) {
    for (int k = 0; k < 3; ++k) batch.H[3 * j + k] = R[3 * j + k] * batch.scale[k];
  }
}

S2D_INLINE void load_batch(const SceneArgs& scene, int64_t first, int count, GaussianBatch& batch) {
  F stored;
  load_rows<3>(scene.means, first, count, batch.mean);
  load_rows<1>(scene.opacity_logits, first, count, &stored);
  batch.healthy = is_finite(stored);
  for (const F& value : batch.mean) batch.healthy = batch.healthy & is_finite(value);
  if (scene.covars) {
    load_covariance(scene, first, count, batch);
  } else {
    load_scale_and_rotation(scene, first, count, batch);
  }
  if (scene.activated) {
    batch.healthy = batch.healthy & (stored > F(0.0f));
    batch.log2_opacity = log2_of(max_of(stored, F(1e-30f)));
    batch.d_log2_opacity = F(LOG2_E) / stored;
  } else {
    const F e = exp_of(F(0.0f) - stored);  // opacity = 1 / (1 + e)
    batch.log2_opacity = F(0.0f) - log2_of(F(1.0f) + e);
    batch.d_log2_opacity = F(LOG2_E) * e / (F(1.0f) + e);
  }
}

S2D_INLINE void prefetch_rows(const float* data, int64_t width, int64_t first, int64_t n) {
  if (!data) return;
  const float* end = data + std::min(first + LANES, n) * width;
  for (const float* line = data + first * width; line < end; line += 16) __builtin_prefetch(line);
}

// Ask for the parameters that are needed two batches after this one: there are more arrays than the hardware follows.
S2D_INLINE void prefetch_after(const SceneArgs& scene, int64_t batch) {
  const int64_t first = batch + 2 * LANES;
  if (first >= scene.n) return;
  prefetch_rows(scene.means, 3, first, scene.n);
  prefetch_rows(scene.opacity_logits, 1, first, scene.n);
  prefetch_rows(scene.covars, 6, first, scene.n);
  prefetch_rows(scene.log_scales, 3, first, scene.n);
  prefetch_rows(scene.quats, 4, first, scene.n);
  prefetch_rows(scene.colors, 3, first, scene.n);
  prefetch_rows(scene.sh0, 3, first, scene.n);
  prefetch_rows(scene.shN, 3 * (scene.num_coeffs - 1), first, scene.n);
}

// Unit directions from the camera centre, and 1 / distance.
S2D_INLINE void view_direction(const Camera& camera, const F* mean, F* dir, F& inv_distance) {
  F offset[3];
  for (int k = 0; k < 3; ++k) offset[k] = mean[k] - F(camera.center[k]);
  inv_distance = F(1.0f) / sqrt_of(offset[0] * offset[0] + offset[1] * offset[1] + offset[2] * offset[2]);
  for (int k = 0; k < 3; ++k) dir[k] = offset[k] * inv_distance;
}

constexpr int SH_MAX_COLUMNS = 3 * (SH_MAX_COEFFS - 1) / LANES * LANES + LANES;  // of shN, whole vectors

// The coefficients of a batch in columns, c[3 k + channel] that of basis function k + 1.
struct ShBatch {
  F c0[3];
  alignas(64) float c[SH_MAX_COLUMNS * LANES];
};

S2D_INLINE void load_sh(const SceneArgs& scene, int64_t first, int count, ShBatch& out) {
  const int width = 3 * (scene.num_coeffs - 1);
  load_rows<3>(scene.sh0, first, count, out.c0);
  load_long_rows(scene.shN + width * first, width, count, out.c);
}

// SH(direction) + 1/2.
S2D_INLINE void sh_color(const SceneArgs& scene, const ShBatch& sh, const F* basis, F* color) {
  const int used = (scene.degree + 1) * (scene.degree + 1) - 1;
  for (int i = 0; i < 3; ++i) color[i] = sh.c0[i] * basis[0] + F(0.5f);
  for (int k = 0; k < used; ++k) {
    for (int i = 0; i < 3; ++i) color[i] = color[i] + load(sh.c + (3 * k + i) * LANES) * basis[k + 1];
  }
}

// Which have only finite coefficients, those beyond the degree in use included.
S2D_INLINE Mask sh_is_finite(const SceneArgs& scene, const ShBatch& sh) {
  F poison(0.0f);
  for (const F& value : sh.c0) poison = poison + value * F(0.0f);
  for (int k = 0; k < 3 * (scene.num_coeffs - 1); ++k) poison = poison + load(sh.c + k * LANES) * F(0.0f);
  return is_finite(poison);
}

}  // namespace s2d
