// SPDX-License-Identifier: Apache-2.0
// What a GPU can do at best: chains of multiply-adds that do not wait for one another, for benchmarks/gpu_kernels.py.
extern "C" __global__ void __launch_bounds__(256) fma_peak(float* out, int rounds) {
  float chains[16];
  for (int k = 0; k < 16; ++k) chains[k] = threadIdx.x + k;
  for (int r = 0; r < rounds; ++r) {
#pragma unroll
    for (int k = 0; k < 16; ++k) chains[k] = __fmaf_rn(chains[k], 0.999f, 0.5f);
  }
  float sum = 0.0f;
  for (int k = 0; k < 16; ++k) sum += chains[k];
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}
