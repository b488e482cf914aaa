// SPDX-License-Identifier: Apache-2.0
// Spherical harmonics of degree 0-3 and their derivative by direction, for any arithmetic type F (one Gaussian or a vector of them).
#pragma once

#include "constants.h"

namespace s2d {

// Basis functions 0 … (degree+1)^2 - 1 at the unit direction (x, y, z).
template <class F>
S2D_HOST_DEVICE inline void sh_basis(int degree, F x, F y, F z, F* out) {
  out[0] = F(SH_0);
  if (degree < 1) return;
  out[1] = F(-SH_1) * y;
  out[2] = F(SH_1) * z;
  out[3] = F(-SH_1) * x;
  if (degree < 2) return;
  const F xx = x * x, yy = y * y, zz = z * z;
  out[4] = F(SH_2_XY) * x * y;
  out[5] = F(-SH_2_XY) * y * z;
  out[6] = F(SH_2_ZZ) * (zz + zz - xx - yy);
  out[7] = F(-SH_2_XY) * x * z;
  out[8] = F(SH_2_XX) * (xx - yy);
  if (degree < 3) return;
  const F ring = F(4.0f) * zz - xx - yy;
  out[9] = F(-SH_3_A) * y * (F(3.0f) * xx - yy);
  out[10] = F(SH_3_B) * x * y * z;
  out[11] = F(-SH_3_C) * y * ring;
  out[12] = F(SH_3_D) * z * (F(2.0f) * zz - F(3.0f) * (xx + yy));
  out[13] = F(-SH_3_C) * x * ring;
  out[14] = F(SH_3_E) * z * (xx - yy);
  out[15] = F(-SH_3_A) * x * (xx - F(3.0f) * yy);
}

// grad[3] = sum_k weights[k] * d basis_k / d (x, y, z), with the polynomials above taken as functions on all of space.
template <class F>
S2D_HOST_DEVICE inline void sh_direction_gradient(int degree, F x, F y, F z, const F* weights, F* grad) {
  F gx(0.0f), gy(0.0f), gz(0.0f);
  if (degree >= 1) {
    gy = F(-SH_1) * weights[1];
    gz = F(SH_1) * weights[2];
    gx = F(-SH_1) * weights[3];
  }
  if (degree >= 2) {
    const F w4 = F(SH_2_XY) * weights[4], w5 = F(-SH_2_XY) * weights[5], w6 = F(2.0f * SH_2_ZZ) * weights[6];
    const F w7 = F(-SH_2_XY) * weights[7], w8 = F(2.0f * SH_2_XX) * weights[8];
    gx = gx + w4 * y - w6 * x + w7 * z + w8 * x;
    gy = gy + w4 * x + w5 * z - w6 * y - w8 * y;
    gz = gz + w5 * y + (w6 + w6) * z + w7 * x;
  }
  if (degree >= 3) {
    const F xx = x * x, yy = y * y, zz = z * z, xy = x * y, xz = x * z, yz = y * z;
    const F ring = F(4.0f) * zz - xx - yy;
    const F w9 = F(-SH_3_A) * weights[9], w10 = F(SH_3_B) * weights[10], w11 = F(-SH_3_C) * weights[11];
    const F w12 = F(SH_3_D) * weights[12], w13 = F(-SH_3_C) * weights[13], w14 = F(SH_3_E) * weights[14];
    const F w15 = F(-SH_3_A) * weights[15];
    gx = gx + F(6.0f) * w9 * xy + w10 * yz - F(2.0f) * w11 * xy - F(6.0f) * w12 * xz + w13 * (ring - xx - xx) +
         F(2.0f) * w14 * xz + F(3.0f) * w15 * (xx - yy);
    gy = gy + F(3.0f) * w9 * (xx - yy) + w10 * xz + w11 * (ring - yy - yy) - F(6.0f) * w12 * yz - F(2.0f) * w13 * xy -
         F(2.0f) * w14 * yz - F(6.0f) * w15 * xy;
    gz = gz + w10 * xy + F(8.0f) * w11 * yz + w12 * (F(6.0f) * zz - F(3.0f) * (xx + yy)) + F(8.0f) * w13 * xz +
         w14 * (xx - yy);
  }
  grad[0] = gx;
  grad[1] = gy;
  grad[2] = gz;
}

}  // namespace s2d
