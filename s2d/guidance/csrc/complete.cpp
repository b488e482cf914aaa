// Continues surfaces into plain areas, where matching has nothing to hold on to.
//
// A pixel without a depth looks in eight directions for the nearest pixels with one. Where several of them have its colour and lie on
// one plane that reaches it, it takes that plane, provided that no other view contradicts: one that sees the new point must show
// its colour there, and none may look through it.

#include <algorithm>
#include <cmath>
#include <vector>

#include "abi.h"
#include "depth_map.h"
#include "parallel.h"

namespace {

using s2d::DepthMap;
using s2d::Verdict;
using s2d::ViewData;

constexpr int kDirections[8][2] = {{1, 0}, {1, 1}, {0, 1}, {-1, 1}, {-1, 0}, {-1, -1}, {0, -1}, {1, -1}};
constexpr int kMinSupport = 3;  // directions that offer the same plane

struct Offer {
  float w, gx, gy;
};

double colour_difference(const float* a, const double* gain, const double* b) {
  double total = 0;
  for (int k = 0; k < 3; ++k) total += std::fabs(a[k] - gain[k] * b[k]);
  return total / 3.0;
}

}  // namespace

// out [H, W, 3]: planes of view `index` with what could be continued; `gains` [V, 3] as in s2d_check_consistency. `reach` in pixels.
S2D_EXPORT int s2d_complete(const ViewData* views, int32_t num_views, int32_t index, int32_t reach, double own_colour,
                            double other_colour, double max_pixels, double max_relative, const double* gains, int32_t num_threads,
                            float* out) {
  return s2d::guarded([&] {
    const std::vector<DepthMap> maps(views, views + num_views);
    const DepthMap& map = maps[index];
    const int width = map.view.width, height = map.view.height;
    std::copy(map.planes, map.planes + 3 * static_cast<size_t>(width) * height, out);
    s2d::parallel_for(height, num_threads, [&](int64_t line) {
      const int y = static_cast<int>(line);
      for (int x = 0; x < width; ++x) {
        const size_t p = map.index(x, y);
        if (map.planes[3 * p] > 0.0f) continue;
        const float* colour = map.rgb + 3 * p;
        Offer offers[8];
        int num_offers = 0;
        for (const auto& direction : kDirections) {
          for (int step = 1; step <= reach; ++step) {
            const int u = x + step * direction[0], v = y + step * direction[1];
            if (u < 0 || v < 0 || u >= width || v >= height) break;
            const size_t q = map.index(u, v);
            double difference = 0;
            for (int k = 0; k < 3; ++k) difference += std::fabs(colour[k] - map.rgb[3 * q + k]) / 3.0;
            if (difference > own_colour) break;  // an edge: what is beyond it is another surface
            const float* plane = map.planes + 3 * q;
            if (!(plane[0] > 0.0f)) continue;
            const float w = plane[0] + plane[1] * static_cast<float>(x - u) + plane[2] * static_cast<float>(y - v);
            if (w > 0.0f) offers[num_offers++] = {w, plane[1], plane[2]};
            break;
          }
        }
        int best = -1, best_support = kMinSupport - 1;
        for (int a = 0; a < num_offers; ++a) {
          int support = 0;
          for (int b = 0; b < num_offers; ++b) support += std::fabs(offers[a].w - offers[b].w) < max_relative * offers[a].w;
          if (support > best_support) best = a, best_support = support;
        }
        if (best < 0) continue;
        const double px = x + 0.5, py = y + 0.5;
        double X[3];
        map.view.unproject(px, py, 1.0 / offers[best].w, X);
        bool confirmed = false, contradicted = false;
        for (int j = 0; j < num_views && !contradicted; ++j) {
          if (j == index) continue;
          double u = 0, v = 0, c[3];
          if (!(maps[j].view.project(X, &u, &v) > 0.0) || !maps[j].view.inside(u, v)) continue;
          const s2d::Meeting m = s2d::meet(map.view, px, py, X, maps[j], {max_pixels, max_relative});
          if (m.verdict == Verdict::kHidden) continue;
          contradicted = m.verdict == Verdict::kSeenThrough;
          maps[j].colour(u, v, c);
          confirmed |= colour_difference(colour, gains + 3 * j, c) < other_colour;
        }
        if (!confirmed || contradicted) continue;
        out[3 * p] = offers[best].w;
        out[3 * p + 1] = offers[best].gx;
        out[3 * p + 2] = offers[best].gy;
      }
    });
  });
}
