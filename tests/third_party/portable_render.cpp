// SPDX-License-Identifier: Apache-2.0
// One render and its backward pass through the rasteriser's C ABI, for machines without Python: test_cross_compile.py builds it for other
// CPUs and runs it in an emulator.
//
//   portable_render SCENE RESULT
//
// SCENE: int32 n, num_coeffs, degree, width, height; float32 viewmat[16], fx, fy, cx, cy, background[3], then the rows of means, log_scales,
// quats, opacity_logits, sh0, shN and the cotangents of rgb, alpha, depth. RESULT: float32 rgb, alpha, depth, then the gradients in
// the order of the parameters, means2d, viewmat; int32 radii.
#include <cstdio>
#include <vector>

#include "frame.h"

extern "C" {
void* s2d_frame_new();
void s2d_frame_free(void*);
const char* s2d_last_error();
int s2d_forward(void*, const s2d::SceneArgs*, const s2d::CameraArgs*, const s2d::ImageArgs*, int32_t);
int s2d_backward(void*, const s2d::SceneArgs*, const s2d::CotangentArgs*, const s2d::GradientArgs*, int32_t);
}

namespace {

std::vector<float> read_floats(std::FILE* file, size_t count) {
  std::vector<float> values(count + 1);  // never empty, so that data() is an address
  if (std::fread(values.data(), 4, count, file) != count) std::perror("the scene is too short");
  return values;
}

int fail(const char* what) {
  std::fprintf(stderr, "%s: %s\n", what, s2d_last_error());
  return 1;
}

}  // namespace

int main(int argc, char** argv) {
  std::FILE* file = argc == 3 ? std::fopen(argv[1], "rb") : nullptr;
  int32_t header[5];
  if (!file || std::fread(header, 4, 5, file) != 5) return fail("cannot read the scene");
  const size_t n = header[0], coeffs = header[1], pixels = static_cast<size_t>(header[3]) * header[4];

  s2d::CameraArgs camera{};
  const std::vector<float> numbers = read_floats(file, 23);
  for (int i = 0; i < 16; ++i) camera.viewmat[i] = numbers[i];
  camera.fx = numbers[16], camera.fy = numbers[17], camera.cx = numbers[18], camera.cy = numbers[19];
  for (int i = 0; i < 3; ++i) camera.background[i] = numbers[20 + i];
  camera.width = header[3], camera.height = header[4];

  const size_t widths[6] = {3, 3, 4, 1, 3, 3 * (coeffs - 1)};
  std::vector<float> in[6], out[6];
  for (int i = 0; i < 6; ++i) {
    in[i] = read_floats(file, n * widths[i]);
    out[i].resize(in[i].size());
  }
  s2d::SceneArgs scene{};
  scene.n = header[0], scene.num_coeffs = header[1], scene.degree = header[2], scene.scale_modifier = 1.0f;
  scene.means = in[0].data(), scene.log_scales = in[1].data(), scene.quats = in[2].data();
  scene.opacity_logits = in[3].data(), scene.sh0 = in[4].data(), scene.shN = in[5].data();

  std::vector<float> v_rgb = read_floats(file, 3 * pixels), v_alpha = read_floats(file, pixels), v_depth = read_floats(file, pixels);
  std::fclose(file);
  std::vector<float> rgb(3 * pixels), alpha(pixels), depth(pixels), means2d(2 * n), viewmat(16);
  std::vector<int32_t> radii(n);
  s2d::ImageArgs images{};
  images.rgb = rgb.data(), images.alpha = alpha.data(), images.depth = depth.data(), images.radii = radii.data();
  s2d::CotangentArgs cotangents{};
  cotangents.rgb = v_rgb.data(), cotangents.alpha = v_alpha.data(), cotangents.depth = v_depth.data();
  s2d::GradientArgs gradients{};
  gradients.means = out[0].data(), gradients.log_scales = out[1].data(), gradients.quats = out[2].data();
  gradients.opacity_logits = out[3].data(), gradients.sh0 = out[4].data(), gradients.shN = out[5].data();
  gradients.means2d = means2d.data(), gradients.viewmat = viewmat.data();

  void* frame = s2d_frame_new();
  if (s2d_forward(frame, &scene, &camera, &images, 2)) return fail("forward");
  if (s2d_backward(frame, &scene, &cotangents, &gradients, 2)) return fail("backward");
  s2d_frame_free(frame);

  file = std::fopen(argv[2], "wb");
  if (!file) return fail("cannot write the result");
  for (const auto* image : {&rgb, &alpha, &depth}) std::fwrite(image->data(), 4, image->size(), file);
  for (int i = 0; i < 6; ++i) std::fwrite(out[i].data(), 4, n * widths[i], file);
  std::fwrite(means2d.data(), 4, means2d.size(), file);
  std::fwrite(viewmat.data(), 4, viewmat.size(), file);
  std::fwrite(radii.data(), 4, radii.size(), file);
  return std::fclose(file);
}
