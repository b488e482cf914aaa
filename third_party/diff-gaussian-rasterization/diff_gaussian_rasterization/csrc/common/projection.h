// SPDX-License-Identifier: Apache-2.0
// From a 3D Gaussian to the ellipse one camera sees, and back with gradients. For any arithmetic type F that has + - * /, sqrt_of,
// clamp_to, and a mask type with select(): one Gaussian per call on a GPU, a vector of them on a CPU.
//
// Notation: W, t = rotation and translation of the camera (x_cam = W x + t); H = "half" of the 3D covariance (Sigma = H H^T), for a
// rotation R and scales s: H = R diag(s); J = Jacobian of the projection at the (clamped) centre; A = J W; M = A H, so that the 2D
// covariance is M M^T + BLUR I. Its determinant is taken as |M0 x M1|^2 + BLUR (|M0|^2 + |M1|^2) + BLUR^2 (M0, M1 the rows): the usual
// a c - b^2 loses all digits on needles.
#pragma once

#include "constants.h"

namespace s2d {

struct Camera {
  float W[9], t[3];
  float center[3];  // -W^T t
  float fx, fy, cx, cy;
  float tan_x_low, tan_x_high, tan_y_low, tan_y_high;  // limits of X/Z and Y/Z in the Jacobian
  int width, height;
};

// From a row-major 4x4 world-to-camera matrix and intrinsics in pixels.
S2D_HOST_DEVICE inline Camera make_camera(const float* viewmat, float fx, float fy, float cx, float cy, int width, int height) {
  Camera c;
  for (int i = 0; i < 3; ++i) {
    for (int k = 0; k < 3; ++k) c.W[3 * i + k] = viewmat[4 * i + k];
    c.t[i] = viewmat[4 * i + 3];
  }
  for (int k = 0; k < 3; ++k) c.center[k] = -(c.W[k] * c.t[0] + c.W[3 + k] * c.t[1] + c.W[6 + k] * c.t[2]);
  c.fx = fx, c.fy = fy, c.cx = cx, c.cy = cy;
  c.width = width, c.height = height;
  const float margin_x = FOV_MARGIN * 0.5f * static_cast<float>(width) / fx;
  const float margin_y = FOV_MARGIN * 0.5f * static_cast<float>(height) / fy;
  c.tan_x_low = -cx / fx - margin_x;
  c.tan_x_high = (static_cast<float>(width) - cx) / fx + margin_x;
  c.tan_y_low = -cy / fy - margin_y;
  c.tan_y_high = (static_cast<float>(height) - cy) / fy + margin_y;
  return c;
}

template <class F>
struct Footprint {
  F x, y, z, inv_z;      // centre in camera coordinates
  F mean_x, mean_y;      // pixels
  F tan_x, tan_y;        // clamped ratios
  F A[6], M[6];
  F var_x, cov_xy, var_y, det;  // 2D covariance, blur included
  F sharp_det;                  // without the blur
  F s1, s2, s3;          // u = s1 dx + s2 dy, v = s3 dy; see WHITEN
};

template <class F>
struct FootprintGrad {
  F mean_x, mean_y;           // by pixel position
  F var_x, cov_xy, var_y;     // by the entries of the symmetric 2D covariance (cov_xy: one of the two equal entries)
  F M[6];                     // by M, beyond what passes through the covariance
  F z;                        // by the depth that is rendered
};

// R (row-major) of the quaternion q = (w, x, y, z), already of unit norm.
template <class F>
S2D_HOST_DEVICE inline void rotation_from_unit_quat(const F* q, F* R) {
  const F w = q[0], x = q[1], y = q[2], z = q[3];
  const F x2 = x + x, y2 = y + y, z2 = z + z;
  const F xx = x * x2, yy = y * y2, zz = z * z2, xy = x * y2, xz = x * z2, yz = y * z2;
  const F wx = w * x2, wy = w * y2, wz = w * z2;
  R[0] = F(1.0f) - (yy + zz), R[1] = xy - wz, R[2] = xz + wy;
  R[3] = xy + wz, R[4] = F(1.0f) - (xx + zz), R[5] = yz - wx;
  R[6] = xz - wy, R[7] = yz + wx, R[8] = F(1.0f) - (xx + yy);
}

// Gradient by the raw quaternion (norm 1/inv_norm), given the one by R.
template <class F>
S2D_HOST_DEVICE inline void rotation_adjoint(const F* q, F inv_norm, const F* D, F* grad) {
  const F w = q[0], x = q[1], y = q[2], z = q[3], two(2.0f);
  F g[4];
  g[0] = two * (z * (D[3] - D[1]) + y * (D[2] - D[6]) + x * (D[7] - D[5]));
  g[1] = two * (y * (D[1] + D[3]) + z * (D[2] + D[6]) + w * (D[7] - D[5]) - two * x * (D[4] + D[8]));
  g[2] = two * (x * (D[1] + D[3]) + z * (D[5] + D[7]) + w * (D[2] - D[6]) - two * y * (D[0] + D[8]));
  g[3] = two * (x * (D[2] + D[6]) + y * (D[5] + D[7]) + w * (D[3] - D[1]) - two * z * (D[0] + D[4]));
  const F radial = w * g[0] + x * g[1] + y * g[2] + z * g[3];  // normalisation removes it
  for (int k = 0; k < 4; ++k) grad[k] = (g[k] - q[k] * radial) * inv_norm;
}

// Antialiasing dims a splat by |M0 x M1| / sqrt(det), as much as the blur widens it. Given the gradient by ln of that factor, add what
// it means for M and for the blurred covariance. (Through the inverse of the sharp covariance, needles lose their digits.)
template <class F>
S2D_HOST_DEVICE inline void dimming_adjoint(const Footprint<F>& fp, F d_log_factor, FootprintGrad<F>& grad) {
  const F *M0 = fp.M, *M1 = fp.M + 3;
  const F c[3] = {M0[1] * M1[2] - M0[2] * M1[1], M0[2] * M1[0] - M0[0] * M1[2], M0[0] * M1[1] - M0[1] * M1[0]};
  const F sharp = d_log_factor / fp.sharp_det, blurred = F(0.5f) * d_log_factor / fp.det;
  for (int k = 0; k < 3; ++k) {
    const int i = (k + 1) % 3, j = (k + 2) % 3;
    grad.M[k] = grad.M[k] + sharp * (M1[i] * c[j] - M1[j] * c[i]);
    grad.M[3 + k] = grad.M[3 + k] + sharp * (c[i] * M0[j] - c[j] * M0[i]);
  }
  grad.var_x = grad.var_x - blurred * fp.var_y;
  grad.var_y = grad.var_y - blurred * fp.var_x;
  grad.cov_xy = grad.cov_xy + blurred * fp.cov_xy;
}

template <class F>
S2D_HOST_DEVICE inline void project_footprint(const Camera& camera, const F* mean, const F* H, Footprint<F>& out) {
  const float* W = camera.W;
  F cam[3];
  for (int i = 0; i < 3; ++i) {
    cam[i] = F(W[3 * i]) * mean[0] + F(W[3 * i + 1]) * mean[1] + F(W[3 * i + 2]) * mean[2] + F(camera.t[i]);
  }
  out.x = cam[0], out.y = cam[1], out.z = cam[2];
  out.inv_z = F(1.0f) / cam[2];
  const F ratio_x = cam[0] * out.inv_z, ratio_y = cam[1] * out.inv_z;
  out.mean_x = F(camera.fx) * ratio_x + F(camera.cx);
  out.mean_y = F(camera.fy) * ratio_y + F(camera.cy);
  out.tan_x = clamp_to(ratio_x, camera.tan_x_low, camera.tan_x_high);
  out.tan_y = clamp_to(ratio_y, camera.tan_y_low, camera.tan_y_high);
  const F zoom_x = F(camera.fx) * out.inv_z, zoom_y = F(camera.fy) * out.inv_z;
  for (int k = 0; k < 3; ++k) {
    out.A[k] = zoom_x * (F(W[k]) - out.tan_x * F(W[6 + k]));
    out.A[3 + k] = zoom_y * (F(W[3 + k]) - out.tan_y * F(W[6 + k]));
  }
  for (int i = 0; i < 2; ++i) {
    for (int k = 0; k < 3; ++k) {
      out.M[3 * i + k] = out.A[3 * i] * H[k] + out.A[3 * i + 1] * H[3 + k] + out.A[3 * i + 2] * H[6 + k];
    }
  }
  const F* M = out.M;
  const F len_x = M[0] * M[0] + M[1] * M[1] + M[2] * M[2], len_y = M[3] * M[3] + M[4] * M[4] + M[5] * M[5];
  const F c0 = M[1] * M[5] - M[2] * M[4], c1 = M[2] * M[3] - M[0] * M[5], c2 = M[0] * M[4] - M[1] * M[3];
  out.var_x = len_x + F(BLUR);
  out.var_y = len_y + F(BLUR);
  out.cov_xy = M[0] * M[3] + M[1] * M[4] + M[2] * M[5];
  out.sharp_det = c0 * c0 + c1 * c1 + c2 * c2;
  out.det = out.sharp_det + F(BLUR) * (len_x + len_y) + F(BLUR * BLUR);
  out.s1 = F(WHITEN) * sqrt_of(out.var_y / out.det);
  out.s2 = F(0.0f) - out.s1 * (out.cov_xy / out.var_y);
  out.s3 = F(WHITEN) / sqrt_of(out.var_y);
}

// Gradients of a footprint by mean and H, and what it adds to those of the camera's W and t.
template <class F>
S2D_HOST_DEVICE inline void footprint_adjoint(const Camera& camera, const F* mean, const F* H, const Footprint<F>& fp,
                              const FootprintGrad<F>& grad, F* d_mean, F* d_H, F* dW, F* dt) {
  const float* W = camera.W;
  const F *A = fp.A, *M = fp.M;
  const F two(2.0f);
  F dM[6], dA[6];
  for (int k = 0; k < 3; ++k) {
    dM[k] = grad.M[k] + two * (grad.var_x * M[k] + grad.cov_xy * M[3 + k]);
    dM[3 + k] = grad.M[3 + k] + two * (grad.cov_xy * M[k] + grad.var_y * M[3 + k]);
  }
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 3; ++j) {
      dA[3 * i + j] = dM[3 * i] * H[3 * j] + dM[3 * i + 1] * H[3 * j + 1] + dM[3 * i + 2] * H[3 * j + 2];
    }
  }
  for (int j = 0; j < 3; ++j) {
    for (int k = 0; k < 3; ++k) d_H[3 * j + k] = A[j] * dM[k] + A[3 + j] * dM[3 + k];
  }

  const F zoom_x = F(camera.fx) * fp.inv_z, zoom_y = F(camera.fy) * fp.inv_z;
  const F along_x = dA[0] * F(W[6]) + dA[1] * F(W[7]) + dA[2] * F(W[8]);
  const F along_y = dA[3] * F(W[6]) + dA[4] * F(W[7]) + dA[5] * F(W[8]);
  const F ratio_x = fp.x * fp.inv_z, ratio_y = fp.y * fp.inv_z;
  // A clamped ratio is a constant: no gradient.
  const F d_tan_x = select(ratio_x == fp.tan_x, F(0.0f) - zoom_x * along_x, F(0.0f));
  const F d_tan_y = select(ratio_y == fp.tan_y, F(0.0f) - zoom_y * along_y, F(0.0f));
  const F d_ratio_x = d_tan_x + F(camera.fx) * grad.mean_x;
  const F d_ratio_y = d_tan_y + F(camera.fy) * grad.mean_y;
  F d_cam[3];
  d_cam[0] = d_ratio_x * fp.inv_z;
  d_cam[1] = d_ratio_y * fp.inv_z;
  const F d_zoom = dA[0] * A[0] + dA[1] * A[1] + dA[2] * A[2] + dA[3] * A[3] + dA[4] * A[4] + dA[5] * A[5];
  d_cam[2] = grad.z - (d_ratio_x * ratio_x + d_ratio_y * ratio_y + d_zoom) * fp.inv_z;

  for (int k = 0; k < 3; ++k) {
    d_mean[k] = F(W[k]) * d_cam[0] + F(W[3 + k]) * d_cam[1] + F(W[6 + k]) * d_cam[2];
    const F x_part = zoom_x * dA[k], y_part = zoom_y * dA[3 + k];
    dW[k] = d_cam[0] * mean[k] + x_part;
    dW[3 + k] = d_cam[1] * mean[k] + y_part;
    dW[6 + k] = d_cam[2] * mean[k] - (fp.tan_x * x_part + fp.tan_y * y_part);
    dt[k] = d_cam[k];
  }
}

// What a footprint adds to the gradients of (fx, fy, cx, cy). Apart from footprint_adjoint, because few runs want it: a focal length
// scales the mean's distance from the principal point and a row of M; and a clamped ratio is a limit of the field of view,
// (constant - cx) / fx, that moves with both.
template <class F>
S2D_HOST_DEVICE inline void intrinsics_adjoint(const Camera& camera, const F* H, const Footprint<F>& fp, const FootprintGrad<F>& grad,
                               F* d_intrinsics) {
  const float* forward = camera.W + 6;
  const float focal[2] = {camera.fx, camera.fy};
  const F position[2] = {fp.x, fp.y}, tan[2] = {fp.tan_x, fp.tan_y};
  const F d_mean[2] = {grad.mean_x, grad.mean_y}, d_var[2] = {grad.var_x, grad.var_y};
  for (int i = 0; i < 2; ++i) {
    const F *row = fp.M + 3 * i, *other = fp.M + 3 - 3 * i;
    F by_zoom(0.0f), along(0.0f);
    for (int k = 0; k < 3; ++k) {
      const F dM = grad.M[3 * i + k] + F(2.0f) * (d_var[i] * row[k] + grad.cov_xy * other[k]);
      by_zoom = by_zoom + dM * row[k];
      along = along + dM * (F(forward[0]) * H[k] + F(forward[1]) * H[3 + k] + F(forward[2]) * H[6 + k]);
    }
    const F inv_focal(1.0f / focal[i]), ratio = position[i] * fp.inv_z;
    const F d_limit = select(ratio == tan[i], F(0.0f), F(0.0f) - F(focal[i]) * fp.inv_z * along);
    d_intrinsics[i] = d_mean[i] * ratio + (by_zoom - d_limit * tan[i]) * inv_focal;
    d_intrinsics[2 + i] = d_mean[i] - d_limit * inv_focal;
  }
}

}  // namespace s2d
