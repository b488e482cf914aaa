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
constexpr int kLanes = 16;  // partial sums of a row; fixed, so that the sum is the same on every machine width
constexpr float kC1 = 0.01f * 0.01f;
constexpr float kC2 = 0.03f * 0.03f;
// exp(-i^2 / (2 * 1.5^2)) for i = -5 ... 5, normalised to sum 1.
constexpr float kWindow[kTaps] = {0.00102838008f, 0.00759875814f, 0.0360007721f, 0.109360689f,
                                  0.213005537f,   0.266011724f,   0.213005537f,  0.109360689f,
                                  0.0360007721f,  0.00759875814f, 0.00102838008f};

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

// Rows [begin - kHalf, end + kHalf) of an image plane, zeros outside it.
void copy_with_halo(const float* plane, int height, int width, int begin, int end, float* out) {
  for (int r = begin - kHalf; r < end + kHalf; ++r, out += width) {
    if (r < 0 || r >= height) {
      std::memset(out, 0, sizeof(float) * width);
    } else {
      std::memcpy(out, plane + int64_t{r} * width, sizeof(float) * width);
    }
  }
}

// Along a row that has kHalf zeros on each side.
inline float blur_at(const float* padded) {
  float sum = 0.f;
  for (int k = 0; k < kTaps; ++k) sum += kWindow[k] * padded[k];
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
    s2d::parallel_for(int64_t(strips.size()), num_threads, [&](int64_t task) {
      const Strip strip = strips[task];
      const int rows = strip.end - strip.begin + 2 * kHalf;
      std::vector<float> scratch(size_t(2) * rows * width);
      float* const xs = scratch.data();
      float* const ys = xs + size_t(rows) * width;
      copy_with_halo(x + strip.plane * plane_size, height, width, strip.begin, strip.end, xs);
      copy_with_halo(y + strip.plane * plane_size, height, width, strip.begin, strip.end, ys);
      const int padded = width + 2 * kHalf;
      std::vector<float> columns(size_t(4) * padded, 0.f);  // blurred down the columns
      float* __restrict const v1 = columns.data();
      float* __restrict const v2 = v1 + padded;
      float* __restrict const vq = v2 + padded;
      float* __restrict const vp = vq + padded;
      std::vector<float> values(4 * width);
      float* __restrict const s_row = values.data();
      float* __restrict const a_row = s_row + width;
      float* __restrict const b_row = a_row + width;
      float* __restrict const c_row = b_row + width;

      for (int r = strip.begin; r < strip.end; ++r) {
        const int64_t offset = strip.plane * plane_size + int64_t{r} * width;
        const bool inside = r >= margin && r < height - margin;
        const int first = std::min(margin, width), last = std::max(first, width - margin);
        std::fill(s_row, s_row + 4 * width, 0.f);
        if (inside) {
          const float* __restrict const xr = xs + size_t(r - strip.begin) * width;
          const float* __restrict const yr = ys + size_t(r - strip.begin) * width;
          for (int j = 0; j < width; ++j) {
            float m1 = 0.f, m2 = 0.f, q = 0.f, p = 0.f;
            for (int k = 0; k < kTaps; ++k) {
              const float xv = xr[j + k * width], yv = yr[j + k * width];
              const float wx = kWindow[k] * xv, wy = kWindow[k] * yv;
              m1 += wx;
              m2 += wy;
              q += wx * xv + wy * yv;
              p += wx * yv;
            }
            v1[j + kHalf] = m1;
            v2[j + kHalf] = m2;
            vq[j + kHalf] = q;
            vp[j + kHalf] = p;
          }
          for (int j = first; j < last; ++j) {
            const float m1 = blur_at(v1 + j), m2 = blur_at(v2 + j), q = blur_at(vq + j), p = blur_at(vp + j);
            const float mm = m1 * m2, ss = m1 * m1 + m2 * m2;
            const float A = 2.f * mm + kC1, B = 2.f * (p - mm) + kC2, C = ss + kC1, D = q - ss + kC2;
            const float S = A * B / (C * D);
            s_row[j] = S;
            a_row[j] = 2.f * (m2 * (B - A) / (C * D) + m1 * S * (1.f / D - 1.f / C));
            b_row[j] = -S / D;
            c_row[j] = 2.f * A / (C * D);
          }
        }
        if (row_sums) {
          double lanes[kLanes] = {};
          int j = 0;
          for (; j + kLanes <= width; j += kLanes) {
            for (int l = 0; l < kLanes; ++l) lanes[l] += double(s_row[j + l]);
          }
          for (int l = 0; j < width; ++j, ++l) lanes[l] += double(s_row[j]);
          double sum = 0.0;
          for (int l = 0; l < kLanes; ++l) sum += lanes[l];
          row_sums[int64_t{strip.plane} * height + r] = sum;
        }
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
    s2d::parallel_for(int64_t(strips.size()), num_threads, [&](int64_t task) {
      const Strip strip = strips[task];
      const int rows = strip.end - strip.begin + 2 * kHalf;
      const size_t halo_size = size_t(rows) * width;
      std::vector<float> scratch((g_map ? 4 : 3) * halo_size);
      float* const as = scratch.data();
      float* const bs = as + halo_size;
      float* const cs = bs + halo_size;
      const int64_t plane_offset = strip.plane * plane_size;
      copy_with_halo(dm1 + plane_offset, height, width, strip.begin, strip.end, as);
      copy_with_halo(dq + plane_offset, height, width, strip.begin, strip.end, bs);
      copy_with_halo(dp + plane_offset, height, width, strip.begin, strip.end, cs);
      if (g_map) {
        float* const gs = cs + halo_size;
        copy_with_halo(g_map + plane_offset, height, width, strip.begin, strip.end, gs);
        for (size_t i = 0; i < halo_size; ++i) {
          as[i] *= gs[i];
          bs[i] *= gs[i];
          cs[i] *= gs[i];
        }
      }
      const int padded = width + 2 * kHalf;
      std::vector<float> columns(size_t(3) * padded, 0.f);
      float* __restrict const va = columns.data();
      float* __restrict const vb = va + padded;
      float* __restrict const vc = vb + padded;
      for (int r = strip.begin; r < strip.end; ++r) {
        const size_t row = size_t(r - strip.begin) * width;
        const float* __restrict const ar = as + row;
        const float* __restrict const br = bs + row;
        const float* __restrict const cr = cs + row;
        for (int j = 0; j < width; ++j) {
          float a = 0.f, b = 0.f, c = 0.f;
          for (int k = 0; k < kTaps; ++k) {
            a += kWindow[k] * ar[j + k * width];
            b += kWindow[k] * br[j + k * width];
            c += kWindow[k] * cr[j + k * width];
          }
          va[j + kHalf] = a;
          vb[j + kHalf] = b;
          vc[j + kHalf] = c;
        }
        const int64_t offset = plane_offset + int64_t{r} * width;
        const float* __restrict const xr = x + offset;
        const float* __restrict const yr = y + offset;
        float* __restrict const out = grad_x + offset;
        for (int j = 0; j < width; ++j) {
          out[j] = scale * (blur_at(va + j) + 2.f * xr[j] * blur_at(vb + j) + yr[j] * blur_at(vc + j));
        }
      }
    });
  });
}
