// SPDX-License-Identifier: Apache-2.0
// A vector of LANES floats with the widest registers of the target, in terms of GCC/Clang vector extensions; intrinsics only where
// those have no word (FMA, square root, masks on AVX-512, transposed sums).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#ifndef S2D_LANES  // the tests set it, to run the narrow paths on a wide machine
#if defined(__AVX512F__) && defined(__AVX512DQ__)
#define S2D_LANES 16
#elif defined(__AVX2__)
#define S2D_LANES 8
#else
#define S2D_LANES 4
#endif
#endif

#define S2D_INLINE inline __attribute__((always_inline))

namespace s2d {

constexpr int LANES = S2D_LANES;
typedef float NativeF __attribute__((vector_size(4 * S2D_LANES)));
typedef int32_t NativeI __attribute__((vector_size(4 * S2D_LANES)));

#if S2D_LANES == 16 && defined(__AVX512F__) && defined(__AVX512DQ__)
#define S2D_AVX512 1
struct Mask {
  __mmask16 m;
};
S2D_INLINE Mask operator&(Mask a, Mask b) { return {static_cast<__mmask16>(a.m & b.m)}; }
S2D_INLINE Mask operator|(Mask a, Mask b) { return {static_cast<__mmask16>(a.m | b.m)}; }
S2D_INLINE Mask operator!(Mask a) { return {static_cast<__mmask16>(~a.m)}; }
S2D_INLINE uint32_t bits_of(Mask a) { return a.m; }
#else
struct Mask {
  NativeI m;  // 0 or -1
};
S2D_INLINE Mask operator&(Mask a, Mask b) { return {a.m & b.m}; }
S2D_INLINE Mask operator|(Mask a, Mask b) { return {a.m | b.m}; }
S2D_INLINE Mask operator!(Mask a) { return {~a.m}; }
S2D_INLINE uint32_t bits_of(Mask a) {
#if S2D_LANES == 8 && defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(a.m)));
#elif S2D_LANES == 4 && defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps(reinterpret_cast<__m128>(a.m)));
#else
  uint32_t bits = 0;
  for (int l = 0; l < LANES; ++l) bits |= static_cast<uint32_t>(a.m[l] & 1) << l;
  return bits;
#endif
}
#endif
#ifdef S2D_AVX512
constexpr Mask ALL = {0xffff};
#else
constexpr Mask ALL = {~NativeI{}};
#endif
S2D_INLINE bool any(Mask a) { return bits_of(a) != 0; }
constexpr uint32_t ALL_LANES = (1u << S2D_LANES) - 1;

struct F {
  NativeF v;
  F() = default;
  S2D_INLINE F(NativeF value) : v(value) {}
  S2D_INLINE explicit F(float value) : v(value - NativeF{}) {}
};
struct I {
  NativeI v;
};

S2D_INLINE F operator+(F a, F b) { return a.v + b.v; }
S2D_INLINE F operator-(F a, F b) { return a.v - b.v; }
S2D_INLINE F operator*(F a, F b) { return a.v * b.v; }
S2D_INLINE F operator/(F a, F b) { return a.v / b.v; }

S2D_INLINE F load(const float* p) {
  F out;
  std::memcpy(&out.v, p, sizeof out.v);
  return out;
}
S2D_INLINE void store(float* p, F a) { std::memcpy(p, &a.v, sizeof a.v); }
S2D_INLINE I load(const int32_t* p) {
  I out;
  std::memcpy(&out.v, p, sizeof out.v);
  return out;
}
S2D_INLINE void store(int32_t* p, I a) { std::memcpy(p, &a.v, sizeof a.v); }
S2D_INLINE I splat(int32_t value) { return {value - NativeI{}}; }

#ifdef S2D_AVX512
#define S2D_COMPARE(op, predicate) \
  S2D_INLINE Mask operator op(F a, F b) { return {_mm512_cmp_ps_mask((__m512)a.v, (__m512)b.v, predicate)}; }
S2D_COMPARE(<, _CMP_LT_OQ)
S2D_COMPARE(<=, _CMP_LE_OQ)
S2D_COMPARE(>, _CMP_GT_OQ)
S2D_COMPARE(>=, _CMP_GE_OQ)
S2D_COMPARE(==, _CMP_EQ_OQ)
#undef S2D_COMPARE
S2D_INLINE Mask operator<(I a, I b) { return {_mm512_cmplt_epi32_mask((__m512i)a.v, (__m512i)b.v)}; }
S2D_INLINE F select(Mask m, F yes, F no) { return (NativeF)_mm512_mask_blend_ps(m.m, (__m512)no.v, (__m512)yes.v); }
S2D_INLINE I select(Mask m, I yes, I no) { return {(NativeI)_mm512_mask_blend_epi32(m.m, (__m512i)no.v, (__m512i)yes.v)}; }
S2D_INLINE F zero_unless(Mask m, F a) { return (NativeF)_mm512_maskz_mov_ps(m.m, (__m512)a.v); }
#else
#define S2D_COMPARE(op) \
  S2D_INLINE Mask operator op(F a, F b) { return {(NativeI)(a.v op b.v)}; }
S2D_COMPARE(<)
S2D_COMPARE(<=)
S2D_COMPARE(>)
S2D_COMPARE(>=)
S2D_COMPARE(==)
#undef S2D_COMPARE
S2D_INLINE Mask operator<(I a, I b) { return {(NativeI)(a.v < b.v)}; }
S2D_INLINE I select(Mask m, I yes, I no) { return {(m.m & yes.v) | (~m.m & no.v)}; }
S2D_INLINE F select(Mask m, F yes, F no) { return (NativeF)((m.m & (NativeI)yes.v) | (~m.m & (NativeI)no.v)); }
S2D_INLINE F zero_unless(Mask m, F a) { return (NativeF)(m.m & (NativeI)a.v); }
#endif

// a * b + c in one rounding where the target can.
S2D_INLINE F fma(F a, F b, F c) {
#if S2D_LANES == 16 && defined(__AVX512F__)
  return (NativeF)_mm512_fmadd_ps((__m512)a.v, (__m512)b.v, (__m512)c.v);
#elif S2D_LANES == 8 && defined(__FMA__)
  return (NativeF)_mm256_fmadd_ps((__m256)a.v, (__m256)b.v, (__m256)c.v);
#elif S2D_LANES == 4 && defined(__FMA__)
  return (NativeF)_mm_fmadd_ps((__m128)a.v, (__m128)b.v, (__m128)c.v);
#elif S2D_LANES == 4 && defined(__ARM_FEATURE_FMA)
  return (NativeF)vfmaq_f32((float32x4_t)c.v, (float32x4_t)a.v, (float32x4_t)b.v);
#else
  return a.v * b.v + c.v;
#endif
}
S2D_INLINE F fnma(F a, F b, F c) { return fma(F(-a.v), b, c); }  // c - a * b
S2D_INLINE F fms(F a, F b, F c) { return fma(a, b, F(-c.v)); }   // a * b - c

S2D_INLINE F sqrt_of(F a) {
#if S2D_LANES == 16 && defined(__AVX512F__)
  return (NativeF)_mm512_sqrt_ps((__m512)a.v);
#elif S2D_LANES == 8 && defined(__AVX2__)
  return (NativeF)_mm256_sqrt_ps((__m256)a.v);
#elif S2D_LANES == 4 && defined(__SSE2__)
  return (NativeF)_mm_sqrt_ps((__m128)a.v);
#else
  F out;
  for (int l = 0; l < LANES; ++l) out.v[l] = __builtin_sqrtf(a.v[l]);
  return out;
#endif
}

// Reciprocal of a normal number, relative error about 1e-7.
S2D_INLINE F reciprocal(F a) {
#ifdef S2D_AVX512
  const F r = (NativeF)_mm512_rcp14_ps((__m512)a.v);
  return fma(r, fnma(a, r, F(1.0f)), r);
#else
  return F(1.0f) / a;
#endif
}

// The same where the mask is set, else 0.
S2D_INLINE F reciprocal_where(Mask m, F a) {
#ifdef S2D_AVX512
  const F r = (NativeF)_mm512_rcp14_ps((__m512)a.v), rest = fnma(a, r, F(1.0f));
  return (NativeF)_mm512_maskz_fmadd_ps(m.m, (__m512)r.v, (__m512)rest.v, (__m512)r.v);
#else
  return zero_unless(m, reciprocal(a));
#endif
}

// The smaller (larger) of two; b where one is not a number.
S2D_INLINE F min_of(F a, F b) {
#if S2D_LANES == 16 && defined(__AVX512F__)
  return (NativeF)_mm512_min_ps((__m512)a.v, (__m512)b.v);
#elif S2D_LANES == 8 && defined(__AVX2__)
  return (NativeF)_mm256_min_ps((__m256)a.v, (__m256)b.v);
#else
  return select(a < b, a, b);
#endif
}
S2D_INLINE F max_of(F a, F b) {
#if S2D_LANES == 16 && defined(__AVX512F__)
  return (NativeF)_mm512_max_ps((__m512)a.v, (__m512)b.v);
#elif S2D_LANES == 8 && defined(__AVX2__)
  return (NativeF)_mm256_max_ps((__m256)a.v, (__m256)b.v);
#else
  return select(a > b, a, b);
#endif
}
S2D_INLINE F clamp_to(F a, F low, F high) { return min_of(max_of(a, low), high); }
S2D_INLINE F clamp_to(F a, float low, float high) { return clamp_to(a, F(low), F(high)); }
S2D_INLINE F abs_of(F a) { return (NativeF)((NativeI)a.v & 0x7fffffff); }
S2D_INLINE Mask is_finite(F a) { return abs_of(a) < F(__builtin_inff()); }

// Adding 1.5 * 2^23 rounds to the nearest integer, which then sits in the low mantissa bits.
constexpr float ROUND_MAGIC = 12582912.0f;

// 2^x where the mask is set, else 0; x in (-126, 128), or anything where the mask is not. Relative error 2e-7: a minimax polynomial of
// degree 5 for 2^f, f = x - floor(x) (AVX-512 has instructions for both ends) or f = x - round(x).
S2D_INLINE F exp2_where(Mask m, F x) {
#ifdef S2D_AVX512
  const F f = (NativeF)_mm512_reduce_ps((__m512)x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  F p = fma(f, F(1.867130072e-3f), F(9.017030316e-3f));
  p = fma(p, f, F(5.579991311e-2f));
  p = fma(p, f, F(2.401644502e-1f));
  p = fma(p, f, F(6.931513118e-1f));
  p = fma(p, f, F(1.0f));
  return (NativeF)_mm512_maskz_scalef_ps(m.m, (__m512)p.v, (__m512)x.v);
#else
  const F shifted = x + F(ROUND_MAGIC);
  const F f = x - (shifted - F(ROUND_MAGIC));
  F p = fma(f, F(1.327647198e-3f), F(9.675541334e-3f));
  p = fma(p, f, F(5.550713274e-2f));
  p = fma(p, f, F(2.402211972e-1f));
  p = fma(p, f, F(6.931469671e-1f));
  p = fma(p, f, F(1.000000072f));
  return zero_unless(m, (NativeF)((NativeI)p.v + ((NativeI)shifted.v << 23)));
#endif
}

S2D_INLINE F exp2_of(F x) { return exp2_where(ALL, x); }

// e^x, relative error 1e-7; 0 below the normal range, infinity above, NaN for NaN.
S2D_INLINE F exp_of(F x) {
  const F bounded = clamp_to(x, -87.3f, 88.7f);
  const F shifted = fma(bounded, F(1.44269504f), F(ROUND_MAGIC));
  const F n = shifted - F(ROUND_MAGIC);
  F f = fnma(n, F(0.693359375f), bounded);  // ln 2 in two parts: the first product is exact
  f = fnma(n, F(-2.12194440e-4f), f);
  F p = fma(f, F(1.381461319e-3f), F(8.368709823e-3f));
  p = fma(p, f, F(4.166838736e-2f));
  p = fma(p, f, F(1.666652069e-1f));
  p = fma(p, f, F(4.999999345e-1f));
  p = fma(p, f, F(1.0f));
  p = fma(p, f, F(1.0f));
  // The power of two in two steps: 2^n alone overflows for n = 128.
  const NativeI half = ((NativeI)shifted.v << 22) & ~((1 << 23) - 1);
  const NativeI rest = ((NativeI)shifted.v << 23) - half;
  F out = (NativeF)((NativeI)p.v + half) * (NativeF)(rest + (127 << 23));
  out = select(x < F(-87.3f), F(0.0f), out);
  out = select(x > F(88.7f), F(__builtin_inff()), out);
  return select(x == x, out, x);
}

// log2(x) for normal x > 0, absolute error about 1e-7 near 1; infinity for infinity.
S2D_INLINE F log2_of(F x) {
  const NativeI bits = (NativeI)x.v;
  const NativeI exponent = (bits - 0x3f3504f3) >> 23;  // mantissa in [sqrt(1/2), sqrt(2))
  const F m = (NativeF)(bits - (exponent << 23));
  const F n = __builtin_convertvector(exponent, NativeF);
  const F s = (m - F(1.0f)) / (m + F(1.0f));
  const F s2 = s * s;
  F p = fma(s2, F(2.0f / 9.0f), F(2.0f / 7.0f));
  p = fma(p, s2, F(2.0f / 5.0f));
  p = fma(p, s2, F(2.0f / 3.0f));
  p = fma(p, s2, F(2.0f));
  const F out = fma(s * p, F(1.44269504f), n);
  return select(x < F(__builtin_inff()), out, x);
}

S2D_INLINE float sum_of(F a) {
  float lanes[LANES];
  store(lanes, a);
  for (int step = LANES / 2; step > 0; step /= 2) {
    for (int l = 0; l < step; ++l) lanes[l] += lanes[l + step];
  }
  return lanes[0];
}

}  // namespace s2d
