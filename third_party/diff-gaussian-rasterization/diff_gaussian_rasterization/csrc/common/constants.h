// SPDX-License-Identifier: Apache-2.0
// Every constant of the renderer, with its reason.
#pragma once

// What both back ends call: functions of the template type F, which is one float on a GPU and a vector of them on a CPU.
#ifdef __CUDACC__
#define S2D_HOST_DEVICE __host__ __device__
#define S2D_SHARED __host__ __device__ __forceinline__
#else
#define S2D_HOST_DEVICE
#define S2D_SHARED inline __attribute__((always_inline))
#endif

namespace s2d {

constexpr float ALPHA_MIN = 1.0f / 255.0f;  // one step of an 8-bit image: what is fainter cannot be seen
constexpr float ALPHA_MAX = 0.99f;          // keeps 1 - alpha away from zero: the backward pass divides by it
constexpr float T_MIN = 1e-4f;              // (1 - ALPHA_MAX)^2: two opaque splats finish a pixel
constexpr float BLUR = 0.3f;                // pixel^2 added to the 2D covariance, so that no splat falls between the pixels
constexpr float NEAR = 0.2f;                // world units: nearer splats cover the image and carry no information
constexpr float FOV_MARGIN = 0.3f;          // of the half-width: how far outside the image the Jacobian is still evaluated

constexpr float LOG2_E = 1.44269504088896341f;
constexpr float LN_2 = 0.693147180559945309f;
constexpr float LOG2_ALPHA_MIN = -7.99435343685885794f;  // log2(1/255)
// Splats are stored whitened: alpha = 2^(L - u^2 - v^2) with u^2 + v^2 = (log2(e)/2) d^T conic d. This is sqrt(log2(e)/2).
constexpr float WHITEN = 0.849321800288019f;

// Culling is exact up to rounding; this slack (in units of log2 alpha) keeps it on the safe side.
constexpr float CULL_SLACK = 1e-4f;

// Real spherical harmonics normalised over the sphere, in the sign convention of 3DGS files.
constexpr float SH_0 = 0.28209479177387814f;     // sqrt(1/(4 pi))
constexpr float SH_1 = 0.48860251190291992f;     // sqrt(3/(4 pi))
constexpr float SH_2_XY = 1.0925484305920792f;   // sqrt(15/(4 pi)): xy, yz, xz
constexpr float SH_2_ZZ = 0.31539156525252005f;  // sqrt(5/(16 pi)): 2zz - xx - yy
constexpr float SH_2_XX = 0.54627421529603959f;  // sqrt(15/(16 pi)): xx - yy
constexpr float SH_3_A = 0.59004358992664352f;   // sqrt(35/(32 pi)): y(3xx - yy), x(xx - 3yy)
constexpr float SH_3_B = 2.8906114426405538f;    // sqrt(105/(4 pi)): xyz
constexpr float SH_3_C = 0.45704579946446572f;   // sqrt(21/(32 pi)): y(4zz - xx - yy), x(4zz - xx - yy)
constexpr float SH_3_D = 0.37317633259011546f;   // sqrt(7/(16 pi)): z(2zz - 3xx - 3yy)
constexpr float SH_3_E = 1.4453057213202769f;    // sqrt(105/(16 pi)): z(xx - yy)
constexpr int SH_MAX_COEFFS = 16;

}  // namespace s2d
