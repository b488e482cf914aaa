// Planes that agree with their surroundings: each pixel takes the one, its own or a neighbour's, whose inverse depth here is the
// weighted median of them all. A median keeps steps, and chooses planes without mixing them.

#include <algorithm>
#include <cmath>

#include "abi.h"
#include "parallel.h"
#include "view.h"

namespace {

constexpr int kMost = 81;  // candidates

struct Candidate {
  float w, weight;
  const float* plane;
};

}  // namespace

// out [H, W, 3]: the planes of `view` (with rgb) smoothed; pixels without one stay so and have no say. Neighbours at every `spacing`
// pixels up to `reach` are asked; their weight falls with the distance, and with the difference of colour over `colour_sigma`.
S2D_EXPORT int s2d_smooth(const s2d::ViewData* view, int32_t reach, int32_t spacing, float colour_sigma, int32_t num_threads, float* out) {
  return s2d::guarded([&] {
    const int width = view->width, height = view->height;
    s2d::parallel_for(height, num_threads, [&](int64_t line) {
      const int y = static_cast<int>(line);
      for (int x = 0; x < width; ++x) {
        const size_t p = 3 * (static_cast<size_t>(y) * width + x);
        std::copy(view->planes + p, view->planes + p + 3, out + p);
        if (!(view->planes[p] > 0.0f)) continue;
        Candidate sorted[kMost];
        int count = 0;
        float total = 0.0f;
        for (int dy = -reach; dy <= reach; dy += spacing) {
          for (int dx = -reach; dx <= reach; dx += spacing) {
            const int u = x + dx, v = y + dy;
            if (u < 0 || v < 0 || u >= width || v >= height || count == kMost) continue;
            const size_t q = 3 * (static_cast<size_t>(v) * width + u);
            const float* plane = view->planes + q;
            const float w = plane[0] - plane[1] * static_cast<float>(dx) - plane[2] * static_cast<float>(dy);
            if (!(plane[0] > 0.0f && w > 0.0f)) continue;
            float difference = 0.0f;
            for (int k = 0; k < 3; ++k) difference += std::fabs(view->rgb[q + k] - view->rgb[p + k]);
            difference /= 3.0f * colour_sigma;
            const float bell = 1.0f / (1.0f + difference * difference);  // squared: as in match.h, without an exponential
            const float weight = std::exp(-static_cast<float>(dx * dx + dy * dy) / (2.0f * static_cast<float>(reach * reach))) * bell * bell;
            int place = count++;
            for (; place > 0 && sorted[place - 1].w > w; --place) sorted[place] = sorted[place - 1];
            sorted[place] = {w, weight, plane};
            total += weight;
          }
        }
        float below = 0.0f;
        int chosen = 0;
        for (; chosen < count - 1; ++chosen) {
          below += sorted[chosen].weight;
          if (below >= 0.5f * total) break;
        }
        out[p] = sorted[chosen].w;
        out[p + 1] = sorted[chosen].plane[1];
        out[p + 2] = sorted[chosen].plane[2];
      }
    });
  });
}
