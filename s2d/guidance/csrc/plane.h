// Plane hypotheses of one reference photo, and the random numbers they are drawn with.
//
// A plane is written as inverse depth that is linear in the pixel position, which is exact under a pinhole camera:
//     w(x, y) = w0 + gx (x - x0) + gy (y - y0)
// It is carried to another pixel by two multiplications, and needs no matrix inverse to become a homography (match.h).
#pragma once

#include <cmath>
#include <cstdint>

namespace s2d {

struct Plane {
  float w, gx, gy;  // inverse depth at the pixel's centre, slopes per pixel
};

// Counter-based random numbers: a function of (seed, pixel, stage), so the number of threads cannot change them.
class Random {
 public:
  Random(uint64_t seed, uint64_t pixel, uint64_t stage)
      : state_(seed * 0x9E3779B97F4A7C15ull ^ (pixel + 1) * 0xBF58476D1CE4E5B9ull ^ (stage + 1) * 0x94D049BB133111EBull) {
    next();
    next();
  }
  float uniform(float low, float high) { return low + (high - low) * (static_cast<float>(next() >> 40) * (1.0f / 16777216.0f)); }

 private:
  uint64_t next() {  // splitmix64
    uint64_t z = (state_ += 0x9E3779B97F4A7C15ull);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
  }
  uint64_t state_;
};

// The reference camera's side of a plane: normals, limits, random draws.
struct PlaneSpace {
  float fx, fy, cx, cy;
  float w_min, w_max;  // range of inverse depth

  void ray(float px, float py, float* r) const {
    r[0] = (px - cx) / fx;
    r[1] = (py - cy) / fy;
    r[2] = 1.0f;
  }

  Plane from_normal(const float* r, const float* n, float w) const {
    const float dot = n[0] * r[0] + n[1] * r[1] + n[2] * r[2];
    return {w, w * n[0] / (fx * dot), w * n[1] / (fy * dot)};
  }

  // Unit normal that faces the camera: n . ray < 0.
  void normal(float px, float py, const Plane& plane, float* n) const {
    const float at_origin = plane.w - plane.gx * px - plane.gy * py;
    n[0] = -plane.gx * fx;
    n[1] = -plane.gy * fy;
    n[2] = -(plane.gx * cx + plane.gy * cy + at_origin);
    const float length = std::sqrt(n[0] * n[0] + n[1] * n[1] + n[2] * n[2]);
    const float scale = length > 0.0f ? 1.0f / length : 0.0f;
    for (int k = 0; k < 3; ++k) n[k] *= scale;
  }

  bool usable(float px, float py, const Plane& plane) const {
    constexpr float kMinCosine = 0.08f;  // beyond 85 degrees a patch is a line
    if (!(plane.w >= w_min && plane.w <= w_max)) return false;
    float r[3], n[3];
    ray(px, py, r);
    normal(px, py, plane, n);
    const float length = std::sqrt(r[0] * r[0] + r[1] * r[1] + 1.0f);
    return -(n[0] * r[0] + n[1] * r[1] + n[2] * r[2]) > kMinCosine * length;
  }

  // Uniform in inverse depth; normals uniform within 75 degrees of the ray.
  Plane draw(float px, float py, Random& random) const {
    float r[3];
    ray(px, py, r);
    const float length = std::sqrt(r[0] * r[0] + r[1] * r[1] + 1.0f);
    const float w = random.uniform(w_min, w_max);
    for (int attempt = 0; attempt < 8; ++attempt) {
      const float z = random.uniform(-1.0f, 1.0f), angle = random.uniform(0.0f, 6.2831853f);
      const float planar = std::sqrt(1.0f - z * z);
      const float n[3] = {planar * std::cos(angle), planar * std::sin(angle), z};
      if (std::fabs(n[0] * r[0] + n[1] * r[1] + n[2]) > 0.25f * length) return from_normal(r, n, w);
    }
    return {w, 0.0f, 0.0f};
  }
};

}  // namespace s2d
