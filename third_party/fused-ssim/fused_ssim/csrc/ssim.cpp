// SPDX-License-Identifier: Apache-2.0
// Mean structural similarity of image planes, and its gradient with respect to the first image.
//
// Per pixel, with G the 11x11 Gaussian window (separable) and zeros outside the image:
//   m1 = G*x, m2 = G*y, q = G*(x^2 + y^2), p = G*(x y)
//   S = A B / (C D),  A = 2 m1 m2 + C1,  B = 2 (p - m1 m2) + C2,  C = m1^2 + m2^2 + C1,  D = q - m1^2 - m2^2 + C2
// The variances enter S only through their sum, so four blurs are enough. With an upstream gradient g per pixel:
//   dL/dx = G*(g dS/dm1) + 2 x G*(g dS/dq) + y G*(g dS/dp)
// (G is symmetric, and the zeros outside make the blur its own adjoint). The forward pass keeps the three partial maps.
//
// Work is cut into strips of rows, each copied with its halo into a scratch padded with zeros, so that the inner loops
// have no edges: first down the columns, then along the row. A pixel's arithmetic does not depend on the strip or thread.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "abi.h"
#include "parallel.h"

namespace {

constexpr int kTaps = 11;
constexpr int kHalf = kTaps / 2;
constexpr int kStrip = 32;  // rows: small enough for the L2 cache, large enough that the halo of 10 is cheap
constexpr float kC1 = 0.01f * 0.01f;
constexpr float kC2 = 0.03f * 0.03f;
// exp(-i^2 / (2 * 1.5^2)) for i = -5 ... 5, normalised to sum 1.
constexpr float kWindow[kTaps] = {0.00102838008f, 0.00759875814f, 0.0360007721f, 0.109360690f,
                                  0.213005538f,   0.266011725f,   0.213005538f,  0.109360690f,
                                  0.0360007721f,  0.00759875814f, 0.00102838008f};

// Eight pixels. Written with vectors because Clang does not vectorise a loop around the taps by itself.
constexpr int kLanes = 8;
typedef float Vec __attribute__((vector_size(4 * kLanes)));

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }

inline int round_up(int width) { return (width + kLanes - 1) / kLanes * kLanes; }

struct Strip {
  int plane, begin, end;  // rows
};

std::vector<Strip> make_strips(int planes, int height) {
  std::vector<Strip> strips;
  for (int p = 0; p < planes; ++p) {
    for (int r = 0; r < height; r += kStrip) strips.push_back({p, r, std::min(height, r + kStrip)});
  }
  return strips;
}

// Rows [begin - kHalf, end + kHalf) of an image plane with zeros outside it, `stride` floats apart.
void copy_with_halo(const float* plane, int height, int width, int stride, int begin, int end, float* out) {
  for (int r = begin - kHalf; r < end + kHalf; ++r, out += stride) {
    const int copied = r < 0 || r >= height ? 0 : width;
    if (copied) std::memcpy(out, plane + int64_t{r} * width, sizeof(float) * width);
    std::fill(out + copied, out + stride, 0.f);
  }
}

// Eight neighbouring pixels of a row that starts with kHalf zeros.
inline Vec blur_row(const float* padded) {
  Vec sum = kWindow[0] * load(padded);
  for (int k = 1; k < kTaps; ++k) sum += kWindow[k] * load(padded + k);
  return sum;
}

}  // namespace

// x, y [planes, height, width]. Writes S to ssim_map and sums of its rows to row_sums [planes, height] (either may be null),
// and the partials to dm1, dq, dp (all three or none). Pixels nearer than `margin` to an edge count as zero: in the map, the
// sums and the partials. Returns 0, or 1 when memory runs out, as below.
S2D_EXPORT int s2d_ssim_forward(const float* x, const float* y, int32_t planes, int32_t height, int32_t width,
                                int32_t margin, int32_t num_threads, float* ssim_map, double* row_sums, float* dm1,
                                float* dq, float* dp) {
  return s2d::guarded([&] {
    const std::vector<Strip> strips = make_strips(planes, height);
    const int64_t plane_size = int64_t{height} * width;
    const int stride = round_up(width);
    const int padded = stride + 2 * kHalf;
    s2d::parallel_for(int64_t(strips.size()), num_threads, [&](int64_t task) {
      const Strip strip = strips[task];
      const size_t halo_size = size_t(strip.end - strip.begin + 2 * kHalf) * stride;
      std::vector<float> scratch(2 * halo_size);
      float* const xs = scratch.data();
      float* const ys = xs + halo_size;
      copy_with_halo(x + strip.plane * plane_size, height, width, stride, strip.begin, strip.end, xs);
      copy_with_halo(y + strip.plane * plane_size, height, width, stride, strip.begin, strip.end, ys);
      std::vector<float> columns(size_t(4) * padded, 0.f);  // blurred down the columns
      float* const v1 = columns.data();
      float* const v2 = v1 + padded;
      float* const vq = v2 + padded;
      float* const vp = vq + padded;
      std::vector<float> values(size_t(4) * stride);
      float* const s_row = values.data();
      float* const a_row = s_row + stride;
      float* const b_row = a_row + stride;
      float* const c_row = b_row + stride;

      for (int r = strip.begin; r < strip.end; ++r) {
        const bool inside = r >= margin && r < height - margin;
        const float* const xr = xs + size_t(r - strip.begin) * stride;
        const float* const yr = ys + size_t(r - strip.begin) * stride;
        for (int j = 0; inside && j < stride; j += kLanes) {
          Vec m1 = {}, m2 = {}, q = {}, p = {};
          for (int k = 0; k < kTaps; ++k) {
            const Vec xv = load(xr + j + k * stride), yv = load(yr + j + k * stride);
            const Vec wx = kWindow[k] * xv, wy = kWindow[k] * yv;
            m1 += wx;
            m2 += wy;
            q += wx * xv + wy * yv;
            p += wx * yv;
          }
          store(v1 + j + kHalf, m1);
          store(v2 + j + kHalf, m2);
          store(vq + j + kHalf, q);
          store(vp + j + kHalf, p);
        }
        for (int j = 0; inside && j < stride; j += kLanes) {
          const Vec m1 = blur_row(v1 + j), m2 = blur_row(v2 + j), q = blur_row(vq + j), p = blur_row(vp + j);
          const Vec mm = m1 * m2, ss = m1 * m1 + m2 * m2;
          const Vec A = 2.f * mm + kC1, B = 2.f * (p - mm) + kC2, C = ss + kC1, D = q - ss + kC2;
          const Vec inverse = 1.f / (C * D);
          const Vec S = A * B * inverse;
          store(s_row + j, S);
          store(a_row + j, 2.f * inverse * (m2 * (B - A) + m1 * S * (C - D)));
          store(b_row + j, -S * C * inverse);
          store(c_row + j, 2.f * A * inverse);
        }
        const int first = inside ? margin : width, last = inside ? width - margin : width;
        for (float* row : {s_row, a_row, b_row, c_row}) {
          std::fill(row, row + first, 0.f);
          std::fill(row + last, row + stride, 0.f);
        }
        if (row_sums) {
          double lanes[kLanes] = {};
          for (int j = 0; j < stride; j += kLanes) {
            for (int l = 0; l < kLanes; ++l) lanes[l] += double(s_row[j + l]);
          }
          double sum = 0.0;
          for (int l = 0; l < kLanes; ++l) sum += lanes[l];
          row_sums[int64_t{strip.plane} * height + r] = sum;
        }
        const int64_t offset = strip.plane * plane_size + int64_t{r} * width;
        const size_t bytes = sizeof(float) * width;
        if (ssim_map) std::memcpy(ssim_map + offset, s_row, bytes);
        if (dm1) {
          std::memcpy(dm1 + offset, a_row, bytes);
          std::memcpy(dq + offset, b_row, bytes);
          std::memcpy(dp + offset, c_row, bytes);
        }
      }
    });
  });
}

// dL/dx [planes, height, width] from the partials of the forward pass. The upstream gradient is scale * g_map, or scale
// everywhere where g_map is null.
S2D_EXPORT int s2d_ssim_backward(const float* x, const float* y, const float* dm1, const float* dq, const float* dp,
                                 const float* g_map, float scale, int32_t planes, int32_t height, int32_t width,
                                 int32_t num_threads, float* grad_x) {
  return s2d::guarded([&] {
    const std::vector<Strip> strips = make_strips(planes, height);
    const int64_t plane_size = int64_t{height} * width;
    const int stride = round_up(width);
    const int padded = stride + 2 * kHalf;
    s2d::parallel_for(int64_t(strips.size()), num_threads, [&](int64_t task) {
      const Strip strip = strips[task];
      const size_t halo_size = size_t(strip.end - strip.begin + 2 * kHalf) * stride;
      std::vector<float> scratch((g_map ? 4 : 3) * halo_size);
      float* const as = scratch.data();
      float* const bs = as + halo_size;
      float* const cs = bs + halo_size;
      const int64_t plane_offset = strip.plane * plane_size;
      copy_with_halo(dm1 + plane_offset, height, width, stride, strip.begin, strip.end, as);
      copy_with_halo(dq + plane_offset, height, width, stride, strip.begin, strip.end, bs);
      copy_with_halo(dp + plane_offset, height, width, stride, strip.begin, strip.end, cs);
      if (g_map) {
        float* const gs = cs + halo_size;
        copy_with_halo(g_map + plane_offset, height, width, stride, strip.begin, strip.end, gs);
        for (size_t i = 0; i < halo_size; ++i) {
          as[i] *= gs[i];
          bs[i] *= gs[i];
          cs[i] *= gs[i];
        }
      }
      std::vector<float> columns(size_t(3) * padded, 0.f);
      float* const va = columns.data();
      float* const vb = va + padded;
      float* const vc = vb + padded;
      std::vector<float> rows(size_t(3) * stride, 0.f);  // copies whose width is a multiple of the lanes
      float* const x_row = rows.data();
      float* const y_row = x_row + stride;
      float* const out_row = y_row + stride;
      for (int r = strip.begin; r < strip.end; ++r) {
        const size_t row = size_t(r - strip.begin) * stride;
        for (int j = 0; j < stride; j += kLanes) {
          Vec a = {}, b = {}, c = {};
          for (int k = 0; k < kTaps; ++k) {
            const size_t at = row + j + size_t(k) * stride;
            a += kWindow[k] * load(as + at);
            b += kWindow[k] * load(bs + at);
            c += kWindow[k] * load(cs + at);
          }
          store(va + j + kHalf, a);
          store(vb + j + kHalf, b);
          store(vc + j + kHalf, c);
        }
        const int64_t offset = plane_offset + int64_t{r} * width;
        std::memcpy(x_row, x + offset, sizeof(float) * width);
        std::memcpy(y_row, y + offset, sizeof(float) * width);
        for (int j = 0; j < stride; j += kLanes) {
          const Vec a = blur_row(va + j), b = blur_row(vb + j), c = blur_row(vc + j);
          store(out_row + j, scale * (a + 2.f * load(x_row + j) * b + load(y_row + j) * c));
        }
        std::memcpy(grad_x + offset, out_row, sizeof(float) * width);
      }
    });
  });
}
