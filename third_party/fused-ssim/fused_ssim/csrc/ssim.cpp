// SPDX-License-Identifier: Apache-2.0
// Mean absolute difference and structural similarity of two images, and the gradient with respect to the first, in one pass.
//
// Per pixel and channel, with G the 11x11 Gaussian window (separable) and zeros outside the image:
//   m1 = G*x, m2 = G*y, q = G*(x^2 + y^2), p = G*(x y)
//   S = A B / (C D),  A = 2 m1 m2 + C1,  B = 2 (p - m1 m2) + C2,  C = m1^2 + m2^2 + C1,  D = q - m1^2 - m2^2 + C2
// The variances enter S only through their sum, so four blurs are enough. With a gradient g that reaches S:
//   dL/dx = G*(g dS/dm1) + 2 x G*(g dS/dq) + y G*(g dS/dp)
// (G is symmetric, and the zeros outside make the blur its own adjoint.)
//
// A task is a strip of rows of a tile of columns. It slides down its strip, kRows rows at a time: x and y are read and laid out in
// segments (blur.h), blurred down and along, turned into S and its partial derivatives; those, five rows behind, are blurred down and
// along again and leave as the gradient. Only as many rows as a blur needs are kept, so everything stays in the L2 cache. A strip
// computes the partials of five rows beyond its ends itself. No number depends on where a strip begins: any cut gives the same bits.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "abi.h"
#include "blur.h"
#include "parallel.h"

namespace s2d {
namespace {

constexpr float kC1 = 0.01f * 0.01f;
constexpr float kC2 = 0.03f * 0.03f;
constexpr int kRows = 5;                  // that share the inputs of a blur down the columns; divides the halo of ten
constexpr int kRing = kRows + 2 * kHalf;  // rows that such a blur reads
constexpr int kTile = 640;                // pixels across, halo included: its rings take 600 KiB
constexpr int kMinStrip = 32;             // rows, so that the ten of the halo are cheap

struct Problem {
  const float *x, *y;         // [planes, height, width, channels]
  const float* map_gradient;  // of S, same shape; null: 1
  const float* pixel_weight;  // factor of a pixel's gradient [height, width]; null: 1
  int planes, height, width, channels, margin;
  float l1_factor, ssim_factor, gradient_factor;
  float* ssim_map;  // null or same shape
  float* gradient;  // null or same shape
};

struct Task {
  int plane;
  int row_begin, row_end;
  int column_begin, column_end;
  double* row_sums;  // of the rows from row_begin
  int row_sums_step;
};

class Strip {
 public:
  Strip(const Problem& problem, const Task& task, std::vector<Pack>& workspace)
      : problem_(problem),
        task_(task),
        left_(std::max(0, task.column_begin - 2 * kHalf)),
        layout_(std::min(problem.width, task.column_end + 2 * kHalf) - left_, problem.channels),
        weight_layout_(layout_.pixels, 1),
        // Odd distances: rows a multiple of 4096 bytes apart would compete for the same lines of the L1 cache.
        image_pitch_((2 * layout_.pitch) | 1),
        partial_pitch_((3 * layout_.pitch) | 1),
        blurred_pitch_((layout_.segment + 2 * kHalf) | 1) {
    const int segment = layout_.segment;
    const size_t sizes[] = {size_t(kRing) * image_pitch_,
                            size_t(kRing) * partial_pitch_,
                            size_t(kRows) * 4 * blurred_pitch_,
                            size_t(kRows) * layout_.pitch,
                            size_t(kRows) * weight_layout_.pitch,
                            size_t(segment),
                            size_t(segment),
                            size_t(layout_.staging_floats() / kLanes)};
    size_t total = 0;
    for (size_t size : sizes) total += size;
    if (workspace.size() < total) workspace.resize(total);
    Pack* next = workspace.data();
    Pack** const parts[] = {&images_, &partials_, &blurred_, &out_, &weights_, &inside_, &counted_, &staging_};
    for (int i = 0; i < 8; ++i) {
      *parts[i] = next;
      next += sizes[i];
    }
    make_masks();
  }

  void run() {
    const bool gradient = problem_.gradient != nullptr;
    static_assert(2 * kHalf % kRows == 0, "the gradient's rows start where a step of the partials ends");
    const int first = gradient ? task_.row_begin - kHalf : task_.row_begin;
    const int last = gradient ? task_.row_end + kHalf : task_.row_end;
    for (int r = first - kHalf; r < first + kHalf; ++r) load_images(r);
    for (int r = first; r < last; r += kRows) {
      for (int o = 0; o < kRows; ++o) load_images(r + o + kHalf);
      make_partials(r);
      if (gradient && r - kHalf >= task_.row_begin) make_gradient(r - kHalf);
    }
  }

 private:
  static int slot(int row) { return (row + 4 * kRing) % kRing; }
  float* staging() const { return reinterpret_cast<float*>(staging_); }
  Pack* image(int row) const { return images_ + slot(row) * image_pitch_; }  // x, then y
  Pack* partial(int row) const { return partials_ + slot(row) * partial_pitch_; }
  Pack* blurred(int o, int quantity) const { return blurred_ + (o * 4 + quantity) * blurred_pitch_ + kHalf; }
  Pack* out(int o) const { return out_ + o * layout_.pitch; }
  Pack* weights(int o) const { return weights_ + o * weight_layout_.pitch; }
  int64_t pixel_offset(int row, int column) const {
    return (int64_t{task_.plane} * problem_.height + row) * problem_.width + column;
  }
  bool in_image(int row) const { return row >= 0 && row < problem_.height; }
  bool is_ours(int row) const { return row >= task_.row_begin && row < task_.row_end; }
  bool has_partials(int row) const {
    return row >= problem_.margin && row < problem_.height - problem_.margin && row >= task_.row_begin - kHalf &&
           row < task_.row_end + kHalf;
  }

  // inside_: pixels whose S counts for the gradient; counted_: those of this task, for the sum.
  void make_masks() {
    int32_t* const inside = reinterpret_cast<int32_t*>(inside_);
    int32_t* const counted = reinterpret_cast<int32_t*>(counted_);
    for (int s = 0; s < layout_.segment; ++s) {
      for (int l = 0; l < kLanes; ++l) {
        const int column = left_ + l * layout_.segment + s;
        const bool in = column < left_ + layout_.pixels && column >= problem_.margin &&
                        column < problem_.width - problem_.margin;
        inside[s * kLanes + l] = in ? -1 : 0;
        counted[s * kLanes + l] = in && column >= task_.column_begin && column < task_.column_end ? -1 : 0;
      }
    }
  }

  void load_images(int row) {
    Pack* const x = image(row);
    if (!in_image(row)) {
      std::fill(x, x + 2 * layout_.pitch, Pack{});
      return;
    }
    const int64_t at = pixel_offset(row, left_) * problem_.channels;
    layout_.load_row(problem_.x + at, staging(), x);
    layout_.load_row(problem_.y + at, staging(), x + layout_.pitch);
  }

  void make_partials(int first) {
    double sums[kRows] = {};
    bool any = false;
    for (int o = 0; o < kRows; ++o) any |= has_partials(first + o);
    for (int channel = 0; any && channel < problem_.channels; ++channel) {
      blur_images_down(first, channel);
      for (int o = 0; o < kRows; ++o) {
        if (has_partials(first + o)) sums[o] += make_partials_of_row(first + o, o, channel);
      }
    }
    for (int o = 0; o < kRows; ++o) {
      const int row = first + o;
      if (!has_partials(row)) {
        std::fill(partial(row), partial(row) + 3 * layout_.pitch, Pack{});
        std::fill(out(o), out(o) + layout_.pitch, Pack{});
      }
      if (is_ours(row)) {
        task_.row_sums[(row - task_.row_begin) * task_.row_sums_step] = sums[o];
        if (problem_.ssim_map) store(problem_.ssim_map, row, o);
      }
      if (problem_.map_gradient && has_partials(row)) weigh_partials(row, out(o));
    }
  }

  // m1, m2, q, p of a channel of kRows rows, down the columns only.
  void blur_images_down(int first, int channel) {
    const Pack* rows[kRing];
    for (int k = 0; k < kRing; ++k) rows[k] = image(first - kHalf + k) + channel * layout_.channel_pitch;
    const int to_y = layout_.pitch, segment = layout_.segment;
    const auto write = [&](int s, int quantity, const Vec(&result)[kRows]) {
      for (int o = 0; o < kRows; ++o) blurred(o, quantity)[s].v = result[o];
    };
    for (int s = 0; s < segment; ++s) {
      Vec in[kRing], result[kRows];
      for (int k = 0; k < kRing; ++k) in[k] = in_register(rows[k][s].v);
      blur<kRows>(in, result);
      write(s, 0, result);
      for (int k = 0; k < kRing; ++k) in[k] = in_register(rows[k][to_y + s].v);
      blur<kRows>(in, result);
      write(s, 1, result);
      for (int k = 0; k < kRing; ++k) {
        const Vec x = rows[k][s].v, y = rows[k][to_y + s].v;
        in[k] = in_register(fma(x, x, y * y));
      }
      blur<kRows>(in, result);
      write(s, 2, result);
      for (int k = 0; k < kRing; ++k) in[k] = in_register(rows[k][s].v * rows[k][to_y + s].v);
      blur<kRows>(in, result);
      write(s, 3, result);
    }
  }

  // Returns the channel's part of the value. A lane sums its segment in float32 (some dozen numbers), the rest is float64.
  double make_partials_of_row(int row, int o, int channel) {
    const int offset = channel * layout_.channel_pitch;
    const Pack* const x = image(row) + offset;
    const Pack* const y = x + layout_.pitch;
    Pack* const dm1 = partial(row) + offset;
    Pack* const dq = dm1 + layout_.pitch;
    Pack* const dp = dq + layout_.pitch;
    Pack* const map = out(o) + offset;
    for (int quantity = 0; quantity < 4; ++quantity) layout_.fill_halo(blurred(o, quantity));
    const Vec l1_factor = splat(problem_.l1_factor), ssim_factor = splat(problem_.ssim_factor);
    const bool want_map = problem_.ssim_map != nullptr;
    Vec sum = {};
    for (int s = 0; s < layout_.segment; s += kUnroll) {
      Vec m1[kUnroll], m2[kUnroll], q[kUnroll], p[kUnroll];
      blur_along(blurred(o, 0) + s, m1);
      blur_along(blurred(o, 1) + s, m2);
      blur_along(blurred(o, 2) + s, q);
      blur_along(blurred(o, 3) + s, p);
      for (int u = 0; u < kUnroll; ++u) {
        const VecInt inside = (VecInt)inside_[s + u].v, counted = (VecInt)counted_[s + u].v;
        const Vec mm = m1[u] * m2[u], ss = fma(m1[u], m1[u], m2[u] * m2[u]);
        const Vec A = fma(splat(2.f), mm, splat(kC1)), B = fma(splat(2.f), p[u] - mm, splat(kC2));
        const Vec C = ss + kC1, D = (q[u] - ss) + kC2;
        const Vec inverse = 1.f / (C * D), twice = inverse + inverse;
        const Vec S = A * B * inverse;
        dm1[s + u].v = keep(inside, twice * fma(m2[u], B - A, m1[u] * S * (C - D)));
        dq[s + u].v = keep(inside, -S * C * twice);  // twice, for the derivative of x^2
        dp[s + u].v = keep(inside, A * twice);
        sum += keep(counted, fma(l1_factor, abs_of(x[s + u].v - y[s + u].v), ssim_factor * S));
        if (want_map) map[s + u].v = keep(inside, S);
      }
    }
    double total = 0.0;
    for (int l = 0; l < kLanes; ++l) total += double(sum[l]);
    return total;
  }

  void weigh_partials(int row, Pack* weights) {
    layout_.load_row(problem_.map_gradient + pixel_offset(row, left_) * problem_.channels, staging(), weights);
    for (int quantity = 0; quantity < 3; ++quantity) {
      Pack* const values = partial(row) + quantity * layout_.pitch;
      for (int i = 0; i < layout_.pitch; ++i) values[i].v *= weights[i].v;
    }
  }

  void make_gradient(int first) {
    for (int o = 0; problem_.pixel_weight && o < kRows && first + o < task_.row_end; ++o) {
      weight_layout_.load_row(problem_.pixel_weight + pixel_offset(first + o, left_), staging(), weights(o));
    }
    for (int channel = 0; channel < problem_.channels; ++channel) {
      blur_partials_down(first, channel);
      for (int o = 0; o < kRows && first + o < task_.row_end; ++o) make_gradient_of_row(first + o, o, channel);
    }
    for (int o = 0; o < kRows && first + o < task_.row_end; ++o) store(problem_.gradient, first + o, o);
  }

  void blur_partials_down(int first, int channel) {
    const Pack* rows[kRing];
    for (int k = 0; k < kRing; ++k) rows[k] = partial(first - kHalf + k) + channel * layout_.channel_pitch;
    const int segment = layout_.segment;
    for (int quantity = 0; quantity < 3; ++quantity) {
      const int from = quantity * layout_.pitch;
      for (int s = 0; s < segment; ++s) {
        Vec in[kRing], result[kRows];
        for (int k = 0; k < kRing; ++k) in[k] = in_register(rows[k][from + s].v);
        blur<kRows>(in, result);
        for (int o = 0; o < kRows; ++o) blurred(o, quantity)[s].v = result[o];
      }
    }
  }

  void make_gradient_of_row(int row, int o, int channel) {
    const int offset = channel * layout_.channel_pitch;
    const Pack* const x = image(row) + offset;
    const Pack* const y = x + layout_.pitch;
    const Pack* const weight = problem_.pixel_weight ? weights(o) : nullptr;
    Pack* const to = out(o) + offset;
    for (int quantity = 0; quantity < 3; ++quantity) layout_.fill_halo(blurred(o, quantity));
    const Vec l1_factor = splat(problem_.gradient_factor * problem_.l1_factor);
    const Vec ssim_factor = splat(problem_.gradient_factor * problem_.ssim_factor);
    for (int s = 0; s < layout_.segment; s += kUnroll) {
      Vec dm1[kUnroll], dq[kUnroll], dp[kUnroll];
      blur_along(blurred(o, 0) + s, dm1);
      blur_along(blurred(o, 1) + s, dq);
      blur_along(blurred(o, 2) + s, dp);
      for (int u = 0; u < kUnroll; ++u) {
        const Vec xv = x[s + u].v, yv = y[s + u].v;
        const Vec similarity = fma(xv, dq[u], fma(yv, dp[u], dm1[u]));
        const Vec value = fma(ssim_factor, similarity, l1_factor * sign_of(xv - yv));
        to[s + u].v = weight ? value * weight[s + u].v : value;
      }
    }
  }

  // Writes this task's columns of out(o).
  void store(float* image, int row, int o) {
    layout_.store_row(out(o), staging(), task_.column_begin - left_, task_.column_end - left_,
                      image + pixel_offset(row, task_.column_begin) * problem_.channels);
  }

  const Problem& problem_;
  const Task& task_;
  const int left_;  // first column that is read
  const RowLayout layout_, weight_layout_;
  const int image_pitch_, partial_pitch_, blurred_pitch_;
  Pack *images_, *partials_;  // rings of kRing rows: (x, y) and (dS/dm1, 2 dS/dq, dS/dp)
  Pack* blurred_;             // one channel of kRows rows, four quantities, each with its halo
  Pack *out_, *weights_;      // kRows rows
  Pack *inside_, *counted_;   // masks, the same for every row
  Pack* staging_;             // a row in the image's own order
};

double run(const Problem& problem, int num_threads) {
  const int halo = 4 * kHalf;  // of a tile: two blurs reach five pixels each, to both sides
  const int fewest = problem.width <= kTile ? 1 : divide_up(problem.width, kTile - halo);
  const int tile = divide_up(problem.width, fewest), tiles = divide_up(problem.width, tile);
  const int wanted = divide_up(3 * num_threads, problem.planes * tiles);
  const int strips = num_threads == 1 ? 1 : std::max(1, std::min(wanted, problem.height / kMinStrip));
  const int strip = divide_up(problem.height, strips);
  static thread_local std::vector<double> row_sums;
  double* const sums = (row_sums.resize(size_t(problem.planes) * problem.height * tiles), row_sums.data());
  parallel_for(int64_t{problem.planes} * tiles * strips, num_threads, [&](int64_t number) {
    static thread_local std::vector<Pack> workspace;
    Task task;
    const int column = int(number % tiles), row = int(number / tiles % strips);
    task.plane = int(number / tiles / strips);
    task.row_begin = row * strip;
    task.row_end = std::min(problem.height, task.row_begin + strip);
    task.column_begin = column * tile;
    task.column_end = std::min(problem.width, task.column_begin + tile);
    if (task.row_begin >= task.row_end || task.column_begin >= task.column_end) return;
    task.row_sums = sums + (int64_t{task.plane} * problem.height + task.row_begin) * tiles + column;
    task.row_sums_step = tiles;
    Strip(problem, task, workspace).run();
  });
  double sum = 0.0;
  for (double value : row_sums) sum += value;
  return sum;
}

}  // namespace
}  // namespace s2d

// Writes to `sum` the sum over all values of l1_factor |x - y| + ssim_factor S. Values nearer than `margin` to an edge do not count.
// Writes S to ssim_map and gradient_factor times the derivative of that sum by x to gradient, where they are not null; there,
// S of every value has the extra factor map_gradient and a pixel's result the factor pixel_weight, where those are not null.
// Returns 0, or 1 when memory runs out.
S2D_EXPORT int s2d_image_loss(const float* x, const float* y, const float* map_gradient, const float* pixel_weight,
                              int32_t planes, int32_t height, int32_t width, int32_t channels, int32_t margin,
                              float l1_factor, float ssim_factor, float gradient_factor, int32_t num_threads,
                              double* sum, float* ssim_map, float* gradient) {
  return s2d::guarded([&] {
    const s2d::Problem problem = {x,      y,         map_gradient, pixel_weight,    planes,   height,  width, channels,
                                  margin, l1_factor, ssim_factor,  gradient_factor, ssim_map, gradient};
    *sum = s2d::run(problem, num_threads);
  });
}

// Pixels that the compiled code works on at once; for the tests.
S2D_EXPORT int s2d_lanes() { return s2d::kLanes; }
