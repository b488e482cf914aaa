// SPDX-License-Identifier: Apache-2.0
// Raw parameters -> what projection.h takes, and from the ten sums of a splat back to them. For the arithmetic types of projection.h, which
// here need max_of, abs_of, log2_of and exp_of too.
#pragma once

#include "projection.h"

namespace s2d {

// What the tile passes sum up of a splat. With G = dLoss / d ln alpha of a pixel, (u, v) its whitened coordinates, w its weight and v_ the
// cotangents: the sums over pixels of G, G u, G v, G u^2, G u v, G v^2, w v_r, w v_g, w v_b, w v_aux.
enum Sums { SUM_G, SUM_GU, SUM_GV, SUM_GUU, SUM_GUV, SUM_GVV, SUM_R, SUM_GREEN, SUM_B, SUM_AUX, NUM_SUMS };
// Beside them, where it is asked for: the sum of the lengths of the pixels' gradients by the position, in half image sizes.
constexpr int SUM_LENGTH = NUM_SUMS;

// H for the covariance xx xy xz yy yz zz: its Cholesky factor. Pivots of a semidefinite matrix may come out slightly negative.
template <class F>
S2D_SHARED void half_of_covariance(const F* c, F* H) {
  const F zero(0.0f);
  const auto column = [&](F pivot, F value) { return select(pivot > zero, value / pivot, zero); };
  const F l00 = sqrt_of(max_of(c[0], zero)), l10 = column(l00, c[1]), l20 = column(l00, c[2]);
  const F l11 = sqrt_of(max_of(c[3] - l10 * l10, zero)), l21 = column(l11, c[4] - l20 * l10);
  const F l22 = sqrt_of(max_of(c[5] - l20 * l20 - l21 * l21, zero));
  H[0] = l00, H[1] = zero, H[2] = zero, H[3] = l10, H[4] = l11, H[5] = zero, H[6] = l20, H[7] = l21, H[8] = l22;
}

// The unit quaternion and 1 / |raw|; returns the largest component, which is 0 for a quaternion that is no rotation. Dividing by it first
// keeps the squares of huge and of tiny quaternions in range.
template <class F>
S2D_SHARED F normalise_quat(const F* raw, F* unit, F& inv_norm) {
  const F largest = max_of(max_of(abs_of(raw[0]), abs_of(raw[1])), max_of(abs_of(raw[2]), abs_of(raw[3])));
  F q[4];
  for (int k = 0; k < 4; ++k) q[k] = raw[k] / largest;
  const F inv = F(1.0f) / sqrt_of(q[0] * q[0] + q[1] * q[1] + q[2] * q[2] + q[3] * q[3]);
  for (int k = 0; k < 4; ++k) unit[k] = q[k] * inv;
  inv_norm = inv / largest;
  return largest;
}

template <class F>
S2D_SHARED void half_of_rotation_and_scale(const F* quat, const F* scale, F* H) {
  F R[9];
  rotation_from_unit_quat(quat, R);
  for (int j = 0; j < 3; ++j) {
    for (int k = 0; k < 3; ++k) H[3 * j + k] = R[3 * j + k] * scale[k];
  }
}

// log2 of the opacity, and its derivative by the stored value: an opacity where activated, else its logit.
template <class F>
S2D_SHARED void activate_opacity(F stored, bool activated, F& log2_opacity, F& derivative) {
  if (activated) {
    log2_opacity = log2_of(max_of(stored, F(1e-30f)));
    derivative = F(LOG2_E) / stored;
  } else {
    const F e = exp_of(F(0.0f) - stored);  // opacity = 1 / (1 + e)
    log2_opacity = F(0.0f) - log2_of(F(1.0f) + e);
    derivative = F(LOG2_E) * e / (F(1.0f) + e);
  }
}

// Antialiasing, in log2: the square root of the share of the determinant that is the splat's own. log2 of the smallest float instead of
// minus infinity: far below ALPHA_MIN either way.
template <class F>
S2D_SHARED F log2_dimming(const Footprint<F>& fp) {
  return F(0.5f) * log2_of(max_of(fp.sharp_det / fp.det, F(1e-37f)));
}

// Unit direction from the camera's centre, and 1 / distance.
template <class F>
S2D_SHARED void view_direction(const Camera& camera, const F* mean, F* dir, F& inv_distance) {
  F offset[3];
  for (int k = 0; k < 3; ++k) offset[k] = mean[k] - F(camera.center[k]);
  inv_distance = F(1.0f) / sqrt_of(offset[0] * offset[0] + offset[1] * offset[1] + offset[2] * offset[2]);
  for (int k = 0; k < 3; ++k) dir[k] = offset[k] * inv_distance;
}

// Gradient of a footprint from the sums of its splat.
template <class F>
S2D_SHARED void footprint_gradient(const Footprint<F>& fp, const F* sums, bool antialiasing, bool with_depth, bool inverse_depth,
                                   FootprintGrad<F>& grad) {
  // y = conic d in terms of the whitened (u, v): y = (s1 u, s2 u + s3 v) / WHITEN^2.
  constexpr float K = 1.0f / (WHITEN * WHITEN);
  grad.mean_x = F(K) * fp.s1 * sums[SUM_GU];
  grad.mean_y = F(K) * (fp.s2 * sums[SUM_GU] + fp.s3 * sums[SUM_GV]);
  const F guu = sums[SUM_GUU], guv = sums[SUM_GUV], gvv = sums[SUM_GVV], half_k2(0.5f * K * K);
  grad.var_x = half_k2 * fp.s1 * fp.s1 * guu;
  grad.cov_xy = half_k2 * fp.s1 * (fp.s2 * guu + fp.s3 * guv);
  grad.var_y = half_k2 * (fp.s2 * fp.s2 * guu + F(2.0f) * fp.s2 * fp.s3 * guv + fp.s3 * fp.s3 * gvv);
  for (F& value : grad.M) value = F(0.0f);
  if (antialiasing) dimming_adjoint(fp, sums[SUM_G], grad);
  grad.z = F(0.0f);
  if (with_depth) {
    grad.z = sums[SUM_AUX];
    if (inverse_depth) grad.z = F(0.0f) - grad.z * fp.inv_z * fp.inv_z;
  }
}

// Gradient by the covariance xx xy xz yy yz zz. Sigma enters through M M^T = A Sigma A^T only: its gradient is A^T grad A, off-diagonal
// entries counted twice.
template <class F>
S2D_SHARED void covariance_adjoint(const Footprint<F>& fp, const FootprintGrad<F>& grad, F* d_covar) {
  const auto entry = [&](int i, int j) {
    const F *x = fp.A, *y = fp.A + 3;
    return grad.var_x * x[i] * x[j] + grad.cov_xy * (x[i] * y[j] + y[i] * x[j]) + grad.var_y * y[i] * y[j];
  };
  const F two(2.0f);
  d_covar[0] = entry(0, 0), d_covar[1] = two * entry(0, 1), d_covar[2] = two * entry(0, 2);
  d_covar[3] = entry(1, 1), d_covar[4] = two * entry(1, 2), d_covar[5] = entry(2, 2);
}

// Gradients by the stored scales and by the rotation from the one by H = R diag(scale). `by_stored` is d scale / d stored value.
template <class F>
S2D_SHARED void half_adjoint(const F* quat, const F* scale, const F* by_stored, const F* d_H, F* d_scale, F* d_R) {
  F R[9];
  rotation_from_unit_quat(quat, R);
  for (int k = 0; k < 3; ++k) {
    const F by_scale = R[k] * d_H[k] + R[3 + k] * d_H[3 + k] + R[6 + k] * d_H[6 + k];
    d_scale[k] = by_scale * by_stored[k];
    for (int j = 0; j < 3; ++j) d_R[3 * j + k] = d_H[3 * j + k] * scale[k];
  }
}

// The gradient by the direction, d_dir, goes on to the mean and, with the opposite sign, to the camera's centre.
template <class F>
S2D_SHARED void direction_adjoint(const F* dir, F inv_distance, const F* d_dir, F* d_mean, F* d_center) {
  const F radial = d_dir[0] * dir[0] + d_dir[1] * dir[1] + d_dir[2] * dir[2];  // normalisation removes it
  for (int k = 0; k < 3; ++k) {
    const F d_offset = (d_dir[k] - radial * dir[k]) * inv_distance;
    d_mean[k] = d_mean[k] + d_offset;
    d_center[k] = F(0.0f) - d_offset;
  }
}

// What a camera's gradient sums over the Gaussians: dW[9], dt[3], d centre[3], d (fx, fy, cx, cy).
constexpr int CAMERA_SUMS = 19;

// The 4x4 gradient of the camera from these sums; the centre is -W^T t.
S2D_HOST_DEVICE inline void viewmat_gradient(const Camera& camera, const double* sums, float* out) {
  const double *dW = sums, *dt = sums + 9, *d_center = sums + 12;
  for (int i = 0; i < 3; ++i) {
    double t = dt[i];
    for (int k = 0; k < 3; ++k) {
      out[4 * i + k] = static_cast<float>(dW[3 * i + k] - static_cast<double>(camera.t[i]) * d_center[k]);
      t -= static_cast<double>(camera.W[3 * i + k]) * d_center[k];
    }
    out[4 * i + 3] = static_cast<float>(t);
  }
  for (int k = 12; k < 16; ++k) out[k] = 0.0f;
}

}  // namespace s2d
