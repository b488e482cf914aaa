// SPDX-License-Identifier: Apache-2.0
// Sum each of COUNT vectors over its lanes; write the COUNT sums side by side. Done as a tree that halves the lanes and packs two
// vectors into one at each step, it costs about three instructions a vector instead of eight.
#pragma once

#include "simd.h"

namespace s2d {

template <int COUNT>
S2D_INLINE void transposed_sum(const F* in, float* out) {
#if defined(S2D_AVX512)
  static_assert(COUNT > 8 && COUNT <= 12, "three groups of four");
  // Two vectors a, b -> (a0+a2, a1+a3, b0+b2, b1+b3) in 128-bit quarters; then four -> one quarter of partial sums each.
  const auto halves = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
  };
  const auto quarters = [](__m512 ab, __m512 cd) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD));
  };
  const auto within = [](__m512 p, __m512 q) {
    return _mm512_add_ps(_mm512_shuffle_ps(p, q, 0x88), _mm512_shuffle_ps(p, q, 0xDD));
  };
  const auto at = [&](int i) { return i < COUNT ? (__m512)in[i].v : _mm512_setzero_ps(); };
  const __m512 p = quarters(halves(at(0), at(1)), halves(at(2), at(3)));
  const __m512 q = quarters(halves(at(4), at(5)), halves(at(6), at(7)));
  const __m512 r = quarters(halves(at(8), at(9)), halves(at(10), at(11)));
  // Quarter j of p holds four partial sums of vector j; now lane i of quarter j becomes the sum of vector 4 i + j.
  const __m512 sums = within(within(p, q), within(r, r));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_store_ps(out, _mm512_permutexvar_ps(order, sums));
#elif S2D_LANES == 8 && defined(__AVX2__)
  for (int i = 0; i < COUNT; i += 4) {
    const auto at = [&](int j) { return j < COUNT ? (__m256)in[j].v : _mm256_setzero_ps(); };
    const __m256 ab = _mm256_hadd_ps(at(i), at(i + 1)), cd = _mm256_hadd_ps(at(i + 2), at(i + 3));
    const __m256 abcd = _mm256_hadd_ps(ab, cd);
    _mm_store_ps(out + i, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
  }
#else
  for (int i = 0; i < COUNT; ++i) out[i] = sum_of(in[i]);
#endif
}

}  // namespace s2d
