// SPDX-License-Identifier: Apache-2.0
// Exact k nearest neighbours inside one cloud of 3D points: the search of csrc/knn.cpp over a tree that is built from a Morton order
// instead of medians.
//
// All tensors are contiguous on the device. N points (2 <= N < 2^30), 1 <= k <= N - 1, L = num_leaves = the smallest power of two with
// 16 L >= N.
//
//   torch           low, high = points.amin(0), points.amax(0)                     [3] each
//   morton_codes
//   torch           order = codes.sort().indices                                   int64 [N]
//   leaf_boxes
//   merge_boxes     once per level, with first = L / 2, L / 4, ... 1 (not at all where L = 1)
//   search
//
// morton_codes                           grid ceil(N / 256), block 256, no dynamic shared memory
//   n                int32   N
//   points           float32 [N, 3]
//   low, high        float32 [3]
//   codes            out int64 [N]
//
// leaf_boxes                             grid ceil(L / 256), block 256, no dynamic shared memory
//   n, num_leaves    int32
//   points           float32 [N, 3]
//   order            int64 [N]
//   sorted           out float32 [N, 4]: points in order, and the bits of their index
//   boxes            out float32 [2 L, 6]
//
// merge_boxes                            grid ceil(first / 256), block 256, no dynamic shared memory
//   first            int32   first node of the level, and how many it has
//   boxes            in/out float32 [2 L, 6]
//
// search                                 grid ceil(N / 128), block 128, no dynamic shared memory
//   n, num_leaves, k int32
//   sorted           float32 [N, 4]
//   boxes            float32 [2 L, 6]
//   ids              out int32 [N, k], nearest first
//   distances2       out float32 [N, k]

namespace {

constexpr int LEAF = 16;  // points
constexpr int AXIS_BITS = 21;
constexpr float LARGEST = 3.402823466e38f;  // distances stay below infinity, which means "none"

struct Box {
  float low[3], high[3];
};

__device__ __forceinline__ float finite(float d2) { return fminf(d2, LARGEST); }

__device__ __forceinline__ float distance2_to_box(const Box& box, const float4& q) {
  const float dx = fmaxf(fmaxf(box.low[0] - q.x, q.x - box.high[0]), 0.0f);
  const float dy = fmaxf(fmaxf(box.low[1] - q.y, q.y - box.high[1]), 0.0f);
  const float dz = fmaxf(fmaxf(box.low[2] - q.z, q.z - box.high[2]), 0.0f);
  return finite(dx * dx + dy * dy + dz * dz);
}

// The low 21 bits of a number, each followed by two zeros.
__device__ __forceinline__ unsigned long long spread(unsigned long long v) {
  v &= 0x1fffff;
  v = (v | v << 32) & 0x1f00000000ffffull;
  v = (v | v << 16) & 0x1f0000ff0000ffull;
  v = (v | v << 8) & 0x100f00f00f00f00full;
  v = (v | v << 4) & 0x10c30c30c30c30c3ull;
  v = (v | v << 2) & 0x1249249249249249ull;
  return v;
}

__device__ __forceinline__ unsigned long long cell(float value, float low, float high) {
  // Halves: the range of finite numbers may not be one. A range of zero has one cell.
  const float range = 0.5f * high - 0.5f * low, share = range > 0.0f ? (0.5f * value - 0.5f * low) / range : 0.0f;
  return static_cast<unsigned long long>(fminf(fmaxf(share, 0.0f), 1.0f) * ((1 << AXIS_BITS) - 1));
}

// The k best so far, nearest first.
struct Best {
  int k;
  float* d2;
  int* ids;

  __device__ __forceinline__ float worst() const { return d2[k - 1]; }
  __device__ __forceinline__ void insert(float value, int id) const {
    int at = k - 1;
    for (; at > 0 && d2[at - 1] > value; --at) {
      d2[at] = d2[at - 1];
      ids[at] = ids[at - 1];
    }
    d2[at] = value;
    ids[at] = id;
  }
};

__device__ __forceinline__ void visit_leaf(int leaf, int n, const float4* __restrict__ sorted, int self, const float4& q, const Best& best) {
  const int begin = leaf * LEAF, end = min(n, begin + LEAF);
  for (int i = begin; i < end; ++i) {
    const float4 p = sorted[i];
    const float dx = p.x - q.x, dy = p.y - q.y, dz = p.z - q.z;
    const float d2 = finite(dx * dx + dy * dy + dz * dz);
    if (d2 < best.worst() && i != self) best.insert(d2, __float_as_int(p.w));
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256) morton_codes(int n, const float* __restrict__ points,
                                                               const float* __restrict__ low, const float* __restrict__ high,
                                                               long long* __restrict__ codes) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  unsigned long long code = 0;
#pragma unroll
  for (int axis = 0; axis < 3; ++axis) code |= spread(cell(points[3ll * i + axis], low[axis], high[axis])) << axis;
  codes[i] = static_cast<long long>(code);
}

extern "C" __global__ void __launch_bounds__(256) leaf_boxes(int n, int num_leaves, const float* __restrict__ points,
                                                             const long long* __restrict__ order, float* __restrict__ sorted,
                                                             float* __restrict__ boxes) {
  const int leaf = blockIdx.x * blockDim.x + threadIdx.x;
  if (leaf >= num_leaves) return;
  // Of a leaf without points, at the end: nothing is near it.
  Box box = {{LARGEST, LARGEST, LARGEST}, {-LARGEST, -LARGEST, -LARGEST}};
  const long long begin = static_cast<long long>(leaf) * LEAF, end = min(static_cast<long long>(n), begin + LEAF);
  for (long long i = begin; i < end; ++i) {
    const long long from = order[i];
    const float p[3] = {points[3 * from], points[3 * from + 1], points[3 * from + 2]};
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) {
      box.low[axis] = fminf(box.low[axis], p[axis]);
      box.high[axis] = fmaxf(box.high[axis], p[axis]);
    }
    reinterpret_cast<float4*>(sorted)[i] = make_float4(p[0], p[1], p[2], __int_as_float(static_cast<int>(from)));
  }
  reinterpret_cast<Box*>(boxes)[num_leaves + leaf] = box;
}

extern "C" __global__ void __launch_bounds__(256) merge_boxes(int first, float* __restrict__ boxes) {
  const int node = first + static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (node >= 2 * first) return;
  Box* const all = reinterpret_cast<Box*>(boxes);
  const Box left = all[2 * node], right = all[2 * node + 1];
  Box box;
#pragma unroll
  for (int axis = 0; axis < 3; ++axis) {
    box.low[axis] = fminf(left.low[axis], right.low[axis]);
    box.high[axis] = fmaxf(left.high[axis], right.high[axis]);
  }
  all[node] = box;
}

// One point per thread: the own leaf first, so that few nodes are near enough, and of two children the nearer one. The 8 blocks lift the
// compiler's limit of 32 registers, with which it spills.
extern "C" __global__ void __launch_bounds__(128, 8) search(int n, int num_leaves, int k, const float* __restrict__ sorted,
                                                         const float* __restrict__ boxes, int* __restrict__ ids,
                                                         float* __restrict__ distances2) {
  const int self = blockIdx.x * blockDim.x + threadIdx.x;
  if (self >= n) return;
  const float4* const points = reinterpret_cast<const float4*>(sorted);
  const Box* const nodes = reinterpret_cast<const Box*>(boxes);
  const float4 q = points[self];
  const long long row = static_cast<long long>(__float_as_int(q.w)) * k;
  const Best best = {k, distances2 + row, ids + row};
  for (int i = 0; i < k; ++i) best.d2[i] = __int_as_float(0x7f800000);
  const int own = num_leaves + self / LEAF;
  visit_leaf(self / LEAF, n, points, self, q, best);
  // From the own leaf upwards, the tree below each sibling: what is near in the order is mostly near in space.
  for (int climb = own; climb > 1; climb /= 2) {
    int node = climb ^ 1;
    if (distance2_to_box(nodes[node], q) >= best.worst()) continue;
    // Down with a bit per level instead of a stack: 1 where the sibling is still to be visited.
    unsigned pending = 0;
    for (;;) {
      if (node >= num_leaves) {
        visit_leaf(node - num_leaves, n, points, self, q, best);
      } else {
        const float left = distance2_to_box(nodes[2 * node], q), right = distance2_to_box(nodes[2 * node + 1], q);
        // ">=": a box that can only tie is skipped, else many equal points would make every query visit all of them.
        if (fminf(left, right) < best.worst()) {
          pending = pending << 1 | (fmaxf(left, right) < best.worst());
          node = 2 * node + (left <= right ? 0 : 1);
          continue;
        }
      }
      // Up to the nearest level whose other child is pending and still near enough.
      bool found = false;
      while (!found && node != (climb ^ 1)) {
        found = pending & 1 && distance2_to_box(nodes[node ^ 1], q) < best.worst();
        if (found) {
          node ^= 1;
          pending &= ~1u;
        } else {
          node /= 2;
          pending >>= 1;
        }
      }
      if (!found) break;
    }
  }
}
