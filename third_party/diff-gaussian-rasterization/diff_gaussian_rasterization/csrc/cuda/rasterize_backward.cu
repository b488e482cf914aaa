// SPDX-License-Identifier: Apache-2.0
// Phase 4: from image cotangents to ten sums per splat. Parallel over segments of 256 instances of a tile: the forward pass saved the
// state of every pixel between them. Conventions and the order of launches: project.cu.
//
// rasterize_backward, rasterize_backward_depth      grid I / 256 + C * tiles_x * tiles_y + 1, block 128, no dynamic shared memory
//   width, height, tiles_x, tiles_y      int32
//   inverse_depth    int32
//   background       [3]
//   splats, instances, tile_begin        as for rasterize_forward
//   rgb, alpha, depth, final_T, stop, states, segment_tile      as rasterize_forward wrote them
//   v_rgb            [C, H, W, 3] or 0
//   v_alpha          [C, H, W, 1] or 0
//   v_depth          [C, H, W, 1]; rasterize_backward does not read it (0)
//   splat_grads      in/out [C, N, 10]; zeros before the launch
// The background's gradient is torch's: (final_T[..., None] * v_rgb).sum((0, 1, 2)).
extern "C" __global__ void rasterize_backward(int width, int height, int tiles_x, int tiles_y, int inverse_depth,
                                              const float* background, const float* splats, const int* instances,
                                              const long long* tile_begin, const float* rgb, const float* alpha,
                                              const float* depth, const float* final_T, const int* stop, const float* states,
                                              const int* segment_tile, const float* v_rgb, const float* v_alpha,
                                              const float* v_depth, float* splat_grads);
extern "C" __global__ void rasterize_backward_depth(int width, int height, int tiles_x, int tiles_y, int inverse_depth,
                                                    const float* background, const float* splats, const int* instances,
                                                    const long long* tile_begin, const float* rgb, const float* alpha,
                                                    const float* depth, const float* final_T, const int* stop,
                                                    const float* states, const int* segment_tile, const float* v_rgb,
                                                    const float* v_alpha, const float* v_depth, float* splat_grads);
