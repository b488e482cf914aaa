// What survives of the depth maps of all views, and how they become one cloud.
//
// A point of one view is carried into another and meets the depth there. The two agree where the way back ends near where it
// began; else the point is hidden behind that surface, or the other view looks through it.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "abi.h"
#include "depth_map.h"
#include "parallel.h"

namespace {

using s2d::DepthMap;
using s2d::Meeting;
using s2d::Verdict;
using s2d::View;
using s2d::ViewData;

// The surface patch under a pixel: world steps of one pixel to the right and down, and the normal that faces the camera.
void surface_patch(const View& view, const float* plane, double px, double py, float* steps, float* normal) {
  // d(ray / w) = d(ray) / w - ray dw / w²
  const double w = plane[0], r[3] = {(px - view.cx) / view.fx, (py - view.cy) / view.fy, 1.0};
  double right[3], down[3], R[3], D[3];
  for (int k = 0; k < 3; ++k) {
    right[k] = -r[k] * plane[1] / (w * w);
    down[k] = -r[k] * plane[2] / (w * w);
  }
  right[0] += 1.0 / (view.fx * w);
  down[1] += 1.0 / (view.fy * w);
  view.to_world(right, R);
  view.to_world(down, D);
  const double n[3] = {D[1] * R[2] - D[2] * R[1], D[2] * R[0] - D[0] * R[2], D[0] * R[1] - D[1] * R[0]};
  const double length = std::sqrt(n[0] * n[0] + n[1] * n[1] + n[2] * n[2]);
  for (int k = 0; k < 3; ++k) {
    steps[k] = static_cast<float>(R[k]);
    steps[3 + k] = static_cast<float>(D[k]);
    normal[k] = static_cast<float>(length > 0.0 ? n[k] / length : 0.0);
  }
}

}  // namespace

// For each pixel of view `index`: how many views agree, how many look through it, the largest triangulation angle (radians) over
// those that agree, the smallest mean difference of colour to one of them, its colours multiplied by gains [V, 3], and the mean relative
// difference of depth to them. All [H, W].
// sums [V, 2, 3] receives the total colour of the pixels that agree with each view, here and there.
S2D_EXPORT int s2d_check_consistency(const ViewData* views, int32_t num_views, int32_t index, double max_pixels, double max_relative,
                                     const double* gains, int32_t num_threads, uint8_t* agree, uint8_t* through, float* angle,
                                     float* colour_error, float* depth_difference, double* sums) {
  return s2d::guarded([&] {
    const std::vector<DepthMap> maps(views, views + num_views);
    const DepthMap& map = maps[index];
    // One row of sums per line of the picture: added up in order, they are the same bits at any number of threads.
    std::vector<double> line_sums(static_cast<size_t>(map.view.height) * num_views * 6, 0.0);
    s2d::parallel_for(map.view.height, num_threads, [&](int64_t y) {
      for (int x = 0; x < map.view.width; ++x) {
        const size_t p = map.index(x, static_cast<int>(y));
        const double px = x + 0.5, py = static_cast<double>(y) + 0.5, z = map.depth(px, py);
        int num_agree = 0, num_through = 0;
        double widest = 1.0, closest = 1.0, differences = 0.0, X[3];  // widest: the cosine of the widest angle
        if (z > 0.0) {
          map.view.unproject(px, py, z, X);
          for (int j = 0; j < num_views; ++j) {
            if (j == index) continue;
            const Meeting m = meet(map.view, px, py, X, maps[j], {max_pixels, max_relative});
            num_through += m.verdict == Verdict::kSeenThrough;
            if (m.verdict != Verdict::kAgrees) continue;
            ++num_agree;
            differences += m.difference;
            widest = std::min(widest, cosine_between(X, map.view, maps[j].view));
            double c[3], difference = 0;
            maps[j].colour(m.u, m.v, c);
            double* sum = line_sums.data() + (static_cast<size_t>(y) * num_views + j) * 6;
            for (int k = 0; k < 3; ++k) {
              sum[k] += map.rgb[3 * p + k];
              sum[3 + k] += c[k];
              difference += std::fabs(map.rgb[3 * p + k] - gains[3 * j + k] * c[k]) / 3.0;
            }
            closest = std::min(closest, difference);
          }
        }
        agree[p] = static_cast<uint8_t>(std::min(num_agree, 255));
        through[p] = static_cast<uint8_t>(std::min(num_through, 255));
        angle[p] = static_cast<float>(std::acos(widest));
        colour_error[p] = static_cast<float>(closest);
        depth_difference[p] = static_cast<float>(num_agree > 0 ? differences / num_agree : 1.0);
      }
    });
    std::fill(sums, sums + 6 * num_views, 0.0);
    for (size_t k = 0; k < line_sums.size(); ++k) sums[k % (6 * num_views)] += line_sums[k];
  });
}

// One cloud from all depth maps. A point stands for the finest pixel that sees its surface; agreeing pixels of other views lend
// it their position and colour and are used up. Arrays hold `capacity` points; *num_points receives how many there are.
S2D_EXPORT int s2d_fuse(const ViewData* views, int32_t num_views, double max_pixels, double max_relative, int64_t capacity,
                        float* points, float* rgbs, float* confidence, float* normals, float* steps, int64_t* num_points) {
  return s2d::guarded([&] {
    constexpr double kFiner = 0.75;  // of the pixel's size on the surface: then the other view stands for the point
    const std::vector<DepthMap> maps(views, views + num_views);
    std::vector<std::vector<uint8_t>> used;
    for (const DepthMap& map : maps) used.emplace_back(static_cast<size_t>(map.view.width) * map.view.height, 0);
    struct Partner {
      int view;
      size_t pixel;
      double weight, u, v, depth;
    };
    std::vector<Partner> partners;
    int64_t count = 0;
    for (int i = 0; i < num_views; ++i) {
      const DepthMap& map = maps[i];
      for (int y = 0; y < map.view.height; ++y) {
        for (int x = 0; x < map.view.width; ++x) {
          const size_t p = map.index(x, y);
          const double px = x + 0.5, py = y + 0.5, z = map.depth(px, py);
          if (!(z > 0.0) || used[i][p] || count == capacity) continue;
          double X[3];
          map.view.unproject(px, py, z, X);
          const double size = z / map.view.fx;
          partners.clear();
          bool finer_elsewhere = false;
          for (int j = 0; j < num_views && !finer_elsewhere; ++j) {
            if (j == i) continue;
            const Meeting m = meet(map.view, px, py, X, maps[j], {max_pixels, max_relative});
            if (m.verdict != Verdict::kAgrees) continue;
            const size_t q = maps[j].index(static_cast<int>(m.u), static_cast<int>(m.v));
            const double ratio = size / (m.depth / maps[j].view.fx);
            finer_elsewhere = ratio > 1.0 / kFiner;
            // A photo that shows the surface coarser is blurred here, and counts less.
            partners.push_back({j, q, maps[j].confidence[q] * std::min(1.0, ratio * ratio), m.u, m.v, m.depth});
          }
          if (finer_elsewhere) continue;
          double weight = map.confidence[p], position[3], colour[3];
          for (int k = 0; k < 3; ++k) {
            position[k] = weight * X[k];
            colour[k] = weight * map.rgb[3 * p + k];
          }
          double best = map.confidence[p];
          used[i][p] = 1;
          for (const Partner& partner : partners) {
            const DepthMap& other = maps[partner.view];
            double Y[3], c[3];
            other.view.unproject(partner.u, partner.v, partner.depth, Y);
            other.colour(partner.u, partner.v, c);
            for (int k = 0; k < 3; ++k) {
              position[k] += partner.weight * Y[k];
              colour[k] += partner.weight * c[k];
            }
            weight += partner.weight;
            best = std::max(best, static_cast<double>(other.confidence[partner.pixel]));
            used[partner.view][partner.pixel] = 1;
          }
          for (int k = 0; k < 3; ++k) {
            points[3 * count + k] = static_cast<float>(position[k] / weight);
            rgbs[3 * count + k] = static_cast<float>(colour[k] / weight);
          }
          confidence[count] = static_cast<float>(best);
          surface_patch(map.view, map.planes + 3 * p, px, py, steps + 6 * count, normals + 3 * count);
          ++count;
        }
      }
    }
    *num_points = count;
  });
}
