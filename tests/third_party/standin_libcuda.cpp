// A libcuda for tests: the functions that native_build.cuda.driver calls, with the signatures of NVIDIA's cuda.h, for two made-up
// GPUs. It writes down what it is told, and fails where a test says so: STANDIN_FAIL="cuLaunchKernel=700". It runs nothing.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "abi.h"

namespace {

char written[1 << 16];
void* current[16];
int depth = 0;

unsigned long long number(const void* pointer) { return reinterpret_cast<unsigned long long>(pointer); }

int fails(const char* function) {
  const char* asked = std::getenv("STANDIN_FAIL");
  const size_t n = std::strlen(function);
  return asked && !std::strncmp(asked, function, n) && asked[n] == '=' ? std::atoi(asked + n + 1) : 0;
}

}  // namespace

#define SAY(...) std::snprintf(written + std::strlen(written), sizeof written - std::strlen(written), __VA_ARGS__)

S2D_EXPORT const char* standin_written() { return written; }
S2D_EXPORT void standin_clear() { written[0] = 0; }
S2D_EXPORT int standin_depth() { return depth; }

S2D_EXPORT int cuInit(unsigned) { return fails("cuInit"); }
S2D_EXPORT int cuDriverGetVersion(int* version) { return *version = 13020, 0; }
S2D_EXPORT int cuDeviceGet(int* device, int ordinal) { return ordinal < 2 ? (*device = 40 + ordinal, 0) : 101; }
S2D_EXPORT int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 97 ? 227 << 10 : -1;
  return device == 40 || device == 41 ? 0 : 101;
}
S2D_EXPORT int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = reinterpret_cast<void*>(0xC0FFEE0000000000ull + static_cast<unsigned>(device));
  SAY("retain %d\n", device);
  return 0;
}
S2D_EXPORT int cuCtxPushCurrent_v2(void* context) { return current[depth++] = context, 0; }
S2D_EXPORT int cuCtxPopCurrent_v2(void** context) { return *context = current[--depth], 0; }
S2D_EXPORT int cuModuleLoadData(void** module, const void* image) {
  SAY("load %.12s in %llx\n", static_cast<const char*>(image), number(current[depth - 1]));
  *module = reinterpret_cast<void*>(0xB0000000000000B0ull);
  return fails("cuModuleLoadData");
}
S2D_EXPORT int cuModuleGetFunction(void** function, void* module, const char* name) {
  SAY("function %s of %llx\n", name, number(module));
  *function = reinterpret_cast<void*>(0xF0000000000000F0ull);
  return fails("cuModuleGetFunction");
}
S2D_EXPORT int cuFuncSetAttribute(void* function, int attribute, int value) {
  SAY("set %d to %d of %llx\n", attribute, value, number(function));
  return 0;
}
S2D_EXPORT int cuGetErrorString(int error, const char** text) {
  static char said[32];
  std::snprintf(said, sizeof said, "standin error %d", error);
  return *text = said, 0;
}
// All kernels here are (const float* data, long long n, float scale, int flag).
S2D_EXPORT int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                              unsigned shared, void* stream, void** arguments, void** extra) {
  SAY("launch %llx grid %u,%u,%u block %u,%u,%u shared %u stream %llx in %llx: %llx %lld %g %d extra %d\n", number(function), gx,
      gy, gz, bx, by, bz, shared, number(stream), number(current[depth - 1]),
      *static_cast<unsigned long long*>(arguments[0]), *static_cast<long long*>(arguments[1]),
      *static_cast<float*>(arguments[2]), *static_cast<int*>(arguments[3]), extra != nullptr);
  return fails("cuLaunchKernel");
}
