// SPDX-License-Identifier: Apache-2.0
// Kernels with one mistake each, for test_emulator.py.

extern "C" __global__ void write_behind(float* out) { out[threadIdx.x] = 1.0f; }

extern "C" __global__ void read_before(float* out) { out[threadIdx.x % 64] = out[static_cast<int>(threadIdx.x) - 1000]; }

extern "C" __global__ void unaligned(float* out) {
  // Through volatile, so that the compiler keeps the vector.
  if (threadIdx.x == 0) *reinterpret_cast<volatile int*>(out) = 0;
  const float4* from = reinterpret_cast<const float4*>(out + 1);
  *reinterpret_cast<float4*>(out + 8) = *from;
}

extern "C" __global__ void exit_before_barrier(float* out) {
  if (threadIdx.x == 40) return;
  __syncthreads();
  out[threadIdx.x % 64] = 1.0f;
}

extern "C" __global__ void barrier_in_branch(float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    out[0] = 1.0f;
    __syncthreads();
  }
}

extern "C" __global__ void exit_before_shuffle(float* out) {
  if (threadIdx.x == 7) return;
  out[threadIdx.x % 64] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

extern "C" __global__ void ballot_of_another(float* out) { out[threadIdx.x % 64] = __ballot_sync(0x0000ffffu, 1); }

extern "C" __global__ void missing_barrier(float* out) {
  __shared__ float values[64];
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = values[63 - threadIdx.x] + (threadIdx.x > 31 ? 0.0f : 1.0f);
  values[threadIdx.x] = -1.0f;
}

// The warps must wait for one another, not each for its own lanes.
extern "C" __global__ void barrier_of_the_warp_alone(float* out) {
  __shared__ float values[64];
  values[threadIdx.x] = 1.0f;
  __syncwarp();
  out[threadIdx.x] = values[63 - threadIdx.x];
  __syncthreads();
  values[threadIdx.x] = 0.0f;
}

// No mistake here.
extern "C" __global__ void together(float* out) {
  __shared__ int values[64];
  const int lane = threadIdx.x % 32;
  values[threadIdx.x] = threadIdx.x;
  __syncthreads();
  const int mirrored = values[63 - threadIdx.x];
  const bool all = __all_sync(0xffffffffu, lane < 32), any = __any_sync(0xffffffffu, lane == 9);
  const int shuffled = __shfl_xor_sync(0xffffffffu, lane, 5), eighth = __shfl_sync(0xffffffffu, lane, 8);
  const bool block = __syncthreads_and(threadIdx.x < 64);
  out[threadIdx.x] = static_cast<float>(32 * (all + any + block) + shuffled + 100 * eighth + 10000 * mirrored);
}
