// SPDX-License-Identifier: Apache-2.0
// Arrays of rows (one per Gaussian) <-> vectors over LANES Gaussians. Whole vectors are read and written, and turned in registers: a
// float at a time costs five times as many instructions, and vectors that are read from what was just written float by float wait
// for the store buffer.
#pragma once

#include <algorithm>
#include <utility>

#include "simd.h"

namespace s2d {

// Lane i of the result is lane Index::at(i) of a and b put end to end.
template <class Index, int... I>
S2D_INLINE F shuffle(F a, F b, std::integer_sequence<int, I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a.v, b.v, Index::at(I)...);
#else
  return __builtin_shuffle(a.v, b.v, NativeI{Index::at(I)...});
#endif
}
template <class Index>
S2D_INLINE F shuffle(F a, F b) {
  return shuffle<Index>(a, b, std::make_integer_sequence<int, LANES>());
}

template <int HALF>
struct Zip {
  static constexpr int at(int i) { return i % 2 * LANES + HALF * LANES / 2 + i / 2; }
};
template <int ODD>
struct Unzip {
  static constexpr int at(int i) { return 2 * i + ODD; }
};
// Column K of rows of three, in two steps: what the first two vectors hold of it, then the rest.
template <int K>
struct ColumnOf3 {
  static constexpr int at(int i) { return 3 * i + K < 2 * LANES ? 3 * i + K : 0; }
};
template <int K>
struct ColumnOf3Rest {
  static constexpr int at(int i) { return 3 * i + K < 2 * LANES ? i : 3 * i + K - LANES; }
};
// Vector K of rows of three: what the first two columns give, then the third.
template <int K>
struct RowsOf3 {
  static constexpr int at(int i) { return (K * LANES + i) % 3 % 2 * LANES + (K * LANES + i) / 3; }
};
template <int K>
struct RowsOf3Rest {
  static constexpr int at(int i) { return (K * LANES + i) % 3 == 2 ? LANES + (K * LANES + i) / 3 : i; }
};

// in: WIDTH vectors, the rows end to end. out: their columns.
template <int WIDTH>
S2D_INLINE void columns_of(const F* in, F* out) {
  static_assert(WIDTH == 1 || WIDTH == 2 || WIDTH == 3 || WIDTH == 4 || WIDTH == 6, "no other rows are stored");
  if constexpr (WIDTH == 1) {
    out[0] = in[0];
  } else if constexpr (WIDTH == 3) {
    out[0] = shuffle<ColumnOf3Rest<0>>(shuffle<ColumnOf3<0>>(in[0], in[1]), in[2]);
    out[1] = shuffle<ColumnOf3Rest<1>>(shuffle<ColumnOf3<1>>(in[0], in[1]), in[2]);
    out[2] = shuffle<ColumnOf3Rest<2>>(shuffle<ColumnOf3<2>>(in[0], in[1]), in[2]);
  } else {
    F even[WIDTH / 2], odd[WIDTH / 2], of_even[WIDTH / 2], of_odd[WIDTH / 2];
    for (int k = 0; k < WIDTH / 2; ++k) {
      even[k] = shuffle<Unzip<0>>(in[2 * k], in[2 * k + 1]);
      odd[k] = shuffle<Unzip<1>>(in[2 * k], in[2 * k + 1]);
    }
    columns_of<WIDTH / 2>(even, of_even);
    columns_of<WIDTH / 2>(odd, of_odd);
    for (int k = 0; k < WIDTH / 2; ++k) out[2 * k] = of_even[k], out[2 * k + 1] = of_odd[k];
  }
}

// The inverse of columns_of.
template <int WIDTH>
S2D_INLINE void rows_of(const F* in, F* out) {
  static_assert(WIDTH == 1 || WIDTH == 2 || WIDTH == 3 || WIDTH == 4 || WIDTH == 6, "no other rows are stored");
  if constexpr (WIDTH == 1) {
    out[0] = in[0];
  } else if constexpr (WIDTH == 3) {
    out[0] = shuffle<RowsOf3Rest<0>>(shuffle<RowsOf3<0>>(in[0], in[1]), in[2]);
    out[1] = shuffle<RowsOf3Rest<1>>(shuffle<RowsOf3<1>>(in[0], in[1]), in[2]);
    out[2] = shuffle<RowsOf3Rest<2>>(shuffle<RowsOf3<2>>(in[0], in[1]), in[2]);
  } else {
    F even[WIDTH / 2], odd[WIDTH / 2], even_rows[WIDTH / 2], odd_rows[WIDTH / 2];
    for (int k = 0; k < WIDTH / 2; ++k) even[k] = in[2 * k], odd[k] = in[2 * k + 1];
    rows_of<WIDTH / 2>(even, even_rows);
    rows_of<WIDTH / 2>(odd, odd_rows);
    for (int k = 0; k < WIDTH / 2; ++k) {
      out[2 * k] = shuffle<Zip<0>>(even_rows[k], odd_rows[k]);
      out[2 * k + 1] = shuffle<Zip<1>>(even_rows[k], odd_rows[k]);
    }
  }
}

// Read up to LANES rows of WIDTH floats as columns; missing rows repeat the last one.
template <int WIDTH>
S2D_INLINE void load_rows(const float* data, int64_t first, int count, F* out) {
  const float* rows = data + first * WIDTH;
  alignas(64) float padded[WIDTH * LANES];
  if (count < LANES) {
    for (int l = 0; l < LANES; ++l) std::memcpy(padded + l * WIDTH, rows + (l < count ? l : count - 1) * WIDTH, 4 * WIDTH);
    rows = padded;
  }
  F in[WIDTH];
  for (int k = 0; k < WIDTH; ++k) in[k] = load(rows + k * LANES);
  columns_of<WIDTH>(in, out);
}

// Write columns as up to LANES rows.
template <int WIDTH>
S2D_INLINE void store_rows(float* data, int64_t first, int count, const F* columns) {
  F rows[WIDTH];
  rows_of<WIDTH>(columns, rows);
  float* target = data + first * WIDTH;
  if (count == LANES) {
    for (int k = 0; k < WIDTH; ++k) store(target + k * LANES, rows[k]);
  } else {
    alignas(64) float padded[WIDTH * LANES];
    for (int k = 0; k < WIDTH; ++k) store(padded + k * LANES, rows[k]);
    std::memcpy(target, padded, count * WIDTH * sizeof(float));
  }
}

// Rows to columns, in place. Each round moves one bit of the row number into the column number: log2(LANES) of them exchange the two.
S2D_INLINE void transpose(F* v) {
  for (int round = 1; round < LANES; round *= 2) {
    F turned[LANES];
    for (int i = 0; i < LANES / 2; ++i) {
      turned[2 * i] = shuffle<Zip<0>>(v[i], v[i + LANES / 2]);
      turned[2 * i + 1] = shuffle<Zip<1>>(v[i], v[i + LANES / 2]);
    }
    for (int i = 0; i < LANES; ++i) v[i] = turned[i];
  }
}

// The first `count` lanes from and to memory; those after them are zero, and stay as they are.
S2D_INLINE F load_first(const float* p, int count) {
#ifdef S2D_AVX512
  return (NativeF)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
#else
  F out(0.0f);
  std::memcpy(&out.v, p, count * sizeof(float));
  return out;
#endif
}
S2D_INLINE void store_first(float* p, F a, int count) {
#ifdef S2D_AVX512
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), (__m512)a.v);
#else
  std::memcpy(p, &a.v, count * sizeof(float));
#endif
}

// Read up to LANES long rows as columns, columns[k * LANES + row], at least LANES of them; missing rows are zero. The last vector of a
// row ends with the row and overlaps the one before it, so that nothing is masked.
S2D_INLINE void load_long_rows(const float* rows, int width, int count, float* columns) {
  for (int k = 0; k < width; k += LANES) {
    const int at = width < LANES ? 0 : width - k < LANES ? width - LANES : k;
    F v[LANES];
    if (width >= LANES && count == LANES) {
      for (int l = 0; l < LANES; ++l) v[l] = load(rows + l * width + at);
    } else {
      for (int l = 0; l < LANES; ++l) v[l] = l < count ? load_first(rows + l * width + at, std::min(width, LANES)) : F(0.0f);
    }
    transpose(v);
    for (int i = 0; i < LANES; ++i) store(columns + (at + i) * LANES, v[i]);
  }
}

// The inverse.
S2D_INLINE void store_long_rows(float* rows, int width, int count, const float* columns) {
  for (int k = 0; k < width; k += LANES) {
    const int at = width < LANES ? 0 : width - k < LANES ? width - LANES : k;
    F v[LANES];
    for (int i = 0; i < LANES; ++i) v[i] = load(columns + (at + i) * LANES);
    transpose(v);
    if (width >= LANES && count == LANES) {
      for (int l = 0; l < LANES; ++l) store(rows + l * width + at, v[l]);
    } else {
      for (int l = 0; l < count; ++l) store_first(rows + l * width + at, v[l], std::min(width, LANES));
    }
  }
}

// The lanes whose bits are set.
S2D_INLINE Mask mask_of(uint32_t bits) {
#ifdef S2D_AVX512
  return {static_cast<__mmask16>(bits)};
#else
  Mask out;
  for (int l = 0; l < LANES; ++l) out.m[l] = -static_cast<int32_t>(bits >> l & 1);
  return out;
#endif
}

}  // namespace s2d
