// SPDX-License-Identifier: Apache-2.0
// The C ABI. Every function returns 0, or 1 with the words in s2d_last_error().
#include "abi.h"

#include "frame.h"

S2D_EXPORT const char* s2d_last_error() { return s2d::last_error().c_str(); }

S2D_EXPORT int32_t s2d_lanes() { return s2d::LANES; }

S2D_EXPORT void* s2d_frame_new() { return new (std::nothrow) s2d::Frame(); }

S2D_EXPORT void s2d_frame_free(void* frame) { delete static_cast<s2d::Frame*>(frame); }

// seconds[5] of the phases (project, bin, forward, backward of tiles, backward of projection), counts[2] = visible, instances.
S2D_EXPORT void s2d_frame_stats(const void* frame, double* seconds, int64_t* counts) {
  const s2d::Frame& f = *static_cast<const s2d::Frame*>(frame);
  for (int i = 0; i < s2d::NUM_PHASES; ++i) seconds[i] = f.seconds[i];
  counts[0] = f.num_visible;
  counts[1] = f.num_instances;
}

S2D_EXPORT int s2d_forward(void* handle, const s2d::SceneArgs* scene, const s2d::CameraArgs* camera, const s2d::ImageArgs* images,
                           int32_t num_threads) {
  return s2d::guarded([&] {
    s2d::Frame& frame = *static_cast<s2d::Frame*>(handle);
    frame.camera_args = *camera;
    frame.camera =
        s2d::make_camera(camera->viewmat, camera->fx, camera->fy, camera->cx, camera->cy, camera->width, camera->height);
    frame.tiles_x = (camera->width + s2d::TILE_W - 1) / s2d::TILE_W;
    frame.tiles_y = (camera->height + s2d::TILE_H - 1) / s2d::TILE_H;
    s2d::project(frame, *scene, *images, num_threads);
    s2d::bin(frame, scene->n, num_threads);
    s2d::forward(frame, *images, num_threads);
  });
}

S2D_EXPORT int s2d_backward(void* handle, const s2d::SceneArgs* scene, const s2d::CotangentArgs* cotangents,
                            const s2d::GradientArgs* gradients, int32_t num_threads) {
  return s2d::guarded([&] {
    s2d::Frame& frame = *static_cast<s2d::Frame*>(handle);
    s2d::backward_tiles(frame, *cotangents, num_threads);
    s2d::backward_project(frame, *scene, *gradients, cotangents->depth != nullptr, num_threads);
  });
}

S2D_EXPORT int s2d_backward_update(void* handle, const s2d::SceneArgs* scene, const s2d::CotangentArgs* cotangents,
                                   const s2d::UpdateArgs* update, int32_t num_threads) {
  return s2d::guarded([&] {
    s2d::Frame& frame = *static_cast<s2d::Frame*>(handle);
    s2d::backward_tiles(frame, *cotangents, num_threads);
    s2d::backward_update(frame, *scene, *update, cotangents->depth != nullptr, num_threads);
  });
}
