// SPDX-License-Identifier: Apache-2.0
// Phase 1: Gaussians -> Splat records, and how many tiles each touches. One thread per (camera, Gaussian).
//
// All tensors are contiguous float32 on the device unless said otherwise; "or 0" marks pointers that may be null. C cameras, N Gaussians,
// K stored SH coefficients per channel, tiles of 16 x 16 pixels: tiles_x = ceil(width / 16), tiles_y = ceil(height / 16).
//
// A render is these launches in this order; lines with "torch" are what torch does between them.
//
//   project_forward                                                                                    project.cu
//   torch   order = depth_keys.sort(dim=1, stable=True).indices                      int64 [C, N]
//   torch   ends = tile_counts.gather(1, order).flatten().cumsum(0, int64)           int64 [C * N]
//   torch   I = int(ends[-1]): the one wait for the device; it sizes what follows (no Gaussians: I = 0)
//   emit_instances_16 where C * tiles_x * tiles_y <= 32767, else emit_instances_32; not where I = 0    bin.cu
//   torch   tiles, permutation = tiles.sort(stable=True)                             int16 or int32 [I], int64 [I]
//   tile_ranges_16 / _32 (also where I = 0)                                                            bin.cu
//   rasterize_forward                                                                                  rasterize.cu
//   rasterize_backward, or rasterize_backward_depth where depth has a gradient                         rasterize_backward.cu
//   project_backward (autograd), or project_update (training without autograd, C = 1)                  project_backward.cu
//   finish_cameras, where a camera wants a gradient                                                    project_backward.cu
//
// project_forward                        grid (ceil(N / 128), C), block 128, no dynamic shared memory; not launched where N or C is 0
//   n                int64   N
//   num_coeffs       int32   K: 1, 4, 9 or 16
//   degree           int32   SH degree in use
//   activated        int32   1: log_scales holds scales, opacity_logits opacities
//   scale_modifier   float32
//   width, height    int32   pixels
//   inverse_depth    int32   1: the depth image is sum w / z
//   antialiasing     int32   1: opacity times sqrt(det / det blurred)
//   means            [N, 3]
//   log_scales       [N, 3] or 0 (with covars)
//   quats            [N, 4] or 0 (with covars)
//   opacity_logits   [N]
//   sh0              [N, 1, 3] or 0 (with colors)
//   shN              [N, K-1, 3] or 0 (with colors, or K = 1)
//   colors           [N, 3] or 0: instead of SH
//   covars           [N, 6] or 0: instead of scales and rotations
//   viewmats         [C, 4, 4]
//   Ks               [C, 3, 3]
//   means2d_offset   [C, N, 2] or 0: added to the projected means
//   splats           out [C, N, 12]; only records of visible Gaussians are written
//   depth_keys       out int32 [C, N]: the bits of z, INT32_MAX where nothing is drawn
//   tile_counts      out int32 [C, N]
//   radii            out int32 [C, N]
extern "C" __global__ void project_forward(long long n, int num_coeffs, int degree, int activated, float scale_modifier, int width,
                                           int height, int inverse_depth, int antialiasing, const float* means,
                                           const float* log_scales, const float* quats, const float* opacity_logits,
                                           const float* sh0, const float* shN, const float* colors, const float* covars,
                                           const float* viewmats, const float* Ks, const float* means2d_offset, float* splats,
                                           int* depth_keys, int* tile_counts, int* radii);
