// SPDX-License-Identifier: Apache-2.0
// L1 and structural similarity with their gradient: the maths of csrc/ssim.cpp, whose head has the formulas.
//
// All tensors are contiguous float32 on the device; "or 0" marks pointers that may be null. Images are [planes, H, W, channels].
//
//   ssim_forward, then, where the gradient is wanted, ssim_gradient: nothing in between.
//
// ssim_forward                           grid (ceil(W / 32), ceil(H / 32), planes), block 256, no dynamic shared memory
//   height, width, channels, margin      int32
//   l1_factor, ssim_factor               float32
//   x, y             [planes, H, W, channels]
//   map_gradient     [planes, H, W, channels] or 0: weight of each S in what is derived (not in the sum)
//   sum              in/out float64 [1] or 0; zero before the launch: receives the sum of l1_factor |x - y| + ssim_factor S
//   ssim_map         out [planes, H, W, channels] or 0: S, 0 in the margin
//   partials         out [3, planes, channels, H, W] or 0: for ssim_gradient
//
// ssim_gradient                          grid (ceil(W / 32), ceil(H / 32), planes), block 256, no dynamic shared memory
//   height, width, channels              int32
//   l1_factor, ssim_factor               float32
//   gradient_factor  float32
//   upstream         float32 [1] on the device, or 0: one more factor (an upstream scalar gradient)
//   x, y             [planes, H, W, channels]
//   pixel_weight     [H, W, 1] or 0
//   partials         [3, planes, channels, H, W], from ssim_forward
//   gradient         out [planes, H, W, channels]
// planes must be at most 65535 (a grid's limit): more go in several launches.
//
// A block of threads has a tile of 32 x 32 pixels, one channel after the other. A blur goes along the rows first, four neighbouring outputs to
// a thread, then down the columns, four again: so 14 values are read for four sums of 11.

namespace {

constexpr int TILE = 32, HALF = 5, WIDE = TILE + 2 * HALF, THREADS = 256, WARP = 32;
constexpr int PITCH = WIDE + 1;  // odd: the four rows that a warp reads at a time lie in different banks
constexpr int OUTPUTS = 4;       // of a thread
constexpr float C1 = 0.01f * 0.01f, C2 = 0.03f * 0.03f;
// exp(-i^2 / (2 * 1.5^2)) for i = 0 ... 5, normalised so that all eleven sum to 1.
constexpr float W0 = 0.266011725f, W1 = 0.213005538f, W2 = 0.109360690f, W3 = 0.0360007721f, W4 = 0.00759875814f, W5 = 0.00102838008f;

struct Position {
  int left, top, plane;
  int height, width, channels;

  __device__ __forceinline__ bool inside(int row, int column) const {
    return row >= 0 && row < height && column >= 0 && column < width;
  }
  // In an image, channels interleaved; in the partials, channel by channel.
  __device__ __forceinline__ long long in_image(int row, int column, int channel) const {
    return ((static_cast<long long>(plane) * height + row) * width + column) * channels + channel;
  }
  __device__ __forceinline__ long long in_plane(int row, int column, int channel) const {
    return ((static_cast<long long>(plane) * channels + channel) * height + row) * width + column;
  }
};

__device__ __forceinline__ Position position(int height, int width, int channels) {
  return {static_cast<int>(blockIdx.x) * TILE, static_cast<int>(blockIdx.y) * TILE, static_cast<int>(blockIdx.z), height, width, channels};
}

// Four neighbouring outputs from 14 values. Mirrored taps are added first: 6 products, not 11.
__device__ __forceinline__ void blur(const float (&in)[OUTPUTS + 2 * HALF], float (&out)[OUTPUTS]) {
  const float taps[HALF + 1] = {W0, W1, W2, W3, W4, W5};
#pragma unroll
  for (int o = 0; o < OUTPUTS; ++o) {
    float sum = taps[0] * in[o + HALF];
#pragma unroll
    for (int k = 1; k <= HALF; ++k) sum = __fmaf_rn(taps[k], in[o + HALF - k] + in[o + HALF + k], sum);
    out[o] = sum;
  }
}

// Blur COUNT quantities along the rows of a tile with its halo. read(row, column, values) gives the quantities at a place.
template <int COUNT, class Read>
__device__ __forceinline__ void blur_along(float (&blurred)[COUNT][WIDE][TILE], const Read& read) {
  for (int unit = threadIdx.x; unit < WIDE * (TILE / OUTPUTS); unit += THREADS) {
    const int row = unit / (TILE / OUTPUTS), column = unit % (TILE / OUTPUTS) * OUTPUTS;
    float in[COUNT][OUTPUTS + 2 * HALF];
#pragma unroll
    for (int k = 0; k < OUTPUTS + 2 * HALF; ++k) {
      float values[COUNT];
      read(row, column + k, values);
#pragma unroll
      for (int q = 0; q < COUNT; ++q) in[q][k] = values[q];
    }
#pragma unroll
    for (int q = 0; q < COUNT; ++q) {
      float out[OUTPUTS];
      blur(in[q], out);
      *reinterpret_cast<float4*>(&blurred[q][row][column]) = make_float4(out[0], out[1], out[2], out[3]);
    }
  }
}

// Then down the columns, for the four pixels of this thread: column threadIdx % 32, rows from 4 (threadIdx / 32).
template <int COUNT>
__device__ __forceinline__ void blur_down(const float (&blurred)[COUNT][WIDE][TILE], float (&out)[COUNT][OUTPUTS]) {
  const int column = threadIdx.x % WARP, row = threadIdx.x / WARP * OUTPUTS;
#pragma unroll
  for (int q = 0; q < COUNT; ++q) {
    float in[OUTPUTS + 2 * HALF];
#pragma unroll
    for (int k = 0; k < OUTPUTS + 2 * HALF; ++k) in[k] = blurred[q][row + k][column];
    blur(in, out[q]);
  }
}

// The sum over a block, in thread 0.
__device__ __forceinline__ double block_sum(double value) {
  __shared__ double partial[THREADS / WARP];
  for (int step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = value;
  __syncthreads();
  double total = 0.0;
  for (int warp = 0; warp < THREADS / WARP; ++warp) total += partial[warp];
  return total;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256) ssim_forward(
    int height, int width, int channels, int margin, float l1_factor, float ssim_factor, const float* __restrict__ x,
    const float* __restrict__ y, const float* __restrict__ map_gradient, double* __restrict__ sum, float* __restrict__ ssim_map,
    float* __restrict__ partials) {
  __shared__ float xs[WIDE][PITCH], ys[WIDE][PITCH];
  __shared__ __align__(16) float blurred[4][WIDE][TILE];
  const Position at = position(height, width, channels);
  const long long count = static_cast<long long>(gridDim.z) * height * width * channels;
  double total = 0.0;
  for (int channel = 0; channel < channels; ++channel) {
    __syncthreads();
    for (int i = threadIdx.x; i < WIDE * WIDE; i += THREADS) {
      const int row = at.top + i / WIDE - HALF, column = at.left + i % WIDE - HALF;
      const bool inside = at.inside(row, column);
      const long long from = inside ? at.in_image(row, column, channel) : 0;
      xs[i / WIDE][i % WIDE] = inside ? x[from] : 0.0f;
      ys[i / WIDE][i % WIDE] = inside ? y[from] : 0.0f;
    }
    __syncthreads();
    blur_along(blurred, [&](int row, int column, float (&values)[4]) {
      const float a = xs[row][column], b = ys[row][column];
      values[0] = a, values[1] = b, values[2] = __fmaf_rn(a, a, b * b), values[3] = a * b;
    });
    __syncthreads();
    float means[4][OUTPUTS];
    blur_down(blurred, means);
    float part = 0.0f;
#pragma unroll
    for (int o = 0; o < OUTPUTS; ++o) {
      const int row_in_tile = static_cast<int>(threadIdx.x) / WARP * OUTPUTS + o, column_in_tile = threadIdx.x % WARP;
      const int row = at.top + row_in_tile, column = at.left + column_in_tile;
      if (!at.inside(row, column)) continue;
      const float m1 = means[0][o], m2 = means[1][o], q = means[2][o], p = means[3][o];
      const float mm = m1 * m2, ss = __fmaf_rn(m1, m1, m2 * m2);
      const float A = __fmaf_rn(2.0f, mm, C1), B = __fmaf_rn(2.0f, p - mm, C2), C = ss + C1, D = (q - ss) + C2;
      const float inverse = 1.0f / (C * D), twice = inverse + inverse;
      const bool counts = row >= margin && row < height - margin && column >= margin && column < width - margin;
      const float S = counts ? A * B * inverse : 0.0f;
      const float difference = xs[row_in_tile + HALF][column_in_tile + HALF] - ys[row_in_tile + HALF][column_in_tile + HALF];
      if (counts) part += __fmaf_rn(l1_factor, fabsf(difference), ssim_factor * S);
      const long long pixel = at.in_image(row, column, channel);
      if (ssim_map) ssim_map[pixel] = S;
      if (partials) {
        const float weight = !counts ? 0.0f : map_gradient ? map_gradient[pixel] : 1.0f;
        float* const to = partials + at.in_plane(row, column, channel);
        to[0] = counts ? weight * (twice * __fmaf_rn(m2, B - A, m1 * S * (C - D))) : 0.0f;
        to[count] = counts ? weight * (-S * C * twice) : 0.0f;  // twice, for the derivative of x^2
        to[2 * count] = counts ? weight * (A * twice) : 0.0f;
      }
    }
    total += static_cast<double>(part);
  }
  total = block_sum(total);
  if (sum && threadIdx.x == 0) atomicAdd(sum, total);
}

extern "C" __global__ void __launch_bounds__(256) ssim_gradient(
    int height, int width, int channels, float l1_factor, float ssim_factor, float gradient_factor,
    const float* __restrict__ upstream, const float* __restrict__ x, const float* __restrict__ y,
    const float* __restrict__ pixel_weight, const float* __restrict__ partials, float* __restrict__ gradient) {
  __shared__ float tile[3][WIDE][PITCH];
  __shared__ __align__(16) float blurred[3][WIDE][TILE];
  const Position at = position(height, width, channels);
  const long long count = static_cast<long long>(gridDim.z) * height * width * channels;
  const float factor = upstream ? gradient_factor * upstream[0] : gradient_factor;
  for (int channel = 0; channel < channels; ++channel) {
    __syncthreads();
    for (int i = threadIdx.x; i < WIDE * WIDE; i += THREADS) {
      const int row = at.top + i / WIDE - HALF, column = at.left + i % WIDE - HALF;
      const bool inside = at.inside(row, column);
      const long long from = inside ? at.in_plane(row, column, channel) : 0;
#pragma unroll
      for (int q = 0; q < 3; ++q) tile[q][i / WIDE][i % WIDE] = inside ? partials[q * count + from] : 0.0f;
    }
    __syncthreads();
    blur_along(blurred, [&](int row, int column, float (&values)[3]) {
#pragma unroll
      for (int q = 0; q < 3; ++q) values[q] = tile[q][row][column];
    });
    __syncthreads();
    float sums[3][OUTPUTS];
    blur_down(blurred, sums);
#pragma unroll
    for (int o = 0; o < OUTPUTS; ++o) {
      const int row = at.top + static_cast<int>(threadIdx.x) / WARP * OUTPUTS + o, column = at.left + threadIdx.x % WARP;
      if (!at.inside(row, column)) continue;
      const long long pixel = at.in_image(row, column, channel);
      const float a = x[pixel], b = y[pixel];
      const float similarity = __fmaf_rn(a, sums[1][o], __fmaf_rn(b, sums[2][o], sums[0][o]));
      const float sign = a > b ? 1.0f : a < b ? -1.0f : 0.0f;
      const float value = __fmaf_rn(factor * ssim_factor, similarity, factor * l1_factor * sign);
      gradient[pixel] = pixel_weight ? value * pixel_weight[static_cast<long long>(row) * width + column] : value;
    }
  }
}
