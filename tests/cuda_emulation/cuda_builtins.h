// What CUDA C++ has built in, in terms of C++17 and scheduler.h: enough to compile the kernels of third_party as they are. Included before
// a .cu file by the source that emulation.py writes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __align__(n) __attribute__((aligned(n)))
// Blocks run one after another, so a block's memory may be the program's.
#define __shared__ static

struct Dim3 {
  unsigned x, y, z;
};
extern Dim3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <class T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
inline T max(T a, T b) {
  return a < b ? b : a;
}

inline float __int_as_float(int a) {
  float out;
  std::memcpy(&out, &a, sizeof out);
  return out;
}
inline int __float_as_int(float a) {
  int out;
  std::memcpy(&out, &a, sizeof out);
  return out;
}
inline int __ffs(unsigned a) { return __builtin_ffs(static_cast<int>(a)); }
inline int __clz(unsigned a) { return a ? __builtin_clz(a) : 32; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }

template <class T>
inline T atomicAdd(T* to, T value) {
  const T before = *to;
  *to += value;
  return before;
}

// ---- what threads do together --------------------------------------------------------------------------------------------------------

enum Together { SYNC_BLOCK, SYNC_BLOCK_AND, SYNC_WARP, BALLOT, ANY, ALL, SHUFFLE };

// Wait until all threads concerned (the block, or the lanes in `mask`) call this from the same line. `lane`: whose value is wanted.
extern "C" uint64_t emulated_together(int what, unsigned mask, uint64_t value, int lane, int line);

inline void __syncthreads(int line = __builtin_LINE()) { emulated_together(SYNC_BLOCK, 0, 0, 0, line); }
inline int __syncthreads_and(int value, int line = __builtin_LINE()) {
  return static_cast<int>(emulated_together(SYNC_BLOCK_AND, 0, value != 0, 0, line));
}
inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) { emulated_together(SYNC_WARP, mask, 0, 0, line); }
inline unsigned __ballot_sync(unsigned mask, int value, int line = __builtin_LINE()) {
  return static_cast<unsigned>(emulated_together(BALLOT, mask, value != 0, 0, line));
}
inline int __any_sync(unsigned mask, int value, int line = __builtin_LINE()) {
  return static_cast<int>(emulated_together(ANY, mask, value != 0, 0, line));
}
inline int __all_sync(unsigned mask, int value, int line = __builtin_LINE()) {
  return static_cast<int>(emulated_together(ALL, mask, value != 0, 0, line));
}
template <class T>
inline T __shfl_sync(unsigned mask, T value, int lane, int line = __builtin_LINE()) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = emulated_together(SHUFFLE, mask, bits, lane % 32, line);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int step, int line = __builtin_LINE()) {
  return __shfl_sync(mask, value, static_cast<int>(threadIdx.x % 32) ^ step, line);
}

// ---- launching -----------------------------------------------------------------------------------------------------------------------

struct Launch {
  unsigned grid[3], threads;
  int backwards;  // blocks and threads run from the last to the first
};

extern "C" int emulated_launch(void (*thread)(void*), void* arguments, const Launch* launch);

template <class... A, size_t... I>
inline void call_kernel(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<A*>(arguments[I])...);
}
template <class... A>
inline void call_kernel(void (*kernel)(A...), void** arguments) {
  call_kernel(kernel, arguments, std::index_sequence_for<A...>());
}

#define EMULATE(kernel)                                                                                                  \
  extern "C" __attribute__((visibility("default"))) int emulate_##kernel(void** arguments, const Launch* launch) {       \
    return emulated_launch([](void* a) { call_kernel(&kernel, static_cast<void**>(a)); }, arguments, launch);            \
  }
