// SPDX-License-Identifier: Apache-2.0
// What this machine can do at best: multiply-adds per second, and bytes copied per second, on any number of threads at once.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include "abi.h"

namespace {

using Clock = std::chrono::steady_clock;

// Run test(thread) on all threads at once: nobody starts before everybody is ready. Return seconds from the first start to the last end.
template <class Prepare, class Test>
double together(int num_threads, const Prepare& prepare, const Test& test) {
  std::vector<Clock::time_point> starts(num_threads), ends(num_threads);
  std::atomic<int> waiting{num_threads};
  const auto work = [&](int thread) {
    prepare(thread);
    waiting.fetch_sub(1);
    while (waiting.load() > 0) std::this_thread::yield();
    starts[thread] = Clock::now();
    test(thread);
    ends[thread] = Clock::now();
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < num_threads; ++thread) others.emplace_back(work, thread);
  work(0);
  for (std::thread& other : others) other.join();
  return std::chrono::duration<double>(*std::max_element(ends.begin(), ends.end()) - *std::min_element(starts.begin(), starts.end())).count();
}

// Chains that do not wait for one another: more than latency times multiply-adds per cycle (8 to 10 on x86, 16 on wide ARM cores), few
// enough for the registers.
#if defined(__ARM_NEON)
constexpr int CHAINS = 24;
#else
constexpr int CHAINS = 12;
#endif

template <int WIDTH>
struct VectorOf {
  typedef float Type __attribute__((vector_size(4 * WIDTH)));
};

template <int WIDTH>
float multiply_adds(int64_t rounds) {
  typedef typename VectorOf<WIDTH>::Type Vector;
  Vector sums[CHAINS];
  for (int i = 0; i < CHAINS; ++i) sums[i] = Vector{} + (1.0f + 0.01f * static_cast<float>(i));
  const Vector factor = Vector{} + 0.999f, term = Vector{} + 0.001f;  // stays near 1: no denormal, no overflow
  for (int64_t round = 0; round < rounds; ++round) {
    for (int i = 0; i < CHAINS; ++i) sums[i] = sums[i] * factor + term;
  }
  Vector total = Vector{};
  for (int i = 0; i < CHAINS; ++i) total += sums[i];
  return total[0];
}

}  // namespace

// float32 operations per second of all threads together (a multiply-add is two), with vectors of `width` floats: 4, 8 or 16.
S2D_EXPORT double s2d_machine_peak(int32_t width, int32_t num_threads, int64_t rounds) {
  std::vector<float> results(num_threads);
  const double seconds = together(num_threads, [](int) {}, [&](int thread) {
    results[thread] = width == 16 ? multiply_adds<16>(rounds) : width == 8 ? multiply_adds<8>(rounds) : multiply_adds<4>(rounds);
  });
  volatile float used = results[0];  // or the compiler leaves the work out
  (void)used;
  return 2.0 * CHAINS * width * static_cast<double>(rounds) * num_threads / seconds;
}

// Bytes per second, read and written ones both counted, of all threads together; each copies an array of its own `repeats` times. The
// memory is there before the clock starts, so that no page fault counts.
S2D_EXPORT double s2d_machine_copy(int64_t bytes, int32_t num_threads, int64_t repeats) {
  std::vector<std::vector<char>> from(num_threads), to(num_threads);
  const auto prepare = [&](int thread) {
    from[thread].assign(bytes, 1);
    to[thread].assign(bytes, 2);
  };
  const double seconds = together(num_threads, prepare, [&](int thread) {
    for (int64_t repeat = 0; repeat < repeats; ++repeat) {
      from[thread][repeat % bytes] = static_cast<char>(repeat);  // so that no copy is the same as the one before
      std::memcpy(to[thread].data(), from[thread].data(), bytes);
      asm volatile("" : : "r"(to[thread].data()) : "memory");
    }
  });
  return 2.0 * static_cast<double>(bytes) * static_cast<double>(repeats) * num_threads / seconds;
}
