// SPDX-License-Identifier: Apache-2.0
// One float per thread as the arithmetic type of csrc/common, and what else all kernels of the rasteriser share.
//
// No kernel uses dynamic shared memory, and none lets a thread return before the last barrier of its block: besides GPUs they run, thread
// by thread, in an emulator on the CPU (tests/cuda_emulation), which checks that.
#pragma once

#include "constants.h"

namespace s2d {

typedef long long int64;

constexpr unsigned FULL_WARP = 0xffffffffu;
constexpr int WARP = 32;
constexpr int SPLAT_WIDTH = 12;  // floats of a record: x, y, s1, s2, s3, log2_opacity, r, g, b, aux, and two unused
constexpr int TILE = 16;         // pixels
// A warp draws a block of 8 x 4 pixels, of which a tile has two columns and four rows.
constexpr int BLOCK_W = 8, BLOCK_H = 4;
constexpr int SEGMENT = 256;  // instances of a tile between two saved states
constexpr int STATE_SUMS = 6;  // floats of a pixel in such a state: T, sum of weights, r, g, b, aux
constexpr int NOT_DRAWN = 0x7fffffff;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

// ---- the arithmetic type -----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float sqrt_of(float a) { return sqrtf(a); }
__device__ __forceinline__ float exp_of(float a) { return expf(a); }
__device__ __forceinline__ float log2_of(float a) { return log2f(a); }
__device__ __forceinline__ float abs_of(float a) { return fabsf(a); }
// The larger (smaller) of two; b where a is not a number.
__device__ __forceinline__ float max_of(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ float min_of(float a, float b) { return fminf(a, b); }
__device__ __forceinline__ float clamp_to(float a, float low, float high) { return fminf(fmaxf(a, low), high); }
__device__ __forceinline__ float select(bool condition, float yes, float no) { return condition ? yes : no; }
__device__ __forceinline__ bool is_finite(float a) { return fabsf(a) < infinity(); }

// ---- approximations, where they are good enough: relative error below 3e-7 ----------------------------------------------------------

__device__ __forceinline__ float fast_exp2(float a) {
#ifdef __CUDA_ARCH__
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(a));
  return out;
#else
  return exp2f(a);
#endif
}

__device__ __forceinline__ float fast_reciprocal(float a) {
#ifdef __CUDA_ARCH__
  float out;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(a));
  return out;
#else
  return 1.0f / a;
#endif
}

__device__ __forceinline__ float fast_sqrt(float a) {
#ifdef __CUDA_ARCH__
  float out;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(a));
  return out;
#else
  return sqrtf(a);
#endif
}

// ---- records -----------------------------------------------------------------------------------------------------------------------

struct Splat {
  float x, y, s1, s2, s3, log2_opacity, r, g, b, aux;
};

__device__ __forceinline__ Splat load_splat(const float* __restrict__ splats, int64 index) {
  const float4* record = reinterpret_cast<const float4*>(splats + SPLAT_WIDTH * index);
  const float4 first = record[0], second = record[1];
  const float2 third = *reinterpret_cast<const float2*>(record + 2);
  return {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w, third.x, third.y};
}

}  // namespace s2d

// After the functions on floats: templates find those of built-in types only if they are declared before.
#include "gaussian.h"
#include "sh.h"
