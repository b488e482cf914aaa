// SPDX-License-Identifier: Apache-2.0
// Adam on rows of tensors that all have one row per Gaussian. The structures are part of the C ABI (mirrored in optimizer.py).
#pragma once

#include <cstdint>

namespace s2d {

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

// Update the rows [first, end) of one tensor, on the calling thread.
void adam_rows(const AdamArgs&, const AdamTensor&, int64_t first, int64_t end);

}  // namespace s2d
