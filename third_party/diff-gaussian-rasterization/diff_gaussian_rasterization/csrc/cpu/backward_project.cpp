// SPDX-License-Identifier: Apache-2.0
// Phase 5: sum the slots of each Gaussian, in tile order, and carry the sums back to its raw parameters and to the camera.
// `first` counts Gaussians, `row` the rows of the gradients: the same, unless update.cpp keeps the gradients of a few rows only.
#include <algorithm>

#include "parallel.h"

#include "gaussian_batch.h"

namespace s2d {
namespace {

constexpr int64_t CHUNK = 512;  // Gaussians per task
static_assert(CHUNK % CAMERA_UNIT == 0, "two tasks never add to the same sums");

// Write rows of WIDTH values for the Gaussians [first, first + count); rows not in `visible` and values that are not finite become
// zero.
template <int WIDTH>
S2D_INLINE void write_rows(float* data, int64_t first, int count, Mask visible, const F* values, bool accumulate) {
  if (!data) return;
  F columns[WIDTH];
  if (accumulate) load_rows<WIDTH>(data, first, count, columns);
  for (int k = 0; k < WIDTH; ++k) {
    const F value = zero_unless(visible & is_finite(values[k]), values[k]);
    columns[k] = accumulate ? columns[k] + value : value;
  }
  store_rows<WIDTH>(data, first, count, columns);
}

void clear_rows(float* data, int width, int64_t first, int64_t count, bool accumulate) {
  if (data && !accumulate) std::fill_n(data + first * width, count * width, 0.0f);
}

constexpr int SLOT_WIDTH = sizeof(Slot) / sizeof(float);
constexpr int SLOTS_AHEAD = 24;  // the slots were last written by other tiles, maybe on another core

// Sum the slots of each visible Gaussian; sums[k] is the vector of the k-th sums.
S2D_INLINE void sum_slots(const Frame& frame, int64_t first, uint32_t visible, F* sums) {
  F total[SLOT_WIDTH];  // SLOT_WIDTH / LANES vectors a Gaussian, LANES Gaussians
  for (int k = 0; k < SLOT_WIDTH; k += LANES) {
    for (int l = 0; l < LANES; ++l) {
      F sum(0.0f);
      if (visible >> l & 1) {
        const SlotRange range = frame.slot_ranges[first + l];
        const Slot* slot = frame.slots.data() + range.begin;
        for (uint32_t i = 0; i < range.count; ++i) {
          __builtin_prefetch(&slot[i + SLOTS_AHEAD]);
          sum = sum + load(slot[i].sums + k);
        }
      }
      total[l] = sum;
    }
    transpose(total);
    for (int i = 0; i < LANES; ++i) sums[k + i] = total[i];
  }
}

// Colour gradients of a batch; adds what passes through the view direction to d_mean and to the camera centre.
void sh_backward(const Frame& frame, const SceneArgs& scene, const GradientArgs& gradients, int64_t first, int64_t row, int count,
                 Mask visible, const GaussianBatch& batch, const F* d_rgb, F* d_mean, F* d_center) {
  F dir[3], inv_distance, basis[SH_MAX_COEFFS], color[3], d_color[3];
  ShBatch sh;
  view_direction(frame.camera, batch.mean, dir, inv_distance);
  sh_basis(scene.degree, dir[0], dir[1], dir[2], basis);
  load_sh(scene, first, count, sh);
  sh_color(scene, sh, basis, color);
  for (int i = 0; i < 3; ++i) d_color[i] = zero_unless(visible & (color[i] > F(0.0f)), d_rgb[i]);  // elsewhere it was clamped

  const int used = (scene.degree + 1) * (scene.degree + 1), width = 3 * (scene.num_coeffs - 1);
  alignas(64) float columns[SH_MAX_COLUMNS * LANES];
  F weights[SH_MAX_COEFFS];  // derivative of the loss by each basis function
  for (int k = 1; k < used; ++k) {
    const float* c = sh.c + 3 * (k - 1) * LANES;
    weights[k] = load(c) * d_color[0] + load(c + LANES) * d_color[1] + load(c + 2 * LANES) * d_color[2];
    for (int i = 0; i < 3; ++i) store(columns + (3 * (k - 1) + i) * LANES, zero_unless(visible, d_color[i] * basis[k]));
  }
  for (int column = 3 * (used - 1); column < std::max(width, LANES); ++column) store(columns + column * LANES, F(0.0f));
  float* target = gradients.shN + width * row;
  if (gradients.accumulate) {
    load_long_rows(target, width, count, sh.c);
    for (int k = 0; k < width; ++k) store(columns + k * LANES, load(sh.c + k * LANES) + load(columns + k * LANES));
  }
  store_long_rows(target, width, count, columns);
  const F d_sh0[3] = {d_color[0] * basis[0], d_color[1] * basis[0], d_color[2] * basis[0]};
  write_rows<3>(gradients.sh0, row, count, visible, d_sh0, gradients.accumulate);

  if (scene.degree == 0) return;
  F d_dir[3];
  sh_direction_gradient(scene.degree, dir[0], dir[1], dir[2], weights, d_dir);
  direction_adjoint(dir, inv_distance, d_dir, d_mean, d_center);
}

void backward_batch(const Frame& frame, const SceneArgs& scene, const GradientArgs& gradients, bool with_depth, int64_t first,
                    int64_t row, int count, uint32_t visible_bits, double* camera_sums) {
  prefetch_after(scene, first);
  F sums[SLOT_WIDTH];
  sum_slots(frame, first, visible_bits, sums);
  const Mask visible = mask_of(visible_bits);
  GaussianBatch batch;
  load_batch(scene, first, count, batch);
  Footprint<F> fp;
  project_footprint(frame.camera, batch.mean, batch.H, fp);

  FootprintGrad<F> grad;
  footprint_gradient(fp, sums, frame.camera_args.antialiasing, with_depth, frame.camera_args.inverse_depth, grad);

  F d_mean[3], d_H[9], camera[CAMERA_SUMS];
  footprint_adjoint(frame.camera, batch.mean, batch.H, fp, grad, d_mean, d_H, camera, camera + 9);
  for (int k = 12; k < 15; ++k) camera[k] = F(0.0f);
  const bool add = gradients.accumulate;
  const F d_rgb[3] = {sums[SUM_R], sums[SUM_GREEN], sums[SUM_B]};
  if (scene.colors) {
    write_rows<3>(gradients.colors, row, count, visible, d_rgb, add);
  } else {
    sh_backward(frame, scene, gradients, first, row, count, visible, batch, d_rgb, d_mean, camera + 12);
  }
  write_rows<3>(gradients.means, row, count, visible, d_mean, add);
  const F d_opacity = F(LN_2) * batch.d_log2_opacity * sums[SUM_G];
  write_rows<1>(gradients.opacity_logits, row, count, visible, &d_opacity, add);
  const F d_pixel[2] = {grad.mean_x, grad.mean_y};
  write_rows<2>(gradients.means2d, row, count, visible, d_pixel, false);
  write_rows<1>(gradients.lengths, row, count, visible, &sums[SUM_LENGTH], false);

  if (scene.covars) {
    F d_covar[6];
    covariance_adjoint(fp, grad, d_covar);
    write_rows<6>(gradients.covars, row, count, visible, d_covar, add);
  } else {
    F by_stored[3], d_R[9], d_scale[3], d_quat[4];
    for (int k = 0; k < 3; ++k) by_stored[k] = scene.activated ? F(scene.scale_modifier) : batch.scale[k];
    half_adjoint(batch.quat, batch.scale, by_stored, d_H, d_scale, d_R);
    rotation_adjoint(batch.quat, batch.inv_norm, d_R, d_quat);
    write_rows<3>(gradients.log_scales, row, count, visible, d_scale, add);
    write_rows<4>(gradients.quats, row, count, visible, d_quat, add);
  }
  if (camera_sums) {
    intrinsics_adjoint(frame.camera, batch.H, fp, grad, camera + 15);
    alignas(64) float lanes[LANES];
    for (int k = 0; k < CAMERA_SUMS; ++k) {
      store(lanes, zero_unless(is_finite(camera[k]), camera[k]));
      for (int l = 0; l < count; ++l) {
        if (visible_bits >> l & 1) camera_sums[k] += static_cast<double>(lanes[l]);
      }
    }
  }
}

void clear_batch(const SceneArgs& scene, const GradientArgs& g, int64_t first, int64_t count) {
  clear_rows(g.means, 3, first, count, g.accumulate);
  clear_rows(g.opacity_logits, 1, first, count, g.accumulate);
  clear_rows(g.means2d, 2, first, count, false);
  clear_rows(g.lengths, 1, first, count, false);
  clear_rows(scene.colors ? g.colors : g.sh0, 3, first, count, g.accumulate);
  if (!scene.colors) clear_rows(g.shN, 3 * (scene.num_coeffs - 1), first, count, g.accumulate);
  if (scene.covars) {
    clear_rows(g.covars, 6, first, count, g.accumulate);
  } else {
    clear_rows(g.log_scales, 3, first, count, g.accumulate);
    clear_rows(g.quats, 4, first, count, g.accumulate);
  }
}

}  // namespace

void backward_rows(const Frame& frame, const SceneArgs& scene, const GradientArgs& gradients, bool with_depth, int64_t begin,
                   int64_t end, int64_t origin, double* camera_sums) {
  for (int64_t first = begin; first < end; first += LANES) {
    const int count = static_cast<int>(std::min<int64_t>(LANES, end - first));
    uint32_t visible = 0;
    for (int l = 0; l < count; ++l) visible |= static_cast<uint32_t>(frame.depths[first + l] != 0) << l;
    if (visible) {
      double* sums = camera_sums ? camera_sums + first / CAMERA_UNIT * CAMERA_SUMS : nullptr;
      backward_batch(frame, scene, gradients, with_depth, first, first - origin, count, visible, sums);
    } else {
      clear_batch(scene, gradients, first - origin, count);
    }
  }
}

double* start_camera_sums(Frame& frame, int64_t n, const GradientArgs& gradients) {
  if (!gradients.viewmat && !gradients.intrinsics) return nullptr;
  const int64_t units = (n + CAMERA_UNIT - 1) / CAMERA_UNIT;
  double* sums = frame.camera_sums.reserve((units + 1) * CAMERA_SUMS);
  std::fill_n(sums, (units + 1) * CAMERA_SUMS, 0.0);
  return sums;
}

void finish_camera_sums(Frame& frame, int64_t n, const GradientArgs& gradients) {
  if (!gradients.viewmat && !gradients.intrinsics) return;
  const int64_t units = (n + CAMERA_UNIT - 1) / CAMERA_UNIT;
  double *sums = frame.camera_sums.data(), *total = sums + units * CAMERA_SUMS;
  for (int64_t unit = 0; unit < units; ++unit) {
    for (int k = 0; k < CAMERA_SUMS; ++k) total[k] += sums[unit * CAMERA_SUMS + k];
  }
  if (gradients.viewmat) viewmat_gradient(frame.camera, total, gradients.viewmat);
  if (gradients.intrinsics) std::copy_n(total + 15, 4, gradients.intrinsics);
}

void backward_project(Frame& frame, const SceneArgs& scene, const GradientArgs& gradients, bool with_depth, int num_threads) {
  PhaseTimer timer(frame, PHASE_BACKWARD_PROJECT);
  const int64_t n = scene.n;
  double* camera_sums = start_camera_sums(frame, n, gradients);
  parallel_for((n + CHUNK - 1) / CHUNK, num_threads, [&](int64_t chunk) {
    const int64_t end = std::min(n, (chunk + 1) * CHUNK);
    backward_rows(frame, scene, gradients, with_depth, chunk * CHUNK, end, 0, camera_sums);
  });
  finish_camera_sums(frame, n, gradients);
}

}  // namespace s2d
