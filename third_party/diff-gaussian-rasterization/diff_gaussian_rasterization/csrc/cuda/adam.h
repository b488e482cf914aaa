// SPDX-License-Identifier: Apache-2.0
// One number under Adam: the formula of csrc/cpu/adam.cpp, without bias correction (which is the caller's, in lr and eps).
#pragma once

namespace s2d {

struct AdamRates {
  float lr, beta1, beta2, rest1, rest2, eps;  // rest = 1 - beta
};

__device__ __forceinline__ void adam(const AdamRates& rates, float grad, float& param, float& exp_avg, float& exp_avg_sq) {
  const float old_m = exp_avg, old_v = exp_avg_sq;
  // Colour coefficients of a degree that is not in use yet: nothing would change, so nothing need be written.
  if (grad == 0.0f && old_m == 0.0f && old_v == 0.0f) return;
  const float m = __fmaf_rn(rates.beta1, old_m, rates.rest1 * grad);
  const float v = __fmaf_rn(rates.beta2, old_v, rates.rest2 * grad * grad);
  param = __fmaf_rn(-rates.lr, m / (sqrtf(v) + rates.eps), param);
  exp_avg = m;
  exp_avg_sq = v;
}

// Four neighbours, of which the bits in `seen` are updated. The pointers are on 16 bytes.
__device__ __forceinline__ void adam_four(const AdamRates& rates, unsigned seen, float4 grad, float* param, float* exp_avg,
                                          float* exp_avg_sq) {
  if (!seen) return;
  float4* const to[3] = {reinterpret_cast<float4*>(param), reinterpret_cast<float4*>(exp_avg), reinterpret_cast<float4*>(exp_avg_sq)};
  float4 p = *to[0], m = *to[1], v = *to[2];
  if (seen & 1) adam(rates, grad.x, p.x, m.x, v.x);
  if (seen & 2) adam(rates, grad.y, p.y, m.y, v.y);
  if (seen & 4) adam(rates, grad.z, p.z, m.z, v.z);
  if (seen & 8) adam(rates, grad.w, p.w, m.w, v.w);
  *to[0] = p, *to[1] = m, *to[2] = v;
}

}  // namespace s2d
