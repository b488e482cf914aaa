// SPDX-License-Identifier: Apache-2.0
// Exact k nearest neighbours inside one cloud of 3D points.
//
// A balanced k-d tree with tight boxes: point clouds from photos are dense on surfaces and have far outliers, which
// defeats a uniform grid. Points are reordered leaf by leaf, so that a leaf is a few consecutive floats and neighbouring
// queries walk the same nodes. The tree does not depend on the number of threads, and neither does any result.

#include <algorithm>
#include <cfloat>
#include <cstdint>
#include <limits>
#include <vector>

#include "abi.h"
#include "parallel.h"

namespace {

constexpr int kLeafSize = 16;  // one or two SIMD registers of distances; smaller leaves only add box tests

struct Point {
  float xyz[3];
  int32_t id;
};

struct Box {
  float lo[3], hi[3];
};

// Squared distances stay finite (coordinates near the float limit would make them inf, which the search takes for "none").
inline float finite(float d2) { return d2 < FLT_MAX ? d2 : FLT_MAX; }

inline float distance2_to_box(const Box& box, const float* q) {
  float d2 = 0.f;
  for (int a = 0; a < 3; ++a) {
    const float d = std::max(std::max(box.lo[a] - q[a], q[a] - box.hi[a]), 0.f);
    d2 += d * d;
  }
  return finite(d2);
}

// Node i has children 2i and 2i + 1; the root is 1; nodes [num_leaves, 2 num_leaves) are the leaves, from left to right.
struct Tree {
  int num_leaves = 1;
  std::vector<Box> boxes;           // [2 num_leaves]
  std::vector<int32_t> leaf_start;  // [num_leaves + 1]
  std::vector<Point> points;        // [N] in leaf order

  void build(const float* xyz, int n, int num_threads) {
    points.resize(n);
    for (int i = 0; i < n; ++i) points[i] = {{xyz[3 * i], xyz[3 * i + 1], xyz[3 * i + 2]}, i};
    while (int64_t{num_leaves} * kLeafSize < n) num_leaves *= 2;
    boxes.resize(2 * num_leaves);
    leaf_start.resize(num_leaves + 1);
    leaf_start[num_leaves] = n;

    // The top of the tree level by level until there are enough subtrees to share out.
    std::vector<int32_t> bounds = {0, n};  // of the nodes of the current level
    int level_size = 1;
    for (; level_size < num_leaves && level_size < 8 * num_threads; level_size *= 2) {
      std::vector<int32_t> finer(2 * level_size + 1);
      s2d::parallel_for(level_size, num_threads, [&](int64_t i) {
        finer[2 * i] = bounds[i];
        finer[2 * i + 1] = split(level_size + int(i), bounds[i], bounds[i + 1]);
      });
      finer[2 * level_size] = n;
      bounds = std::move(finer);
    }
    s2d::parallel_for(level_size, num_threads, [&](int64_t i) {
      build_subtree(level_size + int(i), bounds[i], bounds[i + 1]);
    });
  }

 private:
  int32_t split(int node, int32_t begin, int32_t end) {
    Box& box = boxes[node];
    for (int a = 0; a < 3; ++a) box.lo[a] = FLT_MAX, box.hi[a] = -FLT_MAX;
    for (int32_t i = begin; i < end; ++i) {
      for (int a = 0; a < 3; ++a) {
        box.lo[a] = std::min(box.lo[a], points[i].xyz[a]);
        box.hi[a] = std::max(box.hi[a], points[i].xyz[a]);
      }
    }
    const int32_t middle = begin + (end - begin) / 2;
    if (node < num_leaves) {
      int axis = 0;
      for (int a = 1; a < 3; ++a) {
        if (box.hi[a] - box.lo[a] > box.hi[axis] - box.lo[axis]) axis = a;
      }
      std::nth_element(points.begin() + begin, points.begin() + middle, points.begin() + end,
                       [axis](const Point& a, const Point& b) { return a.xyz[axis] < b.xyz[axis]; });
    }
    return middle;
  }

  void build_subtree(int node, int32_t begin, int32_t end) {
    const int32_t middle = split(node, begin, end);
    if (node >= num_leaves) {
      leaf_start[node - num_leaves] = begin;
      return;
    }
    build_subtree(2 * node, begin, middle);
    build_subtree(2 * node + 1, middle, end);
  }
};

// The k best so far, nearest first.
struct Best {
  int k;
  float* d2;      // [k]
  int32_t* ids;   // [k]

  float worst() const { return d2[k - 1]; }

  void insert(float value, int32_t id) {
    int at = k - 1;
    for (; at > 0 && d2[at - 1] > value; --at) {
      d2[at] = d2[at - 1];
      ids[at] = ids[at - 1];
    }
    d2[at] = value;
    ids[at] = id;
  }
};

void search(const Tree& tree, const float* xs, const float* ys, const float* zs, int32_t self, Best best) {
  const float q[3] = {xs[self], ys[self], zs[self]};
  struct Entry {
    int node;
    float d2;
  };
  Entry stack[64];  // one pending sibling per level; 2^31 points have 28 levels
  int depth = 0;
  stack[depth++] = {1, 0.f};
  while (depth > 0) {
    const Entry entry = stack[--depth];
    // ">=": a box that can only tie is skipped, else many equal points would make every query visit all of them.
    if (entry.d2 >= best.worst()) continue;
    int node = entry.node;
    bool reachable = true;
    while (node < tree.num_leaves) {
      const float left = distance2_to_box(tree.boxes[2 * node], q);
      const float right = distance2_to_box(tree.boxes[2 * node + 1], q);
      const bool left_first = left <= right;
      const float far = left_first ? right : left;
      if (far < best.worst()) stack[depth++] = {2 * node + (left_first ? 1 : 0), far};
      if ((left_first ? left : right) >= best.worst()) {
        reachable = false;
        break;
      }
      node = 2 * node + (left_first ? 0 : 1);
    }
    if (!reachable) continue;
    const int32_t begin = tree.leaf_start[node - tree.num_leaves];
    const int32_t count = tree.leaf_start[node - tree.num_leaves + 1] - begin;
    float d2[kLeafSize];
    for (int32_t i = 0; i < count; ++i) {
      const float dx = xs[begin + i] - q[0], dy = ys[begin + i] - q[1], dz = zs[begin + i] - q[2];
      d2[i] = finite(dx * dx + dy * dy + dz * dz);
    }
    for (int32_t i = 0; i < count; ++i) {
      if (d2[i] < best.worst() && begin + i != self) best.insert(d2[i], tree.points[begin + i].id);
    }
  }
}

}  // namespace

// xyz [n, 3] finite -> ids [n, k], d2 [n, k], nearest first, the point itself excluded. 1 <= k <= n - 1.
// Returns 0, or 1 when memory runs out.
S2D_EXPORT int s2d_knn(const float* xyz, int32_t n, int32_t k, int32_t num_threads, int32_t* ids, float* d2) {
  return s2d::guarded([&] {
    Tree tree;
    tree.build(xyz, n, num_threads);
    std::vector<float> xs(n), ys(n), zs(n);
    for (int32_t i = 0; i < n; ++i) {
      xs[i] = tree.points[i].xyz[0];
      ys[i] = tree.points[i].xyz[1];
      zs[i] = tree.points[i].xyz[2];
    }
    constexpr int32_t kChunk = 1024;
    s2d::parallel_for((n + kChunk - 1) / kChunk, num_threads, [&](int64_t chunk) {
      const int32_t begin = int32_t(chunk) * kChunk, end = std::min(n, begin + kChunk);
      for (int32_t i = begin; i < end; ++i) {
        const int64_t row = int64_t{tree.points[i].id} * k;
        std::fill(d2 + row, d2 + row + k, std::numeric_limits<float>::infinity());
        search(tree, xs.data(), ys.data(), zs.data(), i, {k, d2 + row, ids + row});
      }
    });
  });
}
