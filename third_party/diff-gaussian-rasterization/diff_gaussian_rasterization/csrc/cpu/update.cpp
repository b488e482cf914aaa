// SPDX-License-Identifier: Apache-2.0
// Phase 5 and the optimiser in one pass, for training without autograd: the gradients of a chunk of Gaussians live in the cache only, and
// the parameters are read once for both. Of the 10 times that each number's 4 bytes cross the border to memory in two passes, 6 remain.
#include <algorithm>
#include <cmath>

#include "parallel.h"

#include "frame.h"

namespace s2d {
namespace {

constexpr int64_t CHUNK = 256;  // Gaussians per task: 40 KB of gradients at SH degree 2
static_assert(CHUNK % CAMERA_UNIT == 0, "two tasks never add to the same sums");
constexpr int NUM_TENSORS = 6;
enum Tensors { MEANS, LOG_SCALES, QUATS, OPACITY_LOGITS, SH0, SHN };

// Gradients of a chunk, behind one another in the thread's own memory.
GradientArgs chunk_gradients(const AdamTensor* tensors, bool lengths, const float** grads) {
  static thread_local Buffer<float> memory;
  int64_t width = 2 + 1;
  for (int t = 0; t < NUM_TENSORS; ++t) width += tensors[t].width;
  float* next = memory.reserve(width * CHUNK);
  float* begin[NUM_TENSORS + 1];
  for (int t = 0; t < NUM_TENSORS; ++t) {
    begin[t] = next;
    grads[t] = next;
    next += tensors[t].width * CHUNK;
  }
  begin[NUM_TENSORS] = next;
  GradientArgs out = {};
  out.means = begin[MEANS], out.log_scales = begin[LOG_SCALES], out.quats = begin[QUATS];
  out.opacity_logits = begin[OPACITY_LOGITS], out.sh0 = begin[SH0], out.shN = begin[SHN];
  out.means2d = begin[NUM_TENSORS];
  if (lengths) out.lengths = out.means2d + 2 * CHUNK;
  return out;
}

// From the logits that were drawn to the parameters that they were made of.
void apply_opacity_slope(const float* slope, int64_t begin, int64_t end, float* grad) {
  for (int64_t g = begin; g < end; ++g) {
    const float d = slope[g] * grad[g - begin];
    grad[g - begin] = __builtin_isfinite(d) ? d : 0.0f;
  }
}

void add_opacity_penalty(const UpdateArgs& update, int64_t n, int64_t begin, int64_t end, float* grad) {
  for (int64_t g = begin; g < end; ++g) {
    const float opacity = 1.0f / (1.0f + std::exp(-update.tensors[OPACITY_LOGITS].param[g]));
    const float d = update.opacity_penalty / static_cast<float>(n) * opacity * (1.0f - opacity);
    grad[g - begin] += __builtin_isfinite(d) ? d : 0.0f;
  }
}

void add_statistics(const UpdateArgs& update, int64_t begin, int64_t end, const float* means2d, const float* lengths) {
  for (int64_t g = begin; g < end; ++g) {
    const float x = update.scale_x * means2d[2 * (g - begin)], y = update.scale_y * means2d[2 * (g - begin) + 1];
    const bool seen = update.radii[g] > 0;
    const float length = update.lengths ? lengths[g - begin] : __builtin_sqrtf(x * x + y * y);
    update.grad_sum[g] += seen ? length : 0.0f;
    update.num_views[g] += seen ? 1.0f : 0.0f;
  }
}

// The rows [begin, end) of a tensor as a tensor of its own.
AdamTensor rows_of(const AdamTensor& t, const float* grad, int64_t begin) {
  AdamTensor out = t;
  out.param += begin * t.width, out.exp_avg += begin * t.width, out.exp_avg_sq += begin * t.width;
  out.grad = grad;
  return out;
}

}  // namespace

void backward_update(Frame& frame, const SceneArgs& scene, const UpdateArgs& update, bool with_depth, int num_threads) {
  PhaseTimer timer(frame, PHASE_BACKWARD_PROJECT);
  const int64_t n = scene.n;
  GradientArgs camera = {};
  camera.viewmat = update.viewmat, camera.intrinsics = update.intrinsics;
  double* camera_sums = start_camera_sums(frame, n, camera);
  parallel_for((n + CHUNK - 1) / CHUNK, num_threads, [&](int64_t chunk) {
    const int64_t begin = chunk * CHUNK, end = std::min(n, begin + CHUNK);
    const float* grads[NUM_TENSORS];
    const GradientArgs gradients = chunk_gradients(update.tensors, update.lengths, grads);
    backward_rows(frame, scene, gradients, with_depth, begin, end, begin, camera_sums);
    if (update.opacity_slope) apply_opacity_slope(update.opacity_slope, begin, end, gradients.opacity_logits);
    const bool all = update.opacity_penalty > 0.0f;
    if (all) add_opacity_penalty(update, n, begin, end, gradients.opacity_logits);
    if (update.grad_sum) add_statistics(update, begin, end, gradients.means2d, gradients.lengths);
    const AdamArgs rows = {end - begin, NUM_TENSORS, nullptr, all ? nullptr : update.radii + begin, sizeof(int32_t)};
    for (int t = 0; t < NUM_TENSORS; ++t) adam_rows(rows, rows_of(update.tensors[t], grads[t], begin), 0, end - begin);
  });
  finish_camera_sums(frame, n, camera);
}

}  // namespace s2d
