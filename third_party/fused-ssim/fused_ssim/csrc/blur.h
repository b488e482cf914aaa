// SPDX-License-Identifier: Apache-2.0
// The Gaussian window, and rows of an image laid out so that blurring along a row needs neither shuffles nor unaligned loads.
//
// A row of W pixels is cut into kLanes segments of `segment` pixels; vector number `s` holds pixel s of every segment. Then the
// neighbour of a pixel is the same lane of the next vector, along the row as well as down the column, and both blurs are the
// same code. What the first and last pixels of a segment see beyond it is the halo: the neighbouring segment's vectors,
// moved by one lane. The channels of an interleaved image come one after the other.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "vec.h"

namespace s2d {

constexpr int kHalf = 5;  // taps to each side
constexpr int kUnroll = 4;  // outputs of a blur along a row that share their inputs
// exp(-i^2 / (2 * 1.5^2)) for i = 0 ... 5, normalised so that all eleven sum to 1.
constexpr float kWindow[kHalf + 1] = {0.266011725f,  0.213005538f,   0.109360690f,
                                      0.0360007721f, 0.00759875814f, 0.00102838008f};

// `Outputs` neighbouring values of the blur from the values around them. Mirrored taps are added first: 6 products, not 11.
template <int Outputs>
S2D_INLINE void blur(const Vec (&in)[Outputs + 2 * kHalf], Vec (&out)[Outputs]) {
  for (int o = 0; o < Outputs; ++o) {
    Vec sum = splat(kWindow[0]) * in[o + kHalf];
    for (int k = 1; k <= kHalf; ++k) sum = fma(splat(kWindow[k]), in[o + kHalf - k] + in[o + kHalf + k], sum);
    out[o] = sum;
  }
}

inline int divide_up(int value, int unit) { return (value + unit - 1) / unit; }
inline int round_up(int value, int unit) { return divide_up(value, unit) * unit; }

struct RowLayout {
  int pixels, channels;  // of the image; the rest of the last segments is zero
  int segment;           // pixels of a segment, which are the vectors of a channel
  int channel_pitch;     // vectors to reserve for a channel: load_row writes whole blocks of kLanes
  int pitch;             // vectors to reserve for a row

  RowLayout(int width, int channels)
      : pixels(width),
        channels(channels),
        segment(round_up(divide_up(width, kLanes), kUnroll)),
        channel_pitch(segment + divide_up(kLanes - 1, channels)),
        pitch(channels * channel_pitch) {}

  int staging_floats() const { return (segment * channels + 1) * kLanes; }

  void load_row(const float* image_row, float* staging, Pack* row) const {
    const size_t floats = size_t(pixels) * channels;
    std::memcpy(staging, image_row, floats * sizeof(float));
    std::fill(staging + floats, staging + staging_floats(), 0.f);
    int channel = 0;
    for (int i = 0; i < segment * channels; i += kLanes) {
      Vec block[kLanes];
      for (int l = 0; l < kLanes; ++l) block[l] = load(staging + l * segment * channels + i);
      transpose(block);
      for (int l = 0; l < kLanes; ++l) {
        row->v = block[l];
        advance(row, channel);
      }
    }
  }

  // Writes pixels [begin, end).
  void store_row(const Pack* row, float* staging, int begin, int end, float* image_row) const {
    int channel = 0;
    for (int i = 0; i < segment * channels; i += kLanes) {
      Vec block[kLanes];
      for (int l = 0; l < kLanes; ++l) {
        block[l] = row->v;
        advance(row, channel);
      }
      transpose(block);
      const int floats = std::min(kLanes, segment * channels - i);
      for (int l = 0; l < kLanes; ++l) {
        float* const to = staging + l * segment * channels + i;
        if (floats == kLanes) {
          store(to, block[l]);
        } else {
          std::memcpy(to, &block[l], sizeof(float) * floats);
        }
      }
    }
    std::memcpy(image_row, staging + begin * channels, sizeof(float) * (end - begin) * channels);
  }

  // From a value to the next one of the interleaved image.
  template <class Pointer>
  S2D_INLINE void advance(Pointer& value, int& channel) const {
    value += channel_pitch;
    if (++channel == channels) {
      channel = 0;
      value -= pitch - 1;
    }
  }

  // Fills the kHalf vectors before and behind a channel. Outwards, so that segments shorter than the halo work too.
  void fill_halo(Pack* values) const {
    for (int i = -1; i >= -kHalf; --i) {
      float* const to = reinterpret_cast<float*>(values + i);
      store(to, load(reinterpret_cast<const float*>(values + i + segment) - 1));  // lane l is of segment l - 1
      to[0] = 0.f;
    }
    for (int i = segment; i < segment + kHalf; ++i) {
      float* const to = reinterpret_cast<float*>(values + i);
      store(to, load(reinterpret_cast<const float*>(values + i - segment) + 1));
      to[kLanes - 1] = 0.f;
    }
  }
};

// kUnroll pixels, blurred along a row whose halo is filled.
S2D_INLINE void blur_along(const Pack* values, Vec (&out)[kUnroll]) {
  Vec in[kUnroll + 2 * kHalf];
  for (int k = 0; k < kUnroll + 2 * kHalf; ++k) in[k] = in_register(values[k - kHalf].v);
  blur<kUnroll>(in, out);
}

}  // namespace s2d
