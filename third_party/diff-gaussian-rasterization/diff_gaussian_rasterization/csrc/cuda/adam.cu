// SPDX-License-Identifier: Apache-2.0
// Adam on the visible rows of one tensor: the formula of csrc/cpu/adam.cpp. One launch per tensor.
//
// adam_rows                              grid ceil(n * width / 1024), block 256, no dynamic shared memory; not where n * width is 0
//   n                int64   rows
//   width            int32   floats in a row
//   param            in/out [n, width]
//   grad             [n, width]
//   exp_avg          in/out [n, width]
//   exp_avg_sq       in/out [n, width]
//   visible          int32 [n] (radii) or bool [n], or 0: all rows; a row is visible where it is > 0
//   visible_bytes    int32   4 or 1
//   lr, beta1, beta2, rest1, rest2, eps      float32; rest1 = 1 - beta1 and rest2 = 1 - beta2, rounded from float64
// The four tensors must start on addresses that divide by 16, as torch's own allocations do.
#include "adam.h"

namespace s2d {

constexpr int PER_THREAD = 4;  // floats: 16 bytes of each of the four streams

__device__ __forceinline__ bool is_visible(const void* __restrict__ visible, int bytes, long long row) {
  if (!visible) return true;
  return bytes == 4 ? static_cast<const int*>(visible)[row] > 0 : static_cast<const unsigned char*>(visible)[row] != 0;
}

}  // namespace s2d

extern "C" __global__ void __launch_bounds__(256) adam_rows(
    long long n, int width, float* __restrict__ param, const float* __restrict__ grad, float* __restrict__ exp_avg,
    float* __restrict__ exp_avg_sq, const void* __restrict__ visible, int visible_bytes, float lr, float beta1, float beta2,
    float rest1, float rest2, float eps) {
  using namespace s2d;
  const AdamRates rates = {lr, beta1, beta2, rest1, rest2, eps};
  const long long total = n * width, at = (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) * PER_THREAD;
  if (at >= total) return;
  long long row = at / width;
  int column = static_cast<int>(at - row * width);
  unsigned seen = 0;
#pragma unroll
  for (int k = 0; k < PER_THREAD; ++k) {
    if (at + k < total && is_visible(visible, visible_bytes, row)) seen |= 1u << k;
    if (++column == width) column = 0, ++row;
  }
  if (at + PER_THREAD <= total) {
    if (seen) adam_four(rates, seen, *reinterpret_cast<const float4*>(grad + at), param + at, exp_avg + at, exp_avg_sq + at);
  } else {
    for (int k = 0; k < PER_THREAD - 1; ++k) {
      if (seen >> k & 1) adam(rates, grad[at + k], param[at + k], exp_avg[at + k], exp_avg_sq[at + k]);
    }
  }
}
