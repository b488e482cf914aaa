// SPDX-License-Identifier: Apache-2.0
// LANES Gaussians at once: raw parameters in, activated values out. Shared by the projection and its adjoint, so that both see the
// same numbers.
#pragma once

#include <algorithm>

#include "frame.h"
#include "gaussian.h"
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
  F c[6];
  load_rows<6>(scene.covars, first, count, c);
  for (const F& value : c) batch.healthy = batch.healthy & is_finite(value);
  half_of_covariance(c, batch.H);
}

S2D_INLINE void load_scale_and_rotation(const SceneArgs& scene, int64_t first, int count, GaussianBatch& batch) {
  F raw[3], q[4];
  load_rows<3>(scene.log_scales, first, count, raw);
  load_rows<4>(scene.quats, first, count, q);
  for (int k = 0; k < 3; ++k) {
    batch.healthy = batch.healthy & is_finite(raw[k]);
    batch.scale[k] = (scene.activated ? raw[k] : exp_of(raw[k])) * F(scene.scale_modifier);
  }
  for (int k = 0; k < 4; ++k) batch.healthy = batch.healthy & is_finite(q[k]);
  batch.healthy = batch.healthy & (normalise_quat(q, batch.quat, batch.inv_norm) > F(0.0f));
  half_of_rotation_and_scale(batch.quat, batch.scale, batch.H);
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
  if (scene.activated) batch.healthy = batch.healthy & (stored > F(0.0f));
  activate_opacity(stored, scene.activated, batch.log2_opacity, batch.d_log2_opacity);
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
