// SPDX-License-Identifier: Apache-2.0
// Phase 3: blend each tile front to back. Conventions and the order of launches: project.cu.
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
extern "C" __global__ void rasterize_forward(int width, int height, int tiles_x, int tiles_y, int inverse_depth,
                                             const float* background, const float* splats, const int* instances,
                                             const long long* tile_begin, float* rgb, float* alpha, float* depth, float* final_T,
                                             int* stop, float* states, int* segment_tile);
