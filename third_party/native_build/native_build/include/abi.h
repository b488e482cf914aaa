// SPDX-License-Identifier: Apache-2.0
// The C ABI of the kernels: what is exported, and how an exception becomes a return code instead of crossing into Python.
#pragma once

#include <exception>
#include <new>
#include <string>

#ifdef _WIN32
#define S2D_EXPORT extern "C" __declspec(dllexport)
#else
#define S2D_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace s2d {

inline std::string& last_error() {
  thread_local std::string message;
  return message;
}

// Run fn; return 0, or 1 after an exception, whose words last_error() keeps for this thread.
template <class Fn>
int guarded(const Fn& fn) noexcept {
  try {
    fn();
    return 0;
  } catch (const std::bad_alloc&) {
    last_error() = "out of memory";
  } catch (const std::exception& error) {
    last_error() = error.what();
  } catch (...) {
    last_error() = "unknown C++ exception";
  }
  return 1;
}

}  // namespace s2d
