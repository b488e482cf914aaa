// SPDX-License-Identifier: Apache-2.0
// Phase 3: blend each tile front to back. A block of threads draws a tile, a warp 8 x 4 of its pixels, and looks at those instances alone that
// touch these. Conventions and the order of launches: project.cu.
//
// rasterize_forward                      grid C * tiles_x * tiles_y, block 256, no dynamic shared memory
//   width, height, tiles_x, tiles_y      int32
//   inverse_depth    int32
//   background       [3]
//   splats           [C, N, 12]
//   instances        int32 [I]
//   tile_begin       int64 [C * tiles_x * tiles_y + 1]
//   rgb              out [C, H, W, 3]
//   alpha            out [C, H, W, 1]
//   depth            out [C, H, W, 1]
//   final_T          out [C, H, W] or 0
//   stop             out int32 [C, H, W] or 0
//   states           out [I / 256 + 1, 6, 256] or 0; uninitialised
//   segment_tile     out int32 [I / 256 + C * tiles_x * tiles_y + 1] or 0; to be filled with -1 before the launch
// The last four are for the backward pass: all of them or none (rendering without gradients). I / 256 rounds down.
#include "tile.h"

extern "C" __global__ void __launch_bounds__(256) rasterize_forward(
    int width, int height, int tiles_x, int tiles_y, int inverse_depth, const float* __restrict__ background,
    const float* __restrict__ splats, const int* __restrict__ instances, const long long* __restrict__ tile_begin,
    float* __restrict__ rgb, float* __restrict__ alpha, float* __restrict__ depth, float* __restrict__ final_T,
    int* __restrict__ stop, float* __restrict__ states, int* __restrict__ segment_tile) {
  using namespace s2d;
  __shared__ StagedSplats<SEGMENT> staged;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, tile = blockIdx.x;
  const TilePosition at(tile, tiles_x, tiles_y);
  const int column = block_column(warp) + lane % BLOCK_W, row = block_row(warp) + lane / BLOCK_W;
  const float x = column + 0.5f, y = row + 0.5f;
  const bool in_image = at.left + column < width && at.top + row < height;
  const int64 begin = tile_begin[tile], end = tile_begin[tile + 1];

  // What a Gaussian must exceed in this pixel; infinity once the pixel is finished.
  float limit = in_image ? LOG2_ALPHA_MIN : infinity();
  float T = 1.0f, covered = 0.0f, r = 0.0f, g = 0.0f, b = 0.0f, aux = 0.0f;
  int stop_at = NOT_DRAWN, segments = 0;
  for (int64 first = begin; first < end; first += SEGMENT) {
    if (__syncthreads_and(limit == infinity())) break;  // all are done, and with what is staged
    const int count = static_cast<int>(min(end - first, static_cast<int64>(SEGMENT)));
    staged.load(threadIdx.x, count, splats, instances + first, at);
    __syncthreads();
    for (int group = 0; group < count; group += WARP) {
      unsigned touching = __ballot_sync(FULL_WARP, staged.mask[group + lane] >> warp & 1);
      for (; touching; touching &= touching - 1) {
        const int i = group + __ffs(touching) - 1;
        const float4 p = staged.place[i], q = staged.rest[i];
        const float u = __fmaf_rn(p.z, x, __fmaf_rn(p.w, y, p.x)), v = __fmaf_rn(q.x, y, p.y);
        const float power = __fmaf_rn(-v, v, __fmaf_rn(-u, u, q.y));
        if (power >= limit) {
          const float a = fminf(fast_exp2(power), ALPHA_MAX), T_next = __fmaf_rn(-a, T, T);
          if (T_next < T_MIN) {
            limit = infinity();
            stop_at = static_cast<int>(first - begin) + i;
          } else {
            const float w = a * T;
            const float2 last = staged.last[i];
            T = T_next;
            covered += w;
            r = __fmaf_rn(w, q.z, r);
            g = __fmaf_rn(w, q.w, g);
            b = __fmaf_rn(w, last.x, b);
            aux = __fmaf_rn(w, last.y, aux);
          }
        }
      }
      if (__all_sync(FULL_WARP, limit == infinity())) break;
    }
    if (states && first + SEGMENT < end) {
      float* state = states + (begin / SEGMENT + segments) * STATE_SUMS * SEGMENT + threadIdx.x;
      const float values[STATE_SUMS] = {T, covered, r, g, b, aux};
#pragma unroll
      for (int k = 0; k < STATE_SUMS; ++k) state[k * SEGMENT] = values[k];
    }
    ++segments;
  }
  if (segment_tile) {
    for (int s = threadIdx.x; s < segments; s += SEGMENT) segment_tile[begin / SEGMENT + tile + s] = tile;
  }
  if (!in_image) return;
  const int64 pixel = at.pixel(column, row, width, height);
  rgb[3 * pixel] = __fmaf_rn(T, background[0], r);
  rgb[3 * pixel + 1] = __fmaf_rn(T, background[1], g);
  rgb[3 * pixel + 2] = __fmaf_rn(T, background[2], b);
  alpha[pixel] = covered;
  depth[pixel] = inverse_depth ? aux : covered > 0.0f ? aux / covered : 0.0f;
  if (final_T) {
    final_T[pixel] = T;
    stop[pixel] = stop_at;
  }
}
