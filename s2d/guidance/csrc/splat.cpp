// Draws a coloured cloud as small surface patches; what is in front hides what is behind.
//
// Every point is an ellipse on its surface, about as large as the pixel it came from. Per pixel: find the nearest patch, drawn
// larger for this purpose so that a surface also hides what is behind the gaps between its points; take the weighted mean of the
// patches near that depth; close the small holes that are left inside a surface.
// Threads take bands of rows, and every band visits the points in the order of the cloud: any number of threads, the same bits.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "abi.h"
#include "parallel.h"
#include "view.h"

namespace {

using s2d::View;

constexpr int kBand = 16;             // rows per task
constexpr double kSpread = 0.5;       // sigma of a patch in steps of its photo's pixels: neighbours add up to a flat surface
constexpr double kScreenBlur = 0.2;   // sigma added on screen, pixels: no patch falls between pixel centres
constexpr float kReach = 2.0f;        // sigmas within which a patch colours
constexpr float kHideReach = 3.0f;    // sigmas within which it hides
constexpr double kMaxRadius = 24.0;   // pixels: a patch seen from very near does not smear over the picture

struct Splat {
  float u, v, z;
  float a, b, c;                 // inverse covariance, pixels^-2
  float zu, zv;                  // slope of its depth per pixel
  float radius_x, radius_y;      // of the hiding ellipse, pixels
  float weight = 0.0f;           // 0: not drawn
  float thickness;               // depth that one step spans: below this, order means nothing
};

// Columns of the map from steps on the surface to pixels, with the change of depth in the third row.
struct ScreenSteps {
  double m[2][3];

  ScreenSteps(const View& view, const float* steps, double u, double v, double z) {
    const float* second = steps + 3;
    if (second[0] == 0.0f && second[1] == 0.0f && second[2] == 0.0f) {  // no orientation: a disc that faces the camera
      const double size = std::sqrt(double(steps[0]) * steps[0] + double(steps[1]) * steps[1] + double(steps[2]) * steps[2]);
      const double facing[2][3] = {{view.fx * size / z, 0.0, 0.0}, {0.0, view.fy * size / z, 0.0}};
      std::copy(&facing[0][0], &facing[0][0] + 6, &m[0][0]);
      return;
    }
    for (int k = 0; k < 2; ++k) {
      const float* d = steps + 3 * k;
      double c[3];
      for (int r = 0; r < 3; ++r) c[r] = view.R[3 * r] * d[0] + view.R[3 * r + 1] * d[1] + view.R[3 * r + 2] * d[2];
      m[k][0] = (view.fx * c[0] - (u - view.cx) * c[2]) / z;
      m[k][1] = (view.fy * c[1] - (v - view.cy) * c[2]) / z;
      m[k][2] = c[2];
    }
  }
};

Splat make_splat(const View& view, const float* point, const float* steps, float confidence, float near) {
  Splat s;
  const double X[3] = {point[0], point[1], point[2]};
  double u = 0, v = 0;
  const double z = view.project(X, &u, &v);
  if (!(z > near)) return s;
  const ScreenSteps screen(view, steps, u, v, z);
  const auto& m = screen.m;
  constexpr double spread2 = kSpread * kSpread, blur2 = kScreenBlur * kScreenBlur;
  double xx = spread2 * (m[0][0] * m[0][0] + m[1][0] * m[1][0]), yy = spread2 * (m[0][1] * m[0][1] + m[1][1] * m[1][1]);
  double xy = spread2 * (m[0][0] * m[0][1] + m[1][0] * m[1][1]);
  const double shrink = std::min(1.0, (kMaxRadius / kHideReach) * (kMaxRadius / kHideReach) / std::max(std::max(xx, yy), 1e-12));
  xx = xx * shrink + blur2, yy = yy * shrink + blur2, xy *= shrink;
  s.radius_x = static_cast<float>(kHideReach * std::sqrt(xx));
  s.radius_y = static_cast<float>(kHideReach * std::sqrt(yy));
  if (u + s.radius_x < 0 || v + s.radius_y < 0 || u - s.radius_x > view.width || v - s.radius_y > view.height) return s;
  const double det = xx * yy - xy * xy;
  if (!(det > 1e-12)) return s;
  s.u = static_cast<float>(u), s.v = static_cast<float>(v), s.z = static_cast<float>(z);
  s.a = static_cast<float>(yy / det), s.b = static_cast<float>(-xy / det), s.c = static_cast<float>(xx / det);
  const double area = m[0][0] * m[1][1] - m[1][0] * m[0][1];
  const bool has_slope = std::fabs(area) > 0.05;  // square pixels; seen edge-on a patch has none
  s.zu = has_slope ? static_cast<float>((m[0][2] * m[1][1] - m[1][2] * m[0][1]) / area) : 0.0f;
  s.zv = has_slope ? static_cast<float>((m[1][2] * m[0][0] - m[0][2] * m[1][0]) / area) : 0.0f;
  s.thickness = static_cast<float>(std::fabs(m[0][2]) + std::fabs(m[1][2]));
  // Patches that were photographed finer are sharper and outvote the coarse ones.
  s.weight = static_cast<float>(std::max(confidence, 1e-3f) / (xx + yy));
  return s;
}

// Rows [first, stop) of a picture.
struct Band {
  int first, stop, width;

  template <class Visit>
  void for_each_pixel(const Splat& s, const Visit& visit) const {
    const int x0 = std::max(0, static_cast<int>(std::ceil(s.u - s.radius_x - 0.5f)));
    const int x1 = std::min(width - 1, static_cast<int>(std::floor(s.u + s.radius_x - 0.5f)));
    const int y0 = std::max(first, static_cast<int>(std::ceil(s.v - s.radius_y - 0.5f)));
    const int y1 = std::min(stop - 1, static_cast<int>(std::floor(s.v + s.radius_y - 0.5f)));
    for (int y = y0; y <= y1; ++y) {
      const float dy = static_cast<float>(y) + 0.5f - s.v;
      for (int x = x0; x <= x1; ++x) {
        const float dx = static_cast<float>(x) + 0.5f - s.u;
        const float distance2 = s.a * dx * dx + 2.0f * s.b * dx * dy + s.c * dy * dy;
        if (distance2 > kHideReach * kHideReach) continue;
        const float slope = std::min(std::max(s.zu * dx + s.zv * dy, -3.0f * s.thickness), 3.0f * s.thickness);
        visit(static_cast<size_t>(y) * width + x, distance2, s.z + slope);
      }
    }
  }
};

struct Picture {
  int width, height;
  float* image;
  uint8_t* coverage;
  float* depth;
};

// Fills the pixels of a band that are not covered yet with the mean of the patches near the front.
void blend(const std::vector<Splat>& splats, const std::vector<int64_t>& members, const Band& band, const std::vector<float>& front,
           const std::vector<float>& hidden_from, float tolerance, const float* rgbs, const Picture& picture) {
  const size_t begin = static_cast<size_t>(band.first) * band.width, end = static_cast<size_t>(band.stop) * band.width;
  std::vector<float> sums(5 * (end - begin), 0.0f);
  for (int64_t i : members) {
    const Splat& s = splats[i];
    band.for_each_pixel(s, [&](size_t p, float distance2, float z) {
      if (picture.coverage[p] || distance2 > kReach * kReach || z > hidden_from[p] * (1.0f + tolerance) + s.thickness) return;
      const float behind = std::max(z - front[p], 0.0f) / (tolerance * front[p] + s.thickness);
      const float w = s.weight * std::exp(-0.5f * distance2 - behind * behind);
      float* sum = sums.data() + 5 * (p - begin);
      for (int k = 0; k < 3; ++k) sum[k] += w * rgbs[3 * i + k];
      sum[3] += w;
      sum[4] += w * z;
    });
  }
  for (size_t p = begin; p < end; ++p) {
    if (picture.coverage[p]) continue;
    const float* sum = sums.data() + 5 * (p - begin);
    const bool hit = sum[3] > 0.0f;
    picture.coverage[p] = hit;
    picture.depth[p] = hit ? sum[4] / sum[3] : 0.0f;
    for (int k = 0; k < 3; ++k) picture.image[3 * p + k] = hit ? sum[k] / sum[3] : 0.0f;
  }
}

// A hole with surface on most sides and no edge of depth around it is a gap between the points of that surface.
void close_gaps(Picture* picture) {
  constexpr int kMinNeighbours = 5;
  constexpr float kMaxDepthRatio = 1.05f;
  const int width = picture->width, height = picture->height;
  float *image = picture->image, *depth = picture->depth;
  const std::vector<uint8_t> before(picture->coverage, picture->coverage + static_cast<size_t>(width) * height);
  for (int y = 1; y + 1 < height; ++y) {
    for (int x = 1; x + 1 < width; ++x) {
      const size_t p = static_cast<size_t>(y) * width + x;
      if (before[p]) continue;
      int count = 0;
      float nearest = std::numeric_limits<float>::infinity(), farthest = 0, sum[4] = {0, 0, 0, 0};
      for (int dy = -1; dy <= 1; ++dy) {
        for (int dx = -1; dx <= 1; ++dx) {
          const size_t q = p + static_cast<ptrdiff_t>(dy) * width + dx;
          if (!before[q]) continue;
          ++count;
          nearest = std::min(nearest, depth[q]);
          farthest = std::max(farthest, depth[q]);
          for (int k = 0; k < 3; ++k) sum[k] += image[3 * q + k];
          sum[3] += depth[q];
        }
      }
      if (count < kMinNeighbours || farthest > kMaxDepthRatio * nearest) continue;
      picture->coverage[p] = 1;
      for (int k = 0; k < 3; ++k) image[3 * p + k] = sum[k] / static_cast<float>(count);
      depth[p] = sum[3] / static_cast<float>(count);
    }
  }
}

}  // namespace

// points [P, 3], rgbs [P, 3], confidence [P], steps [P, 2, 3] (world steps of one pixel of the photo that a point came from).
// Points nearer than `near` are not drawn; within `tolerance` (relative) behind the nearest depth, patches are one surface.
// image [H, W, 3]; coverage [H, W], 0 or 1; depth [H, W], 0 where nothing is.
S2D_EXPORT int s2d_splat(const s2d::ViewData* camera, int64_t num_points, const float* points, const float* rgbs,
                         const float* confidence, const float* steps, float near, float tolerance, int32_t num_threads,
                         float* image, uint8_t* coverage, float* depth) {
  return s2d::guarded([&] {
    const View view(*camera);
    std::vector<Splat> splats(static_cast<size_t>(num_points));
    constexpr int64_t kChunk = 4096;
    s2d::parallel_for((num_points + kChunk - 1) / kChunk, num_threads, [&](int64_t chunk) {
      for (int64_t i = chunk * kChunk; i < std::min(num_points, (chunk + 1) * kChunk); ++i)
        splats[i] = make_splat(view, points + 3 * i, steps + 6 * i, confidence[i], near);
    });

    const int num_bands = (view.height + kBand - 1) / kBand;
    std::vector<std::vector<int64_t>> members(num_bands);
    for (int64_t i = 0; i < num_points; ++i) {
      const Splat& s = splats[i];
      if (!(s.weight > 0.0f)) continue;
      const int low = std::max(0, static_cast<int>(std::floor((s.v - s.radius_y) / kBand)));
      const int high = std::min(num_bands - 1, static_cast<int>(std::floor((s.v + s.radius_y) / kBand)));
      for (int k = low; k <= high; ++k) members[k].push_back(i);
    }

    const float infinity = std::numeric_limits<float>::infinity();
    const size_t num_pixels = static_cast<size_t>(view.width) * view.height;
    std::vector<float> front(num_pixels, infinity), hidden_from(num_pixels, infinity);
    auto band_of = [&](int64_t task) {
      const int first = static_cast<int>(task) * kBand;
      return Band{first, std::min(view.height, first + kBand), view.width};
    };
    s2d::parallel_for(num_bands, num_threads, [&](int64_t task) {
      for (int64_t i : members[task]) {
        const Splat& s = splats[i];
        band_of(task).for_each_pixel(s, [&](size_t p, float distance2, float z) {
          hidden_from[p] = std::min(hidden_from[p], z + s.thickness);
          if (distance2 <= kReach * kReach) front[p] = std::min(front[p], z);
        });
      }
    });
    Picture picture{view.width, view.height, image, coverage, depth};
    std::fill(coverage, coverage + num_pixels, static_cast<uint8_t>(0));
    s2d::parallel_for(num_bands, num_threads, [&](int64_t task) {
      blend(splats, members[task], band_of(task), front, hidden_from, tolerance, rgbs, picture);
    });
    close_gaps(&picture);
    // What is left is beside a silhouette, not inside a surface: there the larger hiding patches hid too much.
    std::fill(hidden_from.begin(), hidden_from.end(), infinity);
    s2d::parallel_for(num_bands, num_threads, [&](int64_t task) {
      blend(splats, members[task], band_of(task), front, hidden_from, tolerance, rgbs, picture);
    });
  });
}
