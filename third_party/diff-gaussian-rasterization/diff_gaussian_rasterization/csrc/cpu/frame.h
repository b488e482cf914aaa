// SPDX-License-Identifier: Apache-2.0
// What the phases of one render hand to each other. A Frame belongs to one render (one camera) until its backward pass is done, and
// is then used again: in steady state nothing is allocated.
//
//   project.cpp   Gaussians -> Splat records (whitened ellipse, colour), tiles and block masks of each
//   bin.cpp       depth order -> per tile a list of instances, nearest first
//   forward.cpp   tiles -> images, and what the backward pass needs of each pixel
//   backward_tiles.cpp    tiles -> ten sums per instance (slot)
//   backward_project.cpp  slots -> gradients of the raw parameters
//   update.cpp            slots -> new raw parameters, in training without autograd
//
// A tile is 8 x 4 blocks; a block is one vector of pixels (4 x 4 pixels with 16 lanes). Which of its 32 blocks a Gaussian touches is
// known exactly, as a bit mask: nothing else is ever looked at.
#pragma once

#include <chrono>
#include <cstdint>
#include <new>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "adam.h"
#include "gaussian.h"
#include "simd.h"

namespace s2d {

constexpr int BLOCK_W = LANES == 4 ? 2 : 4;
constexpr int BLOCK_H = LANES / BLOCK_W;
// As many blocks as a mask has bits: larger tiles mean fewer instances, each of which has fixed costs.
constexpr int TILE_COLUMNS = LANES == 8 ? 4 : 8, TILE_ROWS = 32 / TILE_COLUMNS;
constexpr int TILE_BLOCKS = TILE_COLUMNS * TILE_ROWS;
constexpr int TILE_W = TILE_COLUMNS * BLOCK_W, TILE_H = TILE_ROWS * BLOCK_H;
static_assert(TILE_BLOCKS == 32, "masks have 32 bits");

constexpr size_t HUGE_PAGE = size_t{1} << 21;

// Growable, uninitialised, aligned memory.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { release(); }

  T* reserve(size_t count) {
    if (count > capacity_) {
      const size_t wanted = count + count / 4;  // room for a scene that grows
      // Large buffers are read in random order: huge pages, where the system has them, save address translations.
      const size_t alignment = wanted * sizeof(T) < HUGE_PAGE ? 64 : HUGE_PAGE;
      const size_t bytes = (wanted * sizeof(T) + alignment - 1) / alignment * alignment;
      void* fresh = ::operator new(bytes, std::align_val_t{alignment});
#ifdef MADV_HUGEPAGE
      if (alignment == HUGE_PAGE) madvise(fresh, bytes, MADV_HUGEPAGE);
#endif
      release();
      data_ = static_cast<T*>(fresh);
      capacity_ = wanted;
      alignment_ = alignment;
    }
    return data_;
  }
  T* data() const { return data_; }
  size_t capacity() const { return capacity_; }
  int64_t bytes() const { return static_cast<int64_t>(capacity_ * sizeof(T)); }
  T& operator[](size_t i) const { return data_[i]; }

 private:
  void release() {
    if (data_) ::operator delete(data_, std::align_val_t{alignment_});
  }

  T* data_ = nullptr;
  size_t capacity_ = 0, alignment_ = 64;
};

// Everything the tile loops read of one Gaussian: one cache line.
struct alignas(64) Splat {
  float x, y;         // pixels
  float s1, s2, s3;   // whitening: u = s1 dx + s2 dy, v = s3 dy
  float log2_opacity;
  float rgb[3];
  float aux;          // what the depth image accumulates: z, or 1/z
  uint32_t padding[6];
};
static_assert(sizeof(Splat) == 64, "one cache line");

// The tiles that a Gaussian touches: [begin, begin + count) of the slots.
struct SlotRange {
  uint32_t begin, count;  // count = 0: not visible
};
struct SlotTile {
  uint32_t tile, mask;
};

// What the depth sort moves.
struct DepthKey {
  uint32_t key, gaussian;
};

// What project.cpp finds out about the Gaussians of one task.
struct ChunkStats {
  int64_t visible;
  uint32_t min_depth, max_depth;  // as bits; of the visible ones
};

// One Gaussian in one tile.
struct Instance {
  uint32_t gaussian;
  uint32_t slot;  // where its gradient sums go: slots of one Gaussian are neighbours
  uint32_t mask;  // blocks it touches
};

// Gradient sums of one instance; see Sums for the meaning of the first ten.
struct alignas(64) Slot {
  float sums[16];
};

// What the backward pass needs of the pixels of a tile, in block order.
struct alignas(64) TileState {
  float T[TILE_BLOCKS * LANES];        // final transmittance
  float covered[TILE_BLOCKS * LANES];  // sum of weights
  float depth[TILE_BLOCKS * LANES];    // rendered depth
  int32_t stop[TILE_BLOCKS * LANES];   // list index of the Gaussian that finished the pixel, INT32_MAX if none did
};

// ---- the C ABI's structures (mirrored in _native.py) ------------------------------------------------------------------------------

struct SceneArgs {
  int64_t n;
  int32_t num_coeffs;  // K: stored SH coefficients per channel, sh0 included
  int32_t degree;      // in use
  int32_t activated;   // 1: log_scales holds scales, opacity_logits opacities
  float scale_modifier;  // multiplies scales; not applied to covars
  const float *means, *log_scales, *quats, *opacity_logits, *sh0, *shN;
  const float* colors;  // [N,3] instead of SH, or null
  const float* covars;  // [N,6] upper triangle instead of log_scales and quats, or null
};

struct CameraArgs {
  float viewmat[16];  // row-major
  float fx, fy, cx, cy;
  int32_t width, height;
  float background[3];
  int32_t inverse_depth;  // 1: the depth image is sum w / z, not normalised
  int32_t antialiasing;   // 1: opacity times sqrt(det / det blurred)
};

struct ImageArgs {
  float *rgb, *alpha, *depth;
  int32_t* radii;
  const float* means2d_offset;  // [N,2] pixels, added to the projected means; null = zero
};

struct CotangentArgs {
  const float *rgb, *alpha, *depth;  // null = zero
  int32_t lengths;                   // 1: SUM_LENGTH is wanted, too
};

struct GradientArgs {
  float *means, *log_scales, *quats, *opacity_logits, *sh0, *shN, *colors, *covars;
  float* means2d;      // of this camera; null = not wanted
  float* lengths;      // [N] SUM_LENGTH of this camera; null = not wanted
  float* viewmat;      // [16] of this camera; null = not wanted
  float* intrinsics;   // [4] fx, fy, cx, cy of this camera; null = not wanted
  int32_t accumulate;  // 1: add to the Gaussians' gradients that are there (second camera of a batch)
};

// What becomes of the gradients in a training step without autograd.
struct UpdateArgs {
  const AdamTensor* tensors;  // [6] means, log_scales, quats, opacity_logits, sh0, shN; their grad is not read
  const int32_t* radii;       // [N] rows with 0 are left alone
  const float* opacity_slope;  // [N] derivative of the scene's opacity logits by the tensors'; null = they are the same
  float opacity_penalty;      // the loss has this times the mean opacity; if > 0, all rows are updated
  float scale_x, scale_y;     // of the 2D gradients in the statistics
  int32_t lengths;            // 1: grad_sum gets SUM_LENGTH instead of the length of the sum
  float *grad_sum, *num_views;  // [N] where radii > 0: += length of the 2D gradient, += 1; null = not wanted
  float *viewmat, *intrinsics;  // as in GradientArgs
};

// -----------------------------------------------------------------------------------------------------------------------------------

enum Phase { PHASE_PROJECT, PHASE_BIN, PHASE_FORWARD, PHASE_BACKWARD_TILES, PHASE_BACKWARD_PROJECT, NUM_PHASES };

struct Frame {
  Camera camera;
  CameraArgs camera_args;
  int tiles_x = 0, tiles_y = 0;
  int64_t num_chunks = 0, num_visible = 0, num_instances = 0;

  Buffer<Splat> splats;             // [N]
  Buffer<SlotRange> slot_ranges;    // [N]
  Buffer<uint32_t> depths;          // [N] bits of z: positive floats compare like their bits; 0 = not visible
  Buffer<SlotTile> slot_tiles;      // [slots]
  Buffer<ChunkStats> chunk_stats;   // [chunks]
  Buffer<DepthKey> keys, keys_swap;  // [visible] scratch of the sort
  Buffer<uint32_t> digit_counts;    // [tasks, buckets] scratch of the sort
  Buffer<uint32_t> order;           // [visible] Gaussians, nearest first
  Buffer<uint32_t> tile_counts;     // [tasks, tiles] scratch
  Buffer<uint32_t> tile_begin;      // [tiles + 1]
  Buffer<Instance> instances;
  Buffer<TileState> tile_states;    // [tiles]
  Buffer<Slot> slots;
  Buffer<double> camera_sums;       // [units of the camera's sums + 1, CAMERA_SUMS] scratch

  double seconds[NUM_PHASES] = {};
};

class PhaseTimer {
 public:
  PhaseTimer(Frame& frame, Phase phase) : seconds_(frame.seconds[phase]), start_(Clock::now()) {}
  ~PhaseTimer() { seconds_ = std::chrono::duration<double>(Clock::now() - start_).count(); }

 private:
  using Clock = std::chrono::steady_clock;
  double& seconds_;
  Clock::time_point start_;
};

void project(Frame&, const SceneArgs&, const ImageArgs&, int num_threads);
void bin(Frame&, int64_t n, int num_threads);
void forward(Frame&, const ImageArgs&, int num_threads);
void backward_tiles(Frame&, const CotangentArgs&, int num_threads);
void backward_project(Frame&, const SceneArgs&, const GradientArgs&, bool with_depth, int num_threads);
// The part of it for the Gaussians [begin, end), a multiple of LANES but for the last; the gradients of Gaussian g go to row g - origin.
void backward_rows(const Frame&, const SceneArgs&, const GradientArgs&, bool with_depth, int64_t begin, int64_t end, int64_t origin,
                   double* camera_sums);
// The camera's gradient is summed over units of so many Gaussians, then over units: in this order whoever works on which.
constexpr int64_t CAMERA_UNIT = 256;
// Zeros for these sums, to hand to backward_rows; null where neither gradient is wanted.
double* start_camera_sums(Frame&, int64_t n, const GradientArgs&);
void finish_camera_sums(Frame&, int64_t n, const GradientArgs&);
// Instead of backward_project: from the slots to updated parameters.
void backward_update(Frame&, const SceneArgs&, const UpdateArgs&, bool with_depth, int num_threads);

}  // namespace s2d
