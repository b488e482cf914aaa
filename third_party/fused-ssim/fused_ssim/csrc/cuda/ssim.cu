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
//   partials         out [3, planes, H, W, channels] or 0: for ssim_gradient
//
// ssim_gradient                          grid (ceil(W / 32), ceil(H / 32), planes), block 256, no dynamic shared memory
//   height, width, channels              int32
//   l1_factor, ssim_factor               float32
//   gradient_factor  float32
//   upstream         float32 [1] on the device, or 0: one more factor (an upstream scalar gradient)
//   x, y             [planes, H, W, channels]
//   pixel_weight     [H, W, 1] or 0
//   partials         [3, planes, H, W, channels], from ssim_forward
//   gradient         out [planes, H, W, channels]
// planes must be at most 65535 (a grid's limit): more go in several launches.
extern "C" __global__ void ssim_forward(int height, int width, int channels, int margin, float l1_factor, float ssim_factor,
                                        const float* x, const float* y, const float* map_gradient, double* sum, float* ssim_map,
                                        float* partials);
extern "C" __global__ void ssim_gradient(int height, int width, int channels, float l1_factor, float ssim_factor,
                                         float gradient_factor, const float* upstream, const float* x, const float* y,
                                         const float* pixel_weight, const float* partials, float* gradient);
