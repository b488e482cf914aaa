// SPDX-License-Identifier: Apache-2.0
// LANES Gaussians at once: raw parameters in, activated values out. Shared by the projection and its adjoint, so that both see the
// same numbers.
#pragma once

#include "frame.h"
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

// Read up to LANES rows of `width` floats, transposed; missing rows repeat the last one.
template <int WIDTH>
S2D_INLINE void load_rows(const float* data, int64_t first, int count, F* out) {
  alignas(64) float columns[WIDTH][LANES];
  for (int l = 0; l < LANES; ++l) {
    const float* row = data + (first + (l < count ? l : count - 1)) * WIDTH;
    for (int k = 0; k < WIDTH; ++k) columns[k][l] = row[k];
  }
  for (int k = 0; k < WIDTH; ++k) out[k] = load(columns[k]);
}

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

// Unit directions from the camera centre, and 1 / distance.
S2D_INLINE void view_direction(const Camera& camera, const F* mean, F* dir, F& inv_distance) {
  F offset[3];
  for (int k = 0; k < 3; ++k) offset[k] = mean[k] - F(camera.center[k]);
  inv_distance = F(1.0f) / sqrt_of(offset[0] * offset[0] + offset[1] * offset[1] + offset[2] * offset[2]);
  for (int k = 0; k < 3; ++k) dir[k] = offset[k] * inv_distance;
}

// Four floats: the three channels of one SH coefficient and one float more, in one register.
typedef float Float4 __attribute__((vector_size(16)));
S2D_INLINE Float4 load4(const float* p) {
  Float4 out;
  std::memcpy(&out, p, 16);
  return out;
}
S2D_INLINE Float4 load3(const float* p) { return Float4{p[0], p[1], p[2], 0.0f}; }

// SH(direction) + 1/2 of Gaussian g, whose basis values are basis[k * LANES]; NaN if a stored coefficient is not finite.
S2D_INLINE Float4 sh_color(const SceneArgs& scene, int64_t g, const float* basis) {
  const int rest = scene.num_coeffs - 1, used = (scene.degree + 1) * (scene.degree + 1) - 1;
  const Float4 c0 = load3(scene.sh0 + 3 * g);
  Float4 color = c0 * basis[0] + 0.5f;
  Float4 poison = c0 * 0.0f;
  const float* c = scene.shN + 3 * rest * g;
  for (int k = 0; k < rest; ++k) {
    const Float4 value = k + 1 < rest ? load4(c + 3 * k) : load3(c + 3 * k);
    if (k < used) color += value * basis[(k + 1) * LANES];
    poison += value * 0.0f;
  }
  return color + poison;
}

}  // namespace s2d
