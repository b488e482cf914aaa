// SPDX-License-Identifier: Apache-2.0
// Phase 4: from image cotangents to ten sums per splat (Sums in csrc/common/gaussian.h). Conventions and the order of launches: project.cu.
//
// A block of threads takes a segment of a tile, which is up to 256 of its instances: the forward pass saved the state of every pixel between
// them, so segments run side by side, each back to front. A warp has 8 x 8 pixels, two to a lane; an instance's sums over them grow in
// registers, over those of its 8 x 4 blocks alone that it touches, and are then added up across the lanes.
//
// The other way round, a lane for each of 32 Gaussians and the pixels passed from lane to lane, adds nothing up across lanes. But every
// Gaussian then meets all 256 pixels of the tile, where it touches a quarter of its blocks (fern: 35 of 256 pixels are blended), and a
// state is needed for every 32 instances. Counted on paper, in instructions, it costs two to three times as much.
//
// With q = alpha / (1 - alpha), T the transmittance behind an instance, w = q T its weight, c . v its colour times the cotangents:
//   G = dLoss / d ln alpha = w (c . v) - q S      S = sum of w (c . v) behind, background included; 0 where alpha is clamped
//
// rasterize_backward, rasterize_backward_depth, and both with _lengths
//                                      grid I / 256 + C * tiles_x * tiles_y + 1, block 128, no dynamic shared memory
//   width, height, tiles_x, tiles_y      int32
//   inverse_depth    int32
//   background       [3]
//   splats, instances, tile_begin        as for rasterize_forward
//   rgb, alpha, depth, final_T, stop, states, segment_tile      as rasterize_forward wrote them
//   v_rgb            [C, H, W, 3] or 0
//   v_alpha          [C, H, W, 1] or 0
//   v_depth          [C, H, W, 1]; those without depth do not read it (0)
//   splat_grads      in/out [C, N, 10]; zeros before the launch
//   lengths          in/out [C, N]; zeros before the launch: SUM_LENGTH. Those without _lengths do not write it (0)
// The background's gradient is torch's: (final_T[..., None] * v_rgb).sum((0, 1, 2)).
#include "tile.h"

namespace s2d {

constexpr int BACKWARD_THREADS = 128;
constexpr int HALVES = 2;  // blocks of 8 x 4 pixels under one another that a warp has

struct Images {
  int width, height;
  bool inverse_depth;
  const float *background, *rgb, *alpha, *depth, *final_T;
  const int* stop;
  const float *v_rgb, *v_alpha, *v_depth;
};

// One pixel, as an instance finds it on the way back to front.
struct Pixel {
  float x, y;        // from the tile's corner
  float T, S;
  float v_r, v_g, v_b;
  float v_aux, depth;  // c . v has the term (aux of the instance - depth) * v_aux
  int stop;            // list index in the segment of the instance that finished it
};

// `state` is that of the pixel behind the segment; null where nothing is behind it.
template <bool DEPTH>
__device__ __forceinline__ Pixel load_pixel(const Images& images, const TilePosition& tile, int column, int row, int segment,
                                            const float* __restrict__ state) {
  Pixel out = {column + 0.5f, row + 0.5f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, -1};
  if (tile.left + column >= images.width || tile.top + row >= images.height) return out;
  const int64 at = tile.pixel(column, row, images.width, images.height);
  const float T = images.final_T[at];
  const float background[3] = {images.background[0], images.background[1], images.background[2]};
  out.T = T;
  out.stop = images.stop[at] - segment * SEGMENT;
  float behind[3] = {0.0f, 0.0f, 0.0f};  // sums of w c
  if (state) {
    out.T = state[0];
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      behind[k] = __fmaf_rn(-T, background[k], images.rgb[3 * at + k]) - state[(2 + k) * SEGMENT];
    }
  }
  if (images.v_rgb) out.v_r = images.v_rgb[3 * at], out.v_g = images.v_rgb[3 * at + 1], out.v_b = images.v_rgb[3 * at + 2];
  const float v_T = out.v_r * background[0] + out.v_g * background[1] + out.v_b * background[2] -
                    (images.v_alpha ? images.v_alpha[at] : 0.0f);
  out.S = T * v_T + (out.v_r * behind[0] + out.v_g * behind[1] + out.v_b * behind[2]);
  if (DEPTH) {
    const float covered = images.alpha[at], v = images.v_depth[at], depth = images.depth[at];
    if (images.inverse_depth) {
      out.v_aux = v;
      if (state) out.S += v * (depth - state[5 * SEGMENT]);
    } else if (covered > 0.0f) {
      out.v_aux = v / covered;
      out.depth = depth;
      if (state) out.S += out.v_aux * (depth * state[SEGMENT] - state[5 * SEGMENT]);
    }
  }
  return out;
}

// Add what a pixel contributes to the sums of the splat at i, and with LENGTHS to `length`, and move the pixel in front of it. Returns whether
// the splat is blended there.
template <bool DEPTH, bool LENGTHS, int COUNT>
__device__ __forceinline__ bool add_pixel(const StagedSplats<COUNT>& staged, int i, bool open, const Images& images, Pixel& pixel,
                                          float* sums, float& length) {
  const float4 p = staged.place[i], r = staged.rest[i];
  const float u = __fmaf_rn(p.z, pixel.x, __fmaf_rn(p.w, pixel.y, p.x)), v = __fmaf_rn(r.x, pixel.y, p.y);
  const float power = __fmaf_rn(-v, v, __fmaf_rn(-u, u, r.y));
  if (!open || power < LOG2_ALPHA_MIN) return false;
  const float alpha = fminf(fast_exp2(power), ALPHA_MAX);
  const float2 last = staged.last[i];
  const float q = alpha * fast_reciprocal(1.0f - alpha), w = q * pixel.T;
  float cv = r.z * pixel.v_r + r.w * pixel.v_g + last.x * pixel.v_b;
  if (DEPTH) cv += (last.y - pixel.depth) * pixel.v_aux;
  const float wcv = w * cv;
  const float G = alpha < ALPHA_MAX ? __fmaf_rn(-q, pixel.S, wcv) : 0.0f;
  pixel.S += wcv;
  pixel.T += w;
  const float Gu = G * u, Gv = G * v;
  sums[SUM_G] += G;
  sums[SUM_GU] += Gu;
  sums[SUM_GV] += Gv;
  sums[SUM_GUU] += Gu * u;
  sums[SUM_GUV] += Gu * v;
  sums[SUM_GVV] += Gv * v;
  sums[SUM_R] += w * pixel.v_r;
  sums[SUM_GREEN] += w * pixel.v_g;
  sums[SUM_B] += w * pixel.v_b;
  if (DEPTH) sums[SUM_AUX] += w * pixel.v_aux;
  if (LENGTHS) {
    constexpr float HALF = 0.5f / (WHITEN * WHITEN);
    const float x = HALF * images.width * p.z * Gu, y = HALF * images.height * (p.w * Gu + r.x * Gv);
    length += sqrtf(x * x + y * y);
  }
  return true;
}

// One step of the sum across lanes: of `COUNT` values, the lanes whose number has the bit `STEP` keep the upper half and the others the lower
// one, and each gives its partner what that one keeps. Leaves (COUNT + 1) / 2 values.
template <int COUNT, int STEP>
__device__ __forceinline__ void halve(float* values) {
  constexpr int LOWER = (COUNT + 1) / 2;
  const bool upper = threadIdx.x & STEP;
#pragma unroll
  for (int k = 0; k < LOWER; ++k) {
    const float low = values[k], high = LOWER + k < COUNT ? values[LOWER + k] : 0.0f;
    values[k] = (upper ? high : low) + __shfl_xor_sync(FULL_WARP, upper ? low : high, STEP);
  }
}

static_assert(NUM_SUMS == 10, "sum_of_lane and halve take 10 -> 5 -> 3 -> 2 -> 1");

// Which of the ten sums a lane holds after sum_across_lanes; -1: none, or another lane holds the same.
__device__ __forceinline__ int sum_of_lane(int lane) {
  const int third = lane & 8 ? 3 : 0, second = lane & 4 ? 2 : 0, first = lane & 2 ? 1 : 0;
  const int of_three = second + first;                  // of the three that a lane holds then
  const int of_five = third + of_three;
  const bool valid = of_three < 3 && of_five < 5 && !(lane & 1);
  return valid ? (lane & 16 ? 5 : 0) + of_five : -1;
}

__device__ __forceinline__ float sum_across_lanes(float* sums) {
  halve<10, 16>(sums);
  halve<5, 8>(sums);
  halve<3, 4>(sums);
  halve<2, 2>(sums);
  return sums[0] + __shfl_xor_sync(FULL_WARP, sums[0], 1);
}

template <bool DEPTH, bool LENGTHS>
__device__ __forceinline__ void backward_segment(const Images& images, int tiles_x, int tiles_y, const float* __restrict__ splats,
                                                 const int* __restrict__ instances, const int64* __restrict__ tile_begin,
                                                 const float* __restrict__ states, const int* __restrict__ segment_tile,
                                                 float* __restrict__ splat_grads, float* __restrict__ lengths) {
  __shared__ StagedSplats<BACKWARD_THREADS> staged;
  __shared__ int indices[BACKWARD_THREADS];
  const int tile = segment_tile[blockIdx.x];
  if (tile < 0) return;  // no segment has this number, or the forward pass never came to it
  const int64 begin = tile_begin[tile], end = tile_begin[tile + 1];
  const int segment = static_cast<int>(blockIdx.x - (begin / SEGMENT + tile));
  const int64 first = begin + static_cast<int64>(segment) * SEGMENT;
  const int count = static_cast<int>(min(end - first, static_cast<int64>(SEGMENT)));
  const bool is_last = first + SEGMENT >= end;

  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int upper_block = 4 * (warp / 2) + warp % 2;  // its bit in a mask; that of the one below is two further
  const TilePosition at(tile, tiles_x, tiles_y);
  Pixel pixels[HALVES];
  int open = 0;  // instances from this one on are behind all pixels of the lane
#pragma unroll
  for (int half = 0; half < HALVES; ++half) {
    const int block = upper_block + 2 * half;
    const float* state = states + (begin / SEGMENT + segment) * STATE_SUMS * SEGMENT + block * WARP + lane;
    pixels[half] = load_pixel<DEPTH>(images, at, block_column(block) + lane % BLOCK_W, block_row(block) + lane / BLOCK_W, segment,
                                     is_last ? nullptr : state);
    open = max(open, pixels[half].stop);
  }
  for (int step = WARP / 2; step > 0; step /= 2) open = max(open, __shfl_xor_sync(FULL_WARP, open, step));
  const int my_sum = sum_of_lane(lane);

  for (int base = (count - 1) / BACKWARD_THREADS * BACKWARD_THREADS; base >= 0; base -= BACKWARD_THREADS) {
    __syncthreads();
    indices[threadIdx.x] = staged.load(threadIdx.x, count - base, splats, instances + first + base, at);
    __syncthreads();
    for (int group = BACKWARD_THREADS - WARP; group >= 0; group -= WARP) {
      const int rest = open - (base + group);
      if (rest <= 0) continue;
      unsigned touching = __ballot_sync(FULL_WARP, staged.mask[group + lane] >> upper_block & 5);
      if (rest < WARP) touching &= (1u << rest) - 1;
      while (touching) {
        const int bit = 31 - __clz(touching), i = group + bit;
        touching ^= 1u << bit;
        float sums[NUM_SUMS] = {}, length = 0.0f;
        bool blended = false;
#pragma unroll
        for (int half = 0; half < HALVES; ++half) {
          if (staged.mask[i] >> (upper_block + 2 * half) & 1) {
            blended |= add_pixel<DEPTH, LENGTHS>(staged, i, base + i < pixels[half].stop, images, pixels[half], sums, length);
          }
        }
        if (!__any_sync(FULL_WARP, blended)) continue;
        const float sum = sum_across_lanes(sums);
        if (my_sum >= 0) atomicAdd(splat_grads + static_cast<int64>(NUM_SUMS) * indices[i] + my_sum, sum);
        if (LENGTHS) {
          for (int step = WARP / 2; step > 0; step /= 2) length += __shfl_xor_sync(FULL_WARP, length, step);
          if (lane == 0) atomicAdd(lengths + indices[i], length);
        }
      }
    }
  }
}

}  // namespace s2d

extern "C" __global__ void __launch_bounds__(128) rasterize_backward(
    int width, int height, int tiles_x, int tiles_y, int inverse_depth, const float* __restrict__ background,
    const float* __restrict__ splats, const int* __restrict__ instances, const long long* __restrict__ tile_begin,
    const float* __restrict__ rgb, const float* __restrict__ alpha, const float* __restrict__ depth,
    const float* __restrict__ final_T, const int* __restrict__ stop, const float* __restrict__ states,
    const int* __restrict__ segment_tile, const float* __restrict__ v_rgb, const float* __restrict__ v_alpha,
    const float* __restrict__ v_depth, float* __restrict__ splat_grads, float* __restrict__ lengths) {
  const s2d::Images images = {width, height, inverse_depth != 0, background, rgb, alpha, depth, final_T, stop, v_rgb, v_alpha, v_depth};
  s2d::backward_segment<false, false>(images, tiles_x, tiles_y, splats, instances, tile_begin, states, segment_tile,
      splat_grads, lengths);
}

extern "C" __global__ void __launch_bounds__(128) rasterize_backward_depth(
    int width, int height, int tiles_x, int tiles_y, int inverse_depth, const float* __restrict__ background,
    const float* __restrict__ splats, const int* __restrict__ instances, const long long* __restrict__ tile_begin,
    const float* __restrict__ rgb, const float* __restrict__ alpha, const float* __restrict__ depth,
    const float* __restrict__ final_T, const int* __restrict__ stop, const float* __restrict__ states,
    const int* __restrict__ segment_tile, const float* __restrict__ v_rgb, const float* __restrict__ v_alpha,
    const float* __restrict__ v_depth, float* __restrict__ splat_grads, float* __restrict__ lengths) {
  const s2d::Images images = {width, height, inverse_depth != 0, background, rgb, alpha, depth, final_T, stop, v_rgb, v_alpha, v_depth};
  s2d::backward_segment<true, false>(images, tiles_x, tiles_y, splats, instances, tile_begin, states, segment_tile,
      splat_grads, lengths);
}

extern "C" __global__ void __launch_bounds__(128) rasterize_backward_lengths(
    int width, int height, int tiles_x, int tiles_y, int inverse_depth, const float* __restrict__ background,
    const float* __restrict__ splats, const int* __restrict__ instances, const long long* __restrict__ tile_begin,
    const float* __restrict__ rgb, const float* __restrict__ alpha, const float* __restrict__ depth,
    const float* __restrict__ final_T, const int* __restrict__ stop, const float* __restrict__ states,
    const int* __restrict__ segment_tile, const float* __restrict__ v_rgb, const float* __restrict__ v_alpha,
    const float* __restrict__ v_depth, float* __restrict__ splat_grads, float* __restrict__ lengths) {
  const s2d::Images images = {width, height, inverse_depth != 0, background, rgb, alpha, depth, final_T, stop, v_rgb, v_alpha, v_depth};
  s2d::backward_segment<false, true>(images, tiles_x, tiles_y, splats, instances, tile_begin, states, segment_tile,
      splat_grads, lengths);
}

extern "C" __global__ void __launch_bounds__(128) rasterize_backward_depth_lengths(
    int width, int height, int tiles_x, int tiles_y, int inverse_depth, const float* __restrict__ background,
    const float* __restrict__ splats, const int* __restrict__ instances, const long long* __restrict__ tile_begin,
    const float* __restrict__ rgb, const float* __restrict__ alpha, const float* __restrict__ depth,
    const float* __restrict__ final_T, const int* __restrict__ stop, const float* __restrict__ states,
    const int* __restrict__ segment_tile, const float* __restrict__ v_rgb, const float* __restrict__ v_alpha,
    const float* __restrict__ v_depth, float* __restrict__ splat_grads, float* __restrict__ lengths) {
  const s2d::Images images = {width, height, inverse_depth != 0, background, rgb, alpha, depth, final_T, stop, v_rgb, v_alpha, v_depth};
  s2d::backward_segment<true, true>(images, tiles_x, tiles_y, splats, instances, tile_begin, states, segment_tile,
      splat_grads, lengths);
}
