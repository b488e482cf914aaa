// SPDX-License-Identifier: Apache-2.0
// Phase 5: from the sums of each splat to the gradients of the raw parameters and of the cameras; or, in training without autograd, on to
// the new values of the parameters. One thread per Gaussian. Conventions and the order of launches: project.cu.
//
// project_backward                       grid ceil(N / 128), block 128, no dynamic shared memory
//   n, num_coeffs, degree, activated, scale_modifier, width, height, inverse_depth, antialiasing      as for project_forward
//   with_depth       int32   1: rasterize_backward_depth made the sums
//   num_cameras      int32   C
//   means, log_scales, quats, opacity_logits, sh0, shN, colors, covars, viewmats, Ks      as for project_forward
//   radii            int32 [C, N]
//   splat_grads      [C, N, 10]
//   d_means          out [N, 3]
//   d_log_scales     out [N, 3] or 0
//   d_quats          out [N, 4] or 0
//   d_opacity_logits out [N]
//   d_sh0            out [N, 1, 3] or 0
//   d_shN            out [N, K-1, 3] or 0
//   d_colors         out [N, 3] or 0
//   d_covars         out [N, 6] or 0
//   d_means2d        out [C, N, 2] or 0
//   camera_sums      in/out float64 [C, 19] or 0; zeros before the launch
// Gradients are summed over the cameras and written once, zeros included: nothing but camera_sums needs filling before. A gradient
// pointer may be 0 exactly where the parameter's own pointer is 0 (d_means2d: where nobody asks).
//
// project_update                         grid ceil(N / 128), block 128, no dynamic shared memory; one camera
//   n, num_coeffs, degree, width, height, with_depth      as above; not activated, scale_modifier 1, no inverse depth, no antialiasing
//   viewmat          [4, 4]
//   K                [3, 3]
//   radii            int32 [N]
//   splat_grads      [N, 10]
//   means, log_scales, quats, opacity_logits, sh0, shN          in/out as above, shN 0 where K = 1
//   then exp_avg of these six, then exp_avg_sq of these six     in/out, same shapes
//   rates            [6, 6] on the device: a row per tensor of lr, beta1, beta2, 1 - beta1, 1 - beta2, eps, each rounded from float64
//   opacity_penalty  float32; > 0: all rows are updated, else those with radii > 0
//   scale_x, scale_y float32 of the 2D gradients in the statistics
//   grad_sum         in/out [N] or 0
//   num_views        in/out [N] or 0
//   camera_sums      in/out float64 [1, 19] or 0; zeros before the launch
//
// finish_cameras                         grid C, block 32, no dynamic shared memory
//   viewmats         [C, 4, 4]
//   camera_sums      float64 [C, 19]
//   d_viewmats       out [C, 4, 4]
//   d_intrinsics     out [C, 4]: by fx, fy, cx, cy
extern "C" __global__ void project_backward(
    long long n, int num_coeffs, int degree, int activated, float scale_modifier, int width, int height, int inverse_depth,
    int antialiasing, int with_depth, int num_cameras, const float* means, const float* log_scales, const float* quats,
    const float* opacity_logits, const float* sh0, const float* shN, const float* colors, const float* covars,
    const float* viewmats, const float* Ks, const int* radii, const float* splat_grads, float* d_means, float* d_log_scales,
    float* d_quats, float* d_opacity_logits, float* d_sh0, float* d_shN, float* d_colors, float* d_covars, float* d_means2d,
    double* camera_sums);
extern "C" __global__ void project_update(
    long long n, int num_coeffs, int degree, int width, int height, int with_depth, const float* viewmat, const float* K,
    const int* radii, const float* splat_grads, float* means, float* log_scales, float* quats, float* opacity_logits, float* sh0,
    float* shN, float* m_means, float* m_log_scales, float* m_quats, float* m_opacity_logits, float* m_sh0, float* m_shN,
    float* v_means, float* v_log_scales, float* v_quats, float* v_opacity_logits, float* v_sh0, float* v_shN, const float* rates,
    float opacity_penalty, float scale_x, float scale_y, float* grad_sum, float* num_views, double* camera_sums);
extern "C" __global__ void finish_cameras(const float* viewmats, const double* camera_sums, float* d_viewmats, float* d_intrinsics);
