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
extern "C" __global__ void adam_rows(long long n, int width, float* param, const float* grad, float* exp_avg, float* exp_avg_sq,
                                     const void* visible, int visible_bytes, float lr, float beta1, float beta2, float rest1,
                                     float rest2, float eps);
