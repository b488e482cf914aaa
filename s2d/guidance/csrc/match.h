// How well a patch of the reference photo looks like its image in a source photo under a plane: bilaterally weighted NCC.
//
// With q ~ A p + b w(p), A = K_s R K_r^-1, b = K_s t, a plane maps the patch by a homography whose columns are A0 + b gx,
// A1 + b gy and A p0 + b w0. NCC does not see exposure: a photo may be brighter by any factor and offset.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "plane.h"
#include "view.h"

namespace s2d {

constexpr float kWorstCost = 2.0f;            // 1 - NCC lies in [0, 2]
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
constexpr int kSamples = 32;                  // 6 x 6 without the corners
constexpr int kVectors = kSamples / kLanes;
constexpr float kNoiseVariance = 1.5e-5f;     // (1 / 255)²: what is flat up to quantisation correlates with nothing
constexpr float kColourSigma = 0.06f;         // grey levels that differ more belong to another surface, mostly

// Without AVX a vector is two registers, and how one is passed depends on flags. None crosses the border of this library.
#pragma GCC diagnostic ignored "-Wpsabi"
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

inline Floats all(float x) { return Floats{} + x; }
inline Floats lower(Floats a, Floats b) { return a < b ? a : b; }
inline Floats higher(Floats a, Floats b) { return a > b ? a : b; }
inline float sum(Floats v) {
  typedef float Four __attribute__((vector_size(16)));
  Four part[kLanes / 4];
  std::memcpy(part, &v, sizeof(v));
  for (int n = kLanes / 8; n > 0; n /= 2)
    for (int k = 0; k < n; ++k) part[k] += part[k + n];
  return (part[0][0] + part[0][2]) + (part[0][1] + part[0][3]);
}
inline Ints gather(const uint32_t* base, Ints index) {
#if defined(__AVX512F__)
  return (Ints)_mm512_i32gather_epi32((__m512i)index, base, 4);
#elif defined(__AVX2__)
  return (Ints)_mm256_i32gather_epi32(reinterpret_cast<const int*>(base), (__m256i)index, 4);
#else
  Ints values;
  for (int k = 0; k < kLanes; ++k) values[k] = static_cast<int32_t>(base[index[k]]);
  return values;
#endif
}

struct PatchShape {
  float dx[kSamples], dy[kSamples], weight[kSamples];

  // On odd offsets -5 … 5, or, for edges, on -3 … 3 without the middle lines.
  explicit PatchShape(bool fine) {
    const int wide[6] = {-5, -3, -1, 1, 3, 5}, narrow[6] = {-3, -2, -1, 1, 2, 3};
    const int* offsets = fine ? narrow : wide;
    const int reach = offsets[5];  // pixels, and the bell's sigma
    int k = 0;
    auto add = [&](int x, int y) {
      dx[k] = static_cast<float>(x);
      dy[k] = static_cast<float>(y);
      weight[k++] = std::exp(-static_cast<float>(x * x + y * y) / (2.0f * static_cast<float>(reach * reach)));
    };
    for (int i = 0; i < 6; ++i)
      for (int j = 0; j < 6; ++j)
        if (offsets[i] * offsets[i] + offsets[j] * offsets[j] < 2 * reach * reach) add(offsets[j], offsets[i]);
  }
};

struct Patch {
  const PatchShape* shape;
  Floats centred[kVectors];  // weight * (grey - mean)
  Floats weight[kVectors];   // sums to 1
  float variance;

  Patch(const PatchShape& shape, const float* grey, int width, int height, int x, int y) : shape(&shape) {
    float value[kSamples], inside[kSamples], weights[kSamples];
    const float middle = grey[static_cast<size_t>(y) * width + x];
    float total = 0, mean = 0;
    for (int k = 0; k < kSamples; ++k) {
      const int u = x + static_cast<int>(shape.dx[k]), v = y + static_cast<int>(shape.dy[k]);
      const int u_in = std::min(std::max(u, 0), width - 1), v_in = std::min(std::max(v, 0), height - 1);
      value[k] = grey[static_cast<size_t>(v_in) * width + u_in];
      inside[k] = u == u_in && v == v_in ? 1.0f : 0.0f;  // beyond the border there is nothing to compare
    }
    for (int k = 0; k < kSamples; ++k) {  // a bell without an exponential, so that it is done eight at a time
      const float difference = (value[k] - middle) * (1.0f / kColourSigma);
      const float fall = 1.0f / (1.0f + 0.25f * difference * difference);
      weights[k] = inside[k] * shape.weight[k] * fall * fall;
    }
    for (int k = 0; k < kSamples; ++k) {
      total += weights[k];
      mean += weights[k] * value[k];
    }
    mean /= total;
    const float scale = 1.0f / total;
    variance = 0;
    for (int k = 0; k < kSamples; ++k) {
      weights[k] *= scale;
      const float difference = value[k] - mean;
      value[k] = weights[k] * difference;
      variance += value[k] * difference;
    }
    std::memcpy(centred, value, sizeof(value));
    std::memcpy(weight, weights, sizeof(weights));
  }
};

// A source photo as seen from the reference.
struct Source {
  int width, height;
  const uint32_t* quads;
  const float* planes;            // its own depth map for the geometric term, or null
  float A[9], b[3];               // q ~ A p + b w
  float A_back[9], b_back[3];     // p ~ A_back q + b_back / depth of q

  Source(const View& reference, const ViewData& data) : width(data.width), height(data.height), quads(data.quads), planes(data.planes) {
    const View view(data);
    double R[9], Rt[9], t[3], back[3];  // source from reference, and the inverse
    for (int r = 0; r < 3; ++r) {
      for (int c = 0; c < 3; ++c) {
        R[3 * r + c] = 0;
        for (int m = 0; m < 3; ++m) R[3 * r + c] += view.R[3 * r + m] * reference.R[3 * c + m];
        Rt[3 * c + r] = R[3 * r + c];
      }
      t[r] = view.t[r];
      for (int m = 0; m < 3; ++m) t[r] -= R[3 * r + m] * reference.t[m];
    }
    for (int r = 0; r < 3; ++r) back[r] = -(Rt[3 * r] * t[0] + Rt[3 * r + 1] * t[1] + Rt[3 * r + 2] * t[2]);
    compose(view, reference, R, t, A, b);
    compose(reference, view, Rt, back, A_back, b_back);
  }

 private:
  static void compose(const View& to, const View& from, const double* R, const double* t, float* A, float* b) {
    double M[9];  // K_to R
    for (int c = 0; c < 3; ++c) {
      M[c] = to.fx * R[c] + to.cx * R[6 + c];
      M[3 + c] = to.fy * R[3 + c] + to.cy * R[6 + c];
      M[6 + c] = R[6 + c];
    }
    for (int r = 0; r < 3; ++r) {  // times K_from^-1
      A[3 * r] = static_cast<float>(M[3 * r] / from.fx);
      A[3 * r + 1] = static_cast<float>(M[3 * r + 1] / from.fy);
      A[3 * r + 2] = static_cast<float>(M[3 * r + 2] - M[3 * r] * from.cx / from.fx - M[3 * r + 1] * from.cy / from.fy);
    }
    b[0] = static_cast<float>(to.fx * t[0] + to.cx * t[2]);
    b[1] = static_cast<float>(to.fy * t[1] + to.cy * t[2]);
    b[2] = static_cast<float>(t[2]);
  }
};

// 1 - NCC of the patch at (px, py) and its image in the source; kWorstCost where the source does not see its centre.
inline float match_cost(const Patch& patch, const Source& source, float px, float py, const Plane& plane) {
  float q[3], along_x[3], along_y[3];
  for (int r = 0; r < 3; ++r) {
    q[r] = source.A[3 * r] * px + source.A[3 * r + 1] * py + source.A[3 * r + 2] + source.b[r] * plane.w;
    along_x[r] = source.A[3 * r] + source.b[r] * plane.gx;
    along_y[r] = source.A[3 * r + 1] + source.b[r] * plane.gy;
  }
  if (!(q[2] > 1e-6f)) return kWorstCost;
  const float inverse = 1.0f / q[2], u = q[0] * inverse, v = q[1] * inverse;
  if (!(u > 0.0f && v > 0.0f && u < static_cast<float>(source.width) && v < static_cast<float>(source.height))) return kWorstCost;
  // Within a patch the homography is taken as affine: over 5 pixels the rest is some hundredths of a pixel.
  const float ux = (along_x[0] - u * along_x[2]) * inverse, uy = (along_y[0] - u * along_y[2]) * inverse;
  const float vx = (along_x[1] - v * along_x[2]) * inverse, vy = (along_y[1] - v * along_y[2]) * inverse;
  const Floats zero = all(0.0f), max_u = all(static_cast<float>(source.width) - 1.001f), max_v = all(static_cast<float>(source.height) - 1.001f);
  const Floats u0 = all(u - 0.5f), v0 = all(v - 0.5f);
  const Ints stride = (Ints){} + source.width;
  Floats mean = zero, square = zero, cross = zero;
  for (int k = 0; k < kVectors; ++k) {
    Floats dx, dy;
    std::memcpy(&dx, patch.shape->dx + k * kLanes, sizeof(dx));
    std::memcpy(&dy, patch.shape->dy + k * kLanes, sizeof(dy));
    // Samples beyond the source's border repeat it.
    const Floats su = lower(higher(u0 + ux * dx + uy * dy, zero), max_u);
    const Floats sv = lower(higher(v0 + vx * dx + vy * dy, zero), max_v);
    const Ints iu = __builtin_convertvector(su, Ints), iv = __builtin_convertvector(sv, Ints);
    const Floats fu = su - __builtin_convertvector(iu, Floats), fv = sv - __builtin_convertvector(iv, Floats);
    const Ints taps = gather(source.quads, iv * stride + iu);
    const Floats t00 = __builtin_convertvector(taps & 255, Floats), t10 = __builtin_convertvector((taps >> 8) & 255, Floats);
    const Floats t01 = __builtin_convertvector((taps >> 16) & 255, Floats), t11 = __builtin_convertvector((taps >> 24) & 255, Floats);
    const Floats top = t00 + (t10 - t00) * fu, bottom = t01 + (t11 - t01) * fu;
    const Floats sample = top + (bottom - top) * fv;
    const Floats weighted = patch.weight[k] * sample;
    mean += weighted;
    square += weighted * sample;
    cross += patch.centred[k] * sample;
  }
  const float average = sum(mean) * (1.0f / 255.0f);
  const float variance = std::max(sum(square) * (1.0f / 65025.0f) - average * average, 0.0f);
  const float covariance = sum(cross) * (1.0f / 255.0f);
  const float ncc = covariance / std::sqrt((variance + kNoiseVariance) * (patch.variance + kNoiseVariance));
  return 1.0f - std::min(std::max(ncc, -1.0f), 1.0f);
}

// Pixels between a point and its round trip through the source's own depth map; at most 3, and 3 where that map is empty.
inline float round_trip(const Source& source, float px, float py, float w) {
  constexpr float kMost = 3.0f;
  const float* A = source.A;
  const float* B = source.A_back;
  const float z = A[6] * px + A[7] * py + A[8] + source.b[2] * w;
  if (!(z > 1e-6f)) return kMost;
  const float u = (A[0] * px + A[1] * py + A[2] + source.b[0] * w) / z;
  const float v = (A[3] * px + A[4] * py + A[5] + source.b[1] * w) / z;
  if (!(u > 0.0f && v > 0.0f && u < static_cast<float>(source.width) && v < static_cast<float>(source.height))) return kMost;
  const int iu = static_cast<int>(u), iv = static_cast<int>(v);
  const float* plane = source.planes + 3 * (static_cast<size_t>(iv) * source.width + iu);
  if (!(plane[0] > 0.0f)) return kMost;
  const float there = plane[0] + plane[1] * (u - static_cast<float>(iu) - 0.5f) + plane[2] * (v - static_cast<float>(iv) - 0.5f);
  const float back = B[6] * u + B[7] * v + B[8] + source.b_back[2] * there;
  if (!(back > 1e-6f)) return kMost;
  const float x = (B[0] * u + B[1] * v + B[2] + source.b_back[0] * there) / back;
  const float y = (B[3] * u + B[4] * v + B[5] + source.b_back[1] * there) / back;
  return std::min(std::sqrt((x - px) * (x - px) + (y - py) * (y - py)), kMost);
}

}  // namespace s2d
