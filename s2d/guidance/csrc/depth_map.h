// The depth map of one view, and how a point of one view meets the depth of another.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "view.h"

namespace s2d {

struct DepthMap {
  View view;
  const float* planes;
  const float* rgb;
  const float* confidence;

  explicit DepthMap(const ViewData& data) : view(data), planes(data.planes), rgb(data.rgb), confidence(data.confidence) {}

  size_t index(int x, int y) const { return static_cast<size_t>(y) * view.width + x; }

  // Depth at a position, on the plane of the pixel it falls into; 0 = none.
  double depth(double u, double v) const {
    const int x = static_cast<int>(u), y = static_cast<int>(v);
    const float* p = planes + 3 * index(x, y);
    if (!(p[0] > 0.0f)) return 0.0;
    const double w = p[0] + p[1] * (u - x - 0.5) + p[2] * (v - y - 0.5);
    return w > 1e-12 ? 1.0 / w : 0.0;
  }

  // Bilinear colour: the pixels of two photos do not line up.
  void colour(double u, double v, double* c) const {
    const double x = std::min(std::max(u - 0.5, 0.0), view.width - 1.0), y = std::min(std::max(v - 0.5, 0.0), view.height - 1.0);
    const int x0 = static_cast<int>(x), y0 = static_cast<int>(y);
    const int x1 = std::min(x0 + 1, view.width - 1), y1 = std::min(y0 + 1, view.height - 1);
    const double fx = x - x0, fy = y - y0;
    for (int k = 0; k < 3; ++k) {
      const double top = rgb[3 * index(x0, y0) + k] * (1 - fx) + rgb[3 * index(x1, y0) + k] * fx;
      const double bottom = rgb[3 * index(x0, y1) + k] * (1 - fx) + rgb[3 * index(x1, y1) + k] * fx;
      c[k] = top * (1 - fy) + bottom * fy;
    }
  }
};

struct Tolerance {
  double pixels;    // of the round trip
  double relative;  // of the depth
};

enum class Verdict { kUnknown, kAgrees, kHidden, kSeenThrough };

struct Meeting {
  Verdict verdict = Verdict::kUnknown;
  double u = 0, v = 0;     // where the point falls in the other view
  double depth = 0;        // the depth found there
  double difference = 0;   // of the point's depth to it, relative
};

inline Meeting meet(const View& from, double x, double y, const double* X, const DepthMap& other, const Tolerance& tolerance) {
  Meeting m;
  const double z = other.view.project(X, &m.u, &m.v);
  if (!(z > 0.0) || !other.view.inside(m.u, m.v)) return m;
  m.depth = other.depth(m.u, m.v);
  if (!(m.depth > 0.0)) return m;
  double Y[3], u = 0, v = 0;
  other.view.unproject(m.u, m.v, m.depth, Y);
  const double error = from.project(Y, &u, &v) > 0.0 ? std::sqrt((u - x) * (u - x) + (v - y) * (v - y)) : 1e9;  // of the round trip, pixels
  const double relative = (z - m.depth) / m.depth;
  m.difference = std::fabs(relative);
  if (error < tolerance.pixels && m.difference < tolerance.relative) {
    m.verdict = Verdict::kAgrees;
  } else if (relative > 0.0) {
    m.verdict = Verdict::kHidden;
  } else if (error > 2.0 * tolerance.pixels && relative < -2.0 * tolerance.relative) {
    m.verdict = Verdict::kSeenThrough;  // clearly in front of it, not a matter of tolerance
  }
  return m;
}

inline double cosine_between(const double* X, const View& a, const View& b) {
  double dot = 0, aa = 0, bb = 0;
  for (int k = 0; k < 3; ++k) {
    const double ra = X[k] - a.centre[k], rb = X[k] - b.centre[k];
    dot += ra * rb, aa += ra * ra, bb += rb * rb;
  }
  return std::min(1.0, dot / std::sqrt(aa * bb));
}

}  // namespace s2d
