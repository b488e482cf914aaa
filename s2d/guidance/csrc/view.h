// A pinhole view: corner-origin pixels (+0.5 centres), world-to-camera rotation and translation, camera-z depth.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

namespace s2d {

// What Python hands over per view (kernels.py has the same fields in the same order); maps that a kernel does not read are null.
struct ViewData {
  int32_t width, height;
  double K[4];            // fx, fy, cx, cy
  double viewmat[16];     // row-major [4, 4]
  const float* grey;      // [H, W] in [0, 1]
  const uint32_t* quads;  // [H, W] the four taps of each bilinear lookup, see s2d_pack_quads
  const float* rgb;       // [H, W, 3] in [0, 1]
  float* planes;          // [H, W, 3] inverse depth and its slopes per pixel; inverse depth 0 = none
  float* confidence;      // [H, W] in [0, 1]
};

struct View {
  int width, height;
  double fx, fy, cx, cy;
  double R[9], t[3];
  double centre[3];  // of the camera, in the world

  explicit View(const ViewData& data)
      : width(data.width), height(data.height), fx(data.K[0]), fy(data.K[1]), cx(data.K[2]), cy(data.K[3]) {
    for (int r = 0; r < 3; ++r) {
      for (int c = 0; c < 3; ++c) R[3 * r + c] = data.viewmat[4 * r + c];
      t[r] = data.viewmat[4 * r + 3];
    }
    for (int c = 0; c < 3; ++c) centre[c] = -(R[c] * t[0] + R[3 + c] * t[1] + R[6 + c] * t[2]);
  }

  // World point to pixel; returns the depth (0: behind the camera).
  double project(const double* X, double* u, double* v) const {
    const double z = R[6] * X[0] + R[7] * X[1] + R[8] * X[2] + t[2];
    if (!(z > 1e-9)) return 0.0;
    *u = fx * (R[0] * X[0] + R[1] * X[1] + R[2] * X[2] + t[0]) / z + cx;
    *v = fy * (R[3] * X[0] + R[4] * X[1] + R[5] * X[2] + t[1]) / z + cy;
    return z;
  }

  bool inside(double u, double v) const { return u > 0.0 && v > 0.0 && u < width && v < height; }

  void unproject(double u, double v, double z, double* X) const {
    const double c[3] = {(u - cx) / fx * z - t[0], (v - cy) / fy * z - t[1], z - t[2]};
    to_world(c, X);
  }

  // Direction from camera axes to world axes.
  void to_world(const double* c, double* d) const {
    for (int k = 0; k < 3; ++k) d[k] = R[k] * c[0] + R[3 + k] * c[1] + R[6 + k] * c[2];
  }
};

}  // namespace s2d
