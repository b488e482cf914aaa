// SPDX-License-Identifier: Apache-2.0
// A vector of kLanes floats with the widest registers of the target: GCC/Clang vector extensions, and intrinsics for the fused
// multiply-add, which must not depend on how a compiler happens to contract a loop (same bits wherever a pixel lands).
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__) || defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define S2D_LANES 16
#define S2D_ZIP_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define S2D_ZIP_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX2__)
#define S2D_LANES 8
#define S2D_ZIP_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define S2D_ZIP_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define S2D_LANES 4
#define S2D_ZIP_LOW 0, 4, 1, 5
#define S2D_ZIP_HIGH 2, 6, 3, 7
#endif

#define S2D_INLINE inline __attribute__((always_inline))

namespace s2d {

constexpr int kLanes = S2D_LANES;
typedef float Vec __attribute__((vector_size(4 * S2D_LANES)));
typedef int32_t VecInt __attribute__((vector_size(4 * S2D_LANES)));

// A vector in memory, aligned.
struct Pack {
  Vec v;
};

S2D_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
S2D_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
S2D_INLINE Vec splat(float value) { return value - Vec{}; }

// a * b + c, in one rounding where the target can.
S2D_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if S2D_LANES == 16
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif S2D_LANES == 8 && defined(__FMA__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif S2D_LANES == 4 && defined(__ARM_FEATURE_FMA)
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// The same value, but compilers must keep it in a register: some would rather read a value that is used eleven times from memory
// eleven times. Only where there are 32 registers.
S2D_INLINE Vec in_register(Vec v) {
#if S2D_LANES == 16
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

S2D_INLINE Vec abs_of(Vec a) { return (Vec)((VecInt)a & 0x7fffffff); }
S2D_INLINE Vec keep(VecInt mask, Vec a) { return (Vec)(mask & (VecInt)a); }  // mask: -1 keeps, 0 clears
S2D_INLINE Vec sign_of(Vec a) { return keep(a > Vec{}, splat(1.f)) - keep(a < Vec{}, splat(1.f)); }

#ifdef __clang__
#define S2D_ZIP(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define S2D_ZIP(a, b, ...) __builtin_shuffle(a, b, VecInt{__VA_ARGS__})
#endif
S2D_INLINE Vec zip_low(Vec a, Vec b) { return S2D_ZIP(a, b, S2D_ZIP_LOW); }
S2D_INLINE Vec zip_high(Vec a, Vec b) { return S2D_ZIP(a, b, S2D_ZIP_HIGH); }

namespace detail {

// Zips the upper with the lower half of the rows. With the row's and the column's number written one after the other in
// binary, that rotates the bits by one place; half of the places, and rows and columns have changed roles.
template <int Places, int... I>
S2D_INLINE void rotate_bits(Vec (&v)[kLanes], std::integer_sequence<int, I...> sequence) {
  const Vec zipped[kLanes] = {
      (I % 2 ? zip_high(v[I / 2], v[I / 2 + kLanes / 2]) : zip_low(v[I / 2], v[I / 2 + kLanes / 2]))...};
  ((v[I] = zipped[I]), ...);
  if constexpr (Places > 1) rotate_bits<Places / 2>(v, sequence);
}

}  // namespace detail

// Turns kLanes rows of kLanes floats into columns.
S2D_INLINE void transpose(Vec (&v)[kLanes]) {
  detail::rotate_bits<kLanes / 2>(v, std::make_integer_sequence<int, kLanes>());
}

}  // namespace s2d
