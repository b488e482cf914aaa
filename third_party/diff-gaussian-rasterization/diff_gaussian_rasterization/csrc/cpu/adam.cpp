// SPDX-License-Identifier: Apache-2.0
// Adam on the visible rows of all tensors at once. A row is one Gaussian in every tensor. What is not visible is not written, and
// where a whole vector is not, not read.
//
// Each float is read four times (parameter, gradient, two moments) and written three times: 28 bytes against a square root, a division
// and six other operations. Memory is the limit, so a task is a long piece of one tensor: its four streams get going once.
#include <algorithm>

#include "abi.h"
#include "parallel.h"

#include "adam.h"
#include "simd.h"

namespace s2d {
namespace {

constexpr int64_t TASK_FLOATS = 1 << 16;

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

// Bit r: row first + r is visible. Of LANES rows, or of the `count` that there are.
S2D_INLINE uint32_t visible_bits(const AdamArgs& args, int64_t first, int64_t count) {
  if (!args.visible) return count < LANES ? (1u << count) - 1 : ALL_LANES;
  if (args.visible_bytes == 4 && count >= LANES) {
    return bits_of(splat(0) < load(static_cast<const int32_t*>(args.visible) + first));
  }
  uint32_t bits = 0;
  for (int64_t r = 0; r < std::min<int64_t>(count, LANES); ++r) {
    const bool visible = args.visible_bytes == 4 ? static_cast<const int32_t*>(args.visible)[first + r] > 0
                                                 : static_cast<const uint8_t*>(args.visible)[first + r] != 0;
    bits |= static_cast<uint32_t>(visible) << r;
  }
  return bits;
}

S2D_INLINE void update(float* param, const float* grad, float* exp_avg, float* exp_avg_sq, Mask seen, const Constants& c) {
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

// For each lane of a vector that begins `offset` floats into a row: how many rows it is beyond that one.
S2D_INLINE I rows_ahead(int64_t offset, int64_t width) {
  int32_t numbers[LANES];
  for (int l = 0; l < LANES; ++l) numbers[l] = l;
  const NativeI lane = load(numbers).v;  // a constant, once compiled
  if (width >= LANES) return {-(lane >= splat(static_cast<int32_t>(std::min<int64_t>(width - offset, LANES))).v)};
  // Division by a number below 16 of one below 32, exactly.
  const int32_t inverse = static_cast<int32_t>((1 << 16) / width + 1);
  return {((lane + static_cast<int32_t>(offset)) * inverse) >> 16};
}

// A group of up to LANES rows of which not all are visible, from float `begin` of the tensor on.
void update_mixed_group(const AdamTensor& t, int64_t begin, int64_t rows, uint32_t bits, const Constants& c) {
  const int64_t size = rows * t.width;
  int64_t row = 0, offset = 0;  // of the first lane
  for (int64_t i = 0; i < size; i += LANES, offset += LANES) {
    while (offset >= t.width) ++row, offset -= t.width;
    const I ahead = rows_ahead(offset, t.width);
    const Mask seen = splat(0) < I{(splat(static_cast<int32_t>(bits >> row)).v >> ahead.v) & 1};
    if (!any(seen)) continue;
    const int64_t at = begin + i, left = size - i;
    if (left < LANES) {
      update_tail(t, at, left, seen, c);
    } else {
      update(t.param + at, t.grad + at, t.exp_avg + at, t.exp_avg_sq + at, seen, c);
    }
  }
}

}  // namespace

// In groups of LANES rows: a group is `width` whole vectors.
void adam_rows(const AdamArgs& args, const AdamTensor& t, int64_t first, int64_t end) {
  const Constants c(t);
  const Mask all = splat(0) < splat(1);
  while (first < end) {
    int64_t stop = first;
    uint32_t bits = 0;
    while (stop < end && (bits = visible_bits(args, stop, end - stop)) == ALL_LANES) stop += LANES;
    for (int64_t at = first * t.width; at < stop * t.width; at += LANES) {
      update(t.param + at, t.grad + at, t.exp_avg + at, t.exp_avg_sq + at, all, c);
    }
    if (stop < end && bits) update_mixed_group(t, stop * t.width, std::min<int64_t>(LANES, end - stop), bits, c);
    first = stop + LANES;
  }
}

namespace {

// Rows of a tensor per task: a multiple of LANES, so that where vectors begin does not depend on the number of threads.
int64_t task_rows(const AdamTensor& t) { return std::max<int64_t>(1, TASK_FLOATS / std::max<int64_t>(1, t.width) / LANES) * LANES; }

int64_t num_tasks(const AdamArgs& args, const AdamTensor& t) { return (args.n + task_rows(t) - 1) / task_rows(t); }

}  // namespace
}  // namespace s2d

S2D_EXPORT int s2d_adam(const s2d::AdamArgs* args, int32_t num_threads) {
  using namespace s2d;
  return guarded([&] {
    int64_t tasks = 0;
    for (int64_t t = 0; t < args->num_tensors; ++t) tasks += num_tasks(*args, args->tensors[t]);
    parallel_for(tasks, num_threads, [&](int64_t task) {
      const AdamTensor* tensor = args->tensors;
      for (; task >= num_tasks(*args, *tensor); ++tensor) task -= num_tasks(*args, *tensor);
      const int64_t first = task * task_rows(*tensor);
      adam_rows(*args, *tensor, first, std::min(args->n, first + task_rows(*tensor)));
    });
  });
}
