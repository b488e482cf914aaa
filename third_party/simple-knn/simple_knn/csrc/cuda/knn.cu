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
extern "C" __global__ void morton_codes(int n, const float* points, const float* low, const float* high, long long* codes);
extern "C" __global__ void leaf_boxes(int n, int num_leaves, const float* points, const long long* order, float* sorted,
                                      float* boxes);
extern "C" __global__ void merge_boxes(int first, float* boxes);
extern "C" __global__ void search(int n, int num_leaves, int k, const float* sorted, const float* boxes, int* ids,
                                  float* distances2);
