// SPDX-License-Identifier: Apache-2.0
// What a training step does per Gaussian after the backward pass: Adam on the visible rows of all tensors at once, and the statistics of
// density control. A row is one Gaussian in every tensor. What is not visible is not written, and where a whole vector is not, not read.
//
// Each float is read four times (parameter, gradient, two moments) and written three times: 28 bytes against a square root, a division
// and six other operations. Memory is the limit, so the loops are plain, and no result is kept from one tensor for the next.
#include <algorithm>

#include "abi.h"
#include "parallel.h"

#include "simd.h"

namespace s2d {
namespace {

// Per task. A multiple of LANES: where vectors begin does not depend on the number of threads. Long runs of each tensor: four streams are
// read at once, and each has to get going again in every task (1.24 ms a step with 512 rows, 0.92 with 2048; 60,000 rows of 38 floats).
constexpr int64_t ROWS = 2048;
constexpr int64_t FLOATS = 1024;  // whose visibility is spread out at a time

struct AdamTensor {
  float* param;
  const float* grad;
  float *exp_avg, *exp_avg_sq;
  int64_t width;  // floats in a row
  double lr, beta1, beta2, eps;
};

struct AdamArgs {
  int64_t n;  // rows
  int64_t num_tensors;
  const AdamTensor* tensors;
  const void* visible;    // [N] a row is visible where this is > 0; null: all are
  int64_t visible_bytes;  // of an element: 4 (int32, the radii of a render) or 1 (bool)
};

struct Constants {
  F lr, beta1, beta2, rest1, rest2, eps;
  explicit Constants(const AdamTensor& t)
      : lr(static_cast<float>(t.lr)),
        beta1(static_cast<float>(t.beta1)),
        beta2(static_cast<float>(t.beta2)),
        rest1(static_cast<float>(1.0 - t.beta1)),
        rest2(static_cast<float>(1.0 - t.beta2)),
        eps(static_cast<float>(t.eps)) {}
};

// seen[r] = 1 where row first + r is visible, else 0. Returns whether any is.
bool visible_rows(const AdamArgs& args, int64_t first, int64_t count, float* seen) {
  const int32_t* radii = args.visible_bytes == 4 ? static_cast<const int32_t*>(args.visible) : nullptr;
  const uint8_t* flags = args.visible_bytes == 1 ? static_cast<const uint8_t*>(args.visible) : nullptr;
  bool any_visible = false;
  for (int64_t r = 0; r < count; ++r) {
    const bool visible = radii ? radii[first + r] > 0 : flags ? flags[first + r] != 0 : true;
    seen[r] = visible ? 1.0f : 0.0f;
    any_visible |= visible;
  }
  return any_visible;
}

S2D_INLINE void update(float* param, const float* grad, float* exp_avg, float* exp_avg_sq, Mask seen, const Constants& c) {
  if (!any(seen)) return;
  const F g = load(grad), m = load(exp_avg), v = load(exp_avg_sq);
  // Colour coefficients of a degree that is not in use yet: nothing would change, so nothing need be written.
  if (bits_of(abs_of(g) + abs_of(m) + v == F(0.0f)) == ALL_LANES) return;
  const F new_m = fma(c.beta1, m, c.rest1 * g);
  const F new_v = fma(c.beta2, v, c.rest2 * g * g);
  const F p = load(param);
  const F new_p = fnma(c.lr, new_m / (sqrt_of(new_v) + c.eps), p);
  store(param, select(seen, new_p, p));
  store(exp_avg, select(seen, new_m, m));
  store(exp_avg_sq, select(seen, new_v, v));
}

// The last floats of a tensor, fewer than a vector has: the same arithmetic on copies.
void update_tail(const AdamTensor& t, int64_t first, int64_t count, Mask seen, const Constants& c) {
  float param[LANES] = {}, grad[LANES] = {}, exp_avg[LANES] = {}, exp_avg_sq[LANES] = {};
  std::copy_n(t.param + first, count, param);
  std::copy_n(t.grad + first, count, grad);
  std::copy_n(t.exp_avg + first, count, exp_avg);
  std::copy_n(t.exp_avg_sq + first, count, exp_avg_sq);
  update(param, grad, exp_avg, exp_avg_sq, seen, c);
  std::copy_n(param, count, t.param + first);
  std::copy_n(exp_avg, count, t.exp_avg + first);
  std::copy_n(exp_avg_sq, count, t.exp_avg_sq + first);
}

// Rows [first, first + count) of one tensor.
void update_rows(const AdamTensor& t, int64_t first, int64_t count, const float* seen) {
  const Constants c(t);
  alignas(64) float spread[FLOATS + LANES];  // `seen` of each float
  const int64_t size = count * t.width;
  int64_t row = 0;
  for (int64_t done = 0; done < size; done += FLOATS) {
    const int64_t block = std::min(FLOATS, size - done);
    for (int64_t i = 0; i < block;) {
      const F value(seen[row]);
      const int64_t row_end = (row + 1) * t.width - done, stop = std::min(block, row_end);
      for (int64_t k = i; k < stop; k += LANES) store(spread + k, value);  // the next row overwrites what is too much
      i = stop;
      row += stop == row_end;
    }
    const int64_t begin = first * t.width + done;
    int64_t i = 0;
    for (; i + LANES <= block; i += LANES) {
      const int64_t at = begin + i;
      update(t.param + at, t.grad + at, t.exp_avg + at, t.exp_avg_sq + at, load(spread + i) > F(0.0f), c);
    }
    if (i < block) update_tail(t, begin + i, block - i, load(spread + i) > F(0.0f), c);
  }
}

}  // namespace
}  // namespace s2d

S2D_EXPORT int s2d_adam(const s2d::AdamArgs* args, int32_t num_threads) {
  using namespace s2d;
  return guarded([&] {
    parallel_for((args->n + ROWS - 1) / ROWS, num_threads, [&](int64_t task) {
      float seen[ROWS];
      const int64_t first = task * ROWS, count = std::min(ROWS, args->n - first);
      if (!visible_rows(*args, first, count, seen)) return;
      for (int64_t t = 0; t < args->num_tensors; ++t) update_rows(args->tensors[t], first, count, seen);
    });
  });
}

// Where radii[N] > 0: grad_sum[N] += |(scale_x, scale_y) * gradient[N,2]|, num_views[N] += 1.
S2D_EXPORT int s2d_add_gradient_lengths(int64_t n, const float* gradient, const int32_t* radii, float scale_x, float scale_y,
                                        float* grad_sum, float* num_views, int32_t num_threads) {
  using namespace s2d;
  constexpr int64_t GRAIN = 16384;
  return guarded([&] {
    parallel_for((n + GRAIN - 1) / GRAIN, num_threads, [&](int64_t task) {
      const int64_t end = std::min(n, (task + 1) * GRAIN);
      for (int64_t i = task * GRAIN; i < end; ++i) {
        const float x = scale_x * gradient[2 * i], y = scale_y * gradient[2 * i + 1];
        const float length = __builtin_sqrtf(x * x + y * y);
        grad_sum[i] += radii[i] > 0 ? length : 0.0f;
        num_views[i] += radii[i] > 0 ? 1.0f : 0.0f;
      }
    });
  });
}
