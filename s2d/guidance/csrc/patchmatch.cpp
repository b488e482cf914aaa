// PatchMatch stereo: a slanted plane per pixel of one reference photo, from several source photos with known cameras.
//
// Planes spread along a red-black grid: a half pass changes pixels of one colour and reads the other, so the result does not
// depend on the number of threads. Which sources count is decided per pixel from how they like the planes of its surroundings.
// After Zheng et al. 2014 (view selection), Xu and Tao 2019 (asymmetric checkerboard, geometric term).

#include <vector>

#include "abi.h"
#include "match.h"
#include "parallel.h"

namespace {

using s2d::Patch;
using s2d::Plane;
using s2d::Random;

constexpr int kMaxSources = 8;
constexpr int kRegions = 8;  // four near, four far: the best plane of each is tried

struct Problem {
  int width, height;
  const float* grey;
  s2d::PatchShape wide, narrow;
  float fine_variance;  // of grey in the narrow patch: more, and it is taken
  s2d::PlaneSpace space;
  std::vector<s2d::Source> sources;
  float geometric_weight;
  uint64_t seed;
  Plane* planes;
  float* costs;
  float* view_weights;  // [H, W, S]

  int num_sources() const { return static_cast<int>(sources.size()); }

  // A small patch does not reach over an edge, but needs something to hold on to.
  Patch patch(int x, int y) const {
    if (std::isfinite(fine_variance)) {
      const Patch small(narrow, grey, width, height, x, y);
      if (small.variance > fine_variance) return small;
    }
    return Patch(wide, grey, width, height, x, y);
  }

  float source_cost(const Patch& patch, int s, float px, float py, const Plane& plane) const {
    float cost = s2d::match_cost(patch, sources[s], px, py, plane);
    if (geometric_weight > 0.0f && cost < s2d::kWorstCost) cost += geometric_weight * s2d::round_trip(sources[s], px, py, plane.w);
    return cost;
  }
};

float weighted_mean(const float* costs, const float* weights, int n) {
  float total = 0, sum_weights = 0;
  for (int s = 0; s < n; ++s) {
    total += weights[s] * costs[s];
    sum_weights += weights[s];
  }
  return sum_weights > 0 ? total / sum_weights : s2d::kWorstCost;
}

// A first guess stands on the two sources that like it best: nothing is known of its surroundings yet.
void weights_of_best(const float* costs, int n, float* weights) {
  int first = 0, second = -1;
  for (int s = 1; s < n; ++s) {
    if (costs[s] < costs[first]) {
      second = first;
      first = s;
    } else if (second < 0 || costs[s] < costs[second]) {
      second = s;
    }
  }
  std::fill(weights, weights + n, 0.0f);
  weights[first] = 1.0f;
  if (second >= 0 && costs[second] < 1.0f) weights[second] = 0.5f;
}

void initialise_pixel(Problem& P, int x, int y, int num_random) {
  const size_t i = static_cast<size_t>(y) * P.width + x;
  const float px = static_cast<float>(x) + 0.5f, py = static_cast<float>(y) + 0.5f;
  const Patch patch = P.patch(x, y);
  const int n = P.num_sources();
  Random random(P.seed, i, 0);
  Plane best{};
  float best_cost = 1e9f;
  float costs[kMaxSources], weights[kMaxSources];
  for (int h = 0; h <= num_random; ++h) {
    const Plane given = P.planes[i];
    const Plane plane = h == 0 && P.space.usable(px, py, given) ? given : P.space.draw(px, py, random);
    for (int s = 0; s < n; ++s) costs[s] = P.source_cost(patch, s, px, py, plane);
    weights_of_best(costs, n, weights);
    const float cost = weighted_mean(costs, weights, n);
    if (cost < best_cost) {
      best_cost = cost;
      best = plane;
      std::copy(weights, weights + n, P.view_weights + i * n);
    }
  }
  P.planes[i] = best;
  P.costs[i] = best_cost;
}

// Where planes are fetched from, by offset; x + y is odd, so all are of the other colour.
struct Region {
  int n = 0, dx[11], dy[11];
  void add(int x, int y) { dx[n] = x, dy[n++] = y; }
};

struct Regions {
  Region region[kRegions];
  Regions() {
    const int direction[4][2] = {{0, -1}, {0, 1}, {-1, 0}, {1, 0}};
    for (int d = 0; d < 4; ++d) {
      const int x = direction[d][0], y = direction[d][1];
      Region& near = region[d];
      near.add(x, y);
      for (int k = 1; k <= 3; ++k)
        for (int side = -k; side <= k; side += 2 * k) near.add((k + 1) * x + side * y, (k + 1) * y + side * x);
      for (int k = 0; k < 11; ++k) region[4 + d].add((3 + 2 * k) * x, (3 + 2 * k) * y);
    }
  }
};

// A source counts where it matches several of the surrounding planes well and contradicts few.
void select_views(const float (*costs)[kMaxSources], int num_planes, int n, int pass, const float* previous, float* weights) {
  const float good_limit = 0.8f * std::exp(-static_cast<float>(pass * pass) / 90.0f);
  constexpr float kBadLimit = 1.2f, kSigma = 0.3f;
  float total = 0;
  for (int s = 0; s < n; ++s) {
    int good = 0, bad = 0;
    float support = 0;
    for (int h = 0; h < num_planes; ++h) {
      const float c = costs[h][s];
      if (c < good_limit) {
        ++good;
        support += std::exp(-c * c / (2.0f * kSigma * kSigma));
      }
      if (c > kBadLimit) ++bad;
    }
    weights[s] = good > 2 && bad < 3 ? support / static_cast<float>(good) : 0.3f * support / static_cast<float>(num_planes);
    if (previous[s] > 0.5f) weights[s] *= 1.3f;  // what saw the pixel before probably still does
    total += weights[s];
  }
  if (!(total > 0.0f)) std::copy(previous, previous + n, weights);
}

void update_pixel(Problem& P, const Regions& regions, int x, int y, int pass, float shrink) {
  const size_t i = static_cast<size_t>(y) * P.width + x;
  const int n = P.num_sources();
  const float px = static_cast<float>(x) + 0.5f, py = static_cast<float>(y) + 0.5f;
  const Patch patch = P.patch(x, y);
  Plane planes[kRegions + 1];
  float costs[kRegions + 1][kMaxSources];
  int count = 0;
  auto consider = [&](const Plane& plane) {
    planes[count] = plane;
    for (int s = 0; s < n; ++s) costs[count][s] = P.source_cost(patch, s, px, py, plane);
    ++count;
  };
  consider(P.planes[i]);
  for (const Region& region : regions.region) {
    float lowest = 1e9f;
    int from_x = 0, from_y = 0;
    for (int k = 0; k < region.n; ++k) {
      const int u = x + region.dx[k], v = y + region.dy[k];
      if (u < 0 || v < 0 || u >= P.width || v >= P.height) continue;
      const float c = P.costs[static_cast<size_t>(v) * P.width + u];
      if (c < lowest) lowest = c, from_x = u, from_y = v;
    }
    if (lowest > 1e8f) continue;
    Plane plane = P.planes[static_cast<size_t>(from_y) * P.width + from_x];
    plane.w += plane.gx * static_cast<float>(x - from_x) + plane.gy * static_cast<float>(y - from_y);
    if (P.space.usable(px, py, plane)) consider(plane);
  }

  float* weights = P.view_weights + i * n;
  float chosen[kMaxSources];
  select_views(costs, count, n, pass, weights, chosen);
  std::copy(chosen, chosen + n, weights);
  Plane best = planes[0];
  float best_cost = weighted_mean(costs[0], chosen, n);
  for (int h = 1; h < count; ++h) {
    const float cost = weighted_mean(costs[h], chosen, n);
    if (cost < best_cost) best_cost = cost, best = planes[h];
  }

  // Refinement: a plane from nowhere, then perturbations that shrink from pass to pass.
  Random random(P.seed, i, static_cast<uint64_t>(pass) + 1);
  float sum_weights = 0;
  for (int s = 0; s < n; ++s) sum_weights += std::max(chosen[s], 0.0f);
  float r[3], normal[3], tilted[3];
  P.space.ray(px, py, r);
  for (int trial = 0; trial < 5; ++trial) {
    P.space.normal(px, py, best, normal);
    for (int k = 0; k < 3; ++k) tilted[k] = normal[k] + 0.6f * shrink * random.uniform(-1.0f, 1.0f);
    const float moved = best.w + 0.05f * shrink * shrink * (P.space.w_max - P.space.w_min) * random.uniform(-1.0f, 1.0f);
    const float nudged = best.w * (1.0f + 0.02f * shrink * random.uniform(-1.0f, 1.0f));
    const Plane plane = trial == 0   ? P.space.draw(px, py, random)
                        : trial == 1 ? P.space.from_normal(r, tilted, best.w)
                        : trial == 2 ? P.space.from_normal(r, normal, moved)
                        : trial == 3 ? P.space.from_normal(r, tilted, nudged)
                                     : P.space.from_normal(r, normal, nudged);
    if (!P.space.usable(px, py, plane)) continue;
    float total = 0;
    for (int s = 0; s < n && total < best_cost * sum_weights; ++s) {  // costs are not negative: the sum only grows
      if (chosen[s] > 0.0f) total += chosen[s] * P.source_cost(patch, s, px, py, plane);
    }
    if (total < best_cost * sum_weights) best_cost = total / sum_weights, best = plane;
  }
  P.planes[i] = best;
  P.costs[i] = best_cost;
}

}  // namespace

// out[y, x] = I(x, y) | I(x+1, y) << 8 | I(x, y+1) << 16 | I(x+1, y+1) << 24, 8-bit grey, the border repeated.
S2D_EXPORT int s2d_pack_quads(const float* grey, int32_t width, int32_t height, uint32_t* out) {
  return s2d::guarded([&] {
    auto level = [&](int x, int y) {
      const float value = grey[static_cast<size_t>(std::min(y, height - 1)) * width + std::min(x, width - 1)];
      return static_cast<uint32_t>(std::lround(std::min(std::max(value, 0.0f), 1.0f) * 255.0f));
    };
    for (int y = 0; y < height; ++y)
      for (int x = 0; x < width; ++x)
        out[static_cast<size_t>(y) * width + x] = level(x, y) | level(x + 1, y) << 8 | level(x, y + 1) << 16 | level(x + 1, y + 1) << 24;
  });
}

// Improves the reference's planes in place (inverse depth 0: start from random ones). costs [H, W]; view_weights [H, W, S],
// S = min(num_sources, 8). With geometric_weight > 0 the planes of the sources are read: they must not be the reference's.
S2D_EXPORT int s2d_patchmatch(const s2d::ViewData* reference, const s2d::ViewData* sources, int32_t num_sources, float w_min,
                              float w_max, float geometric_weight, int32_t num_random, int32_t num_passes, float first_shrink,
                              float fine_texture, uint64_t seed, int32_t num_threads, float* costs, float* view_weights) {
  return s2d::guarded([&] {
    const s2d::View view(*reference);
    Problem P{view.width,
              view.height,
              reference->grey,
              s2d::PatchShape(false),
              s2d::PatchShape(true),
              fine_texture * fine_texture,
              {static_cast<float>(view.fx), static_cast<float>(view.fy), static_cast<float>(view.cx), static_cast<float>(view.cy), w_min, w_max},
              {},
              geometric_weight,
              seed,
              reinterpret_cast<Plane*>(reference->planes),
              costs,
              view_weights};
    for (int s = 0; s < std::min(num_sources, kMaxSources); ++s) P.sources.emplace_back(view, sources[s]);
    const Regions regions;
    s2d::parallel_for(view.height, num_threads, [&](int64_t y) {
      for (int x = 0; x < P.width; ++x) initialise_pixel(P, x, static_cast<int>(y), num_random);
    });
    for (int pass = 0; pass < num_passes; ++pass) {
      const float shrink = first_shrink * std::pow(0.7f, static_cast<float>(pass));
      for (int colour = 0; colour < 2; ++colour) {
        s2d::parallel_for(view.height, num_threads, [&](int64_t y) {
          for (int x = static_cast<int>(y + colour) & 1; x < P.width; x += 2) update_pixel(P, regions, x, static_cast<int>(y), pass, shrink);
        });
      }
    }
  });
}
