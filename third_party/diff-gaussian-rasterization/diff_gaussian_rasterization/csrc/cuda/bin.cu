// SPDX-License-Identifier: Apache-2.0
// Phase 2: from Gaussians in depth order to a list of instances (Gaussian, tile) per tile, nearest first. Two sorts by torch: of the
// Gaussians by depth, and of the instances, which are emitted in depth order, by tile: stable, and over 16 bits where tiles allow.
// Conventions and the order of launches: project.cu.
//
// emit_instances_16, emit_instances_32   grid ceil(C * N / 256), block 256, no dynamic shared memory
//   total            int64   C * N
//   n                int64   N
//   tiles_x, tiles_y int32
//   order            int64 [C, N]: Gaussians of each camera, nearest first
//   ends             int64 [C * N]: inclusive prefix sums of tile_counts in that order
//   splats           [C, N, 12]
//   tiles            out int16 (_16) or int32 (_32) [I]: camera * tiles_x * tiles_y + tile_row * tiles_x + tile_column
//   gaussians        out int32 [I]: camera * N + Gaussian (so C * N must be below 2^31)
//
// tile_ranges_16, tile_ranges_32         grid ceil((I + 1) / 256), block 256, no dynamic shared memory
//   num_instances    int64   I
//   num_tiles        int32   C * tiles_x * tiles_y
//   tiles            int16 or int32 [I], sorted
//   permutation      int64 [I]: where each was before
//   gaussians        int32 [I], not sorted
//   instances        out int32 [I]: gaussians[permutation]
//   tile_begin       out int64 [num_tiles + 1]: the instances of tile t are [tile_begin[t], tile_begin[t + 1])
#include "ellipse.h"

namespace s2d {

constexpr int LONE_ROWS = 8, LONE_TILES = 64;  // under the bounds of what a lane lists alone; the warp shares the work of larger splats

// What one lane knows of its splat.
struct Listing {
  Ellipse ellipse;
  TileRows rows;
  int64 begin;  // of its instances
  int gaussian, first_tile;
};

__device__ __forceinline__ Listing from_lane(const Listing& mine, int lane) {
  Listing out;
  out.ellipse.x = __shfl_sync(FULL_WARP, mine.ellipse.x, lane);
  out.ellipse.y = __shfl_sync(FULL_WARP, mine.ellipse.y, lane);
  out.ellipse.skew = __shfl_sync(FULL_WARP, mine.ellipse.skew, lane);
  out.ellipse.inv_s1 = __shfl_sync(FULL_WARP, mine.ellipse.inv_s1, lane);
  out.ellipse.s3 = __shfl_sync(FULL_WARP, mine.ellipse.s3, lane);
  out.ellipse.level = __shfl_sync(FULL_WARP, mine.ellipse.level, lane);
  out.ellipse.right_y = __shfl_sync(FULL_WARP, mine.ellipse.right_y, lane);
  out.rows.begin = __shfl_sync(FULL_WARP, mine.rows.begin, lane);
  out.rows.end = __shfl_sync(FULL_WARP, mine.rows.end, lane);
  out.begin = __shfl_sync(FULL_WARP, mine.begin, lane);
  out.gaussian = __shfl_sync(FULL_WARP, mine.gaussian, lane);
  out.first_tile = __shfl_sync(FULL_WARP, mine.first_tile, lane);
  return out;
}

// All lanes list one splat: a row of tiles each, then together the tiles of one row after another.
template <class T>
__device__ void list_together(const Listing& splat, int tiles_x, T* tiles, int* gaussians) {
  const int lane = threadIdx.x % WARP;
  int64 at = splat.begin;
  for (int top = splat.rows.begin; top < splat.rows.end; top += WARP) {
    TileColumns columns = {0, 0};
    if (top + lane < splat.rows.end) columns = tile_columns(splat.ellipse, top + lane, tiles_x);
    const int rows = min(WARP, splat.rows.end - top);
    for (int r = 0; r < rows; ++r) {
      const int begin = __shfl_sync(FULL_WARP, columns.begin, r), end = __shfl_sync(FULL_WARP, columns.end, r);
      for (int column = begin + lane; column < end; column += WARP) {
        tiles[at + column - begin] = static_cast<T>(splat.first_tile + (top + r) * tiles_x + column);
        gaussians[at + column - begin] = splat.gaussian;
      }
      at += end - begin;
    }
  }
}

template <class T>
__device__ __forceinline__ void emit_instances(int64 total, int64 n, int tiles_x, int tiles_y, const int64* __restrict__ order,
                                               const int64* __restrict__ ends, const float* __restrict__ splats,
                                               T* __restrict__ tiles, int* __restrict__ gaussians) {
  const int64 rank = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x;
  Listing mine = {};
  bool large = false;
  const int64 begin = rank > 0 && rank < total ? ends[rank - 1] : 0;
  if (rank < total && ends[rank] > begin) {
    const int view = static_cast<int>(rank / n);
    mine.gaussian = static_cast<int>(view * n + order[rank]);
    mine.first_tile = view * tiles_x * tiles_y;
    mine.begin = begin;
    const Splat s = load_splat(splats, mine.gaussian);
    mine.ellipse = make_ellipse<true>(s.x, s.y, s.s1, s.s2, s.s3, s.log2_opacity);
    mine.rows = tile_rows(mine.ellipse, tiles_y);
    large = mine.rows.end - mine.rows.begin > LONE_ROWS || ends[rank] - begin > LONE_TILES;
    if (!large) {
      int64 at = begin;
      for (int row = mine.rows.begin; row < mine.rows.end; ++row) {
        const TileColumns columns = tile_columns(mine.ellipse, row, tiles_x);
        for (int column = columns.begin; column < columns.end; ++column, ++at) {
          tiles[at] = static_cast<T>(mine.first_tile + row * tiles_x + column);
          gaussians[at] = mine.gaussian;
        }
      }
    }
  }
  for (unsigned rest = __ballot_sync(FULL_WARP, large); rest; rest &= rest - 1) {
    list_together(from_lane(mine, __ffs(rest) - 1), tiles_x, tiles, gaussians);
  }
}

// Each thread stands between two instances and writes where the tiles begin that change there, empty ones included.
template <class T>
__device__ __forceinline__ void tile_ranges(int64 num_instances, int num_tiles, const T* __restrict__ tiles,
                                            const int64* __restrict__ permutation, const int* __restrict__ gaussians,
                                            int* __restrict__ instances, int64* __restrict__ tile_begin) {
  const int64 at = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at > num_instances) return;
  const int before = at > 0 ? tiles[at - 1] : -1, here = at < num_instances ? tiles[at] : num_tiles;
  for (int tile = before + 1; tile <= here; ++tile) tile_begin[tile] = at;
  if (at < num_instances) instances[at] = gaussians[permutation[at]];
}

}  // namespace s2d

extern "C" __global__ void __launch_bounds__(256) emit_instances_16(
    long long total, long long n, int tiles_x, int tiles_y, const long long* __restrict__ order, const long long* __restrict__ ends,
    const float* __restrict__ splats, short* __restrict__ tiles, int* __restrict__ gaussians) {
  s2d::emit_instances(total, n, tiles_x, tiles_y, order, ends, splats, tiles, gaussians);
}

extern "C" __global__ void __launch_bounds__(256) emit_instances_32(
    long long total, long long n, int tiles_x, int tiles_y, const long long* __restrict__ order, const long long* __restrict__ ends,
    const float* __restrict__ splats, int* __restrict__ tiles, int* __restrict__ gaussians) {
  s2d::emit_instances(total, n, tiles_x, tiles_y, order, ends, splats, tiles, gaussians);
}

extern "C" __global__ void __launch_bounds__(256) tile_ranges_16(
    long long num_instances, int num_tiles, const short* __restrict__ tiles, const long long* __restrict__ permutation,
    const int* __restrict__ gaussians, int* __restrict__ instances, long long* __restrict__ tile_begin) {
  s2d::tile_ranges(num_instances, num_tiles, tiles, permutation, gaussians, instances, tile_begin);
}

extern "C" __global__ void __launch_bounds__(256) tile_ranges_32(
    long long num_instances, int num_tiles, const int* __restrict__ tiles, const long long* __restrict__ permutation,
    const int* __restrict__ gaussians, int* __restrict__ instances, long long* __restrict__ tile_begin) {
  s2d::tile_ranges(num_instances, num_tiles, tiles, permutation, gaussians, instances, tile_begin);
}
