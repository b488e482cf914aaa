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
extern "C" __global__ void emit_instances_16(long long total, long long n, int tiles_x, int tiles_y, const long long* order,
                                             const long long* ends, const float* splats, short* tiles, int* gaussians);
extern "C" __global__ void emit_instances_32(long long total, long long n, int tiles_x, int tiles_y, const long long* order,
                                             const long long* ends, const float* splats, int* tiles, int* gaussians);
extern "C" __global__ void tile_ranges_16(long long num_instances, int num_tiles, const short* tiles, const long long* permutation,
                                          const int* gaussians, int* instances, long long* tile_begin);
extern "C" __global__ void tile_ranges_32(long long num_instances, int num_tiles, const int* tiles, const long long* permutation,
                                          const int* gaussians, int* instances, long long* tile_begin);
