// SPDX-License-Identifier: Apache-2.0
// A persistent thread pool behind one function:
//
//   s2d::parallel_for(n_tasks, num_threads, [&](int64_t task) { ... });
//
// Tasks are handed out by a counter, so which thread runs a task changes from call to call: a task may write only what no other
// task touches. Then results are the same bits at any thread count. The first exception of a task is thrown again in the caller.
// A call while the pool is busy (another Python thread, or a nested call) runs its tasks on the calling thread.
//
// Waking a thread that sleeps takes 20 to 50 microseconds, as long as a small task. So whoever waits looks for news for SPIN first and
// sleeps then: the phases of a kernel follow each other faster than that. (Yielding
// while it looks would cost milliseconds on a busy machine: whoever gets the core keeps it.)
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#ifndef _WIN32
#include <unistd.h>
#endif

namespace s2d {
namespace detail {

class ThreadPool {
 public:
  using Task = void (*)(const void* context, int64_t task);

  // One pool per process. It is never destroyed (joining threads while a process exits can hang), and a forked child, which
  // inherits no threads, makes its own.
  static ThreadPool& instance() {
    static std::atomic<ThreadPool*> current{nullptr};
    static std::atomic<long> owner{-1};
    const long pid = process_id();
    if (owner.load() != pid) {
      ThreadPool* fresh = new ThreadPool();
      ThreadPool* seen = current.load();
      if (owner.load() != pid && current.compare_exchange_strong(seen, fresh)) {
        owner.store(pid);
      } else {
        delete fresh;  // another thread was first
      }
    }
    return *current.load();
  }

  void run(int64_t n_tasks, int num_threads, Task task, const void* context) {
    std::unique_lock<std::mutex> only_caller(callers_, std::try_to_lock);
    int64_t threads = num_threads < n_tasks ? num_threads : n_tasks;
    if (threads <= 1 || !only_caller.owns_lock()) {
      for (int64_t i = 0; i < n_tasks; ++i) task(context, i);
      return;
    }
    while (static_cast<int64_t>(workers_.size()) < threads - 1) {
      workers_.emplace_back(&ThreadPool::work, this, static_cast<int64_t>(workers_.size()), generation_.load());
    }
    bool sleepers;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      task_ = task;
      context_ = context;
      n_tasks_ = n_tasks;
      next_.store(0, std::memory_order_relaxed);
      helpers_ = threads - 1;
      running_.store(threads - 1, std::memory_order_relaxed);
      generation_.fetch_add(1, std::memory_order_release);
      sleepers = sleepers_ > 0;
    }
    if (sleepers) wake_.notify_all();
    drain();
    const auto done = [&] { return running_.load(std::memory_order_acquire) == 0; };
    if (!spin_until(done)) {
      std::unique_lock<std::mutex> lock(mutex_);
      done_.wait(lock, done);
    }
    if (failed_.exchange(false)) {
      std::exception_ptr error = error_;
      error_ = nullptr;
      std::rethrow_exception(error);
    }
  }

 private:
  static long process_id() {
#ifdef _WIN32
    return 0;
#else
    return static_cast<long>(getpid());
#endif
  }

  void drain() {
    try {
      for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < n_tasks_;) task_(context_, i);
    } catch (...) {
      next_.store(n_tasks_, std::memory_order_relaxed);
      std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
      failed_ = true;
    }
  }

  template <class Ready>
  static bool spin_until(const Ready& ready) {
    constexpr auto SPIN = std::chrono::microseconds(50);
    constexpr int LOOKS = 64;  // between two looks at the clock: about a microsecond
    const auto start = std::chrono::steady_clock::now();
    do {
      for (int i = 0; i < LOOKS; ++i) {
        if (ready()) return true;
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#endif
      }
    } while (std::chrono::steady_clock::now() - start < SPIN);
    return ready();
  }

  void work(int64_t index, uint64_t seen) {
    const auto news = [&] { return generation_.load(std::memory_order_acquire) != seen; };
    for (;;) {
      spin_until(news);
      std::unique_lock<std::mutex> lock(mutex_);
      ++sleepers_;
      wake_.wait(lock, news);
      --sleepers_;
      seen = generation_.load(std::memory_order_relaxed);
      if (index >= helpers_) continue;
      lock.unlock();
      drain();
      if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        lock.lock();  // the caller either has not looked yet, or sleeps: never in between
        done_.notify_one();
      }
    }
  }

  std::mutex callers_;  // held while a parallel_for runs
  std::mutex mutex_;    // guards everything below but the atomic ones
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  std::atomic<int64_t> next_{0};
  Task task_ = nullptr;
  const void* context_ = nullptr;
  int64_t n_tasks_ = 0;
  int64_t helpers_ = 0;  // workers that take part in this generation
  int64_t sleepers_ = 0;
  std::atomic<int64_t> running_{0};  // of them, those that are not done
  std::atomic<uint64_t> generation_{0};
  std::exception_ptr error_;
  std::atomic<bool> failed_{false};  // there is one
};

}  // namespace detail

// Run fn(0) … fn(n_tasks - 1) on up to num_threads threads, the caller included; return when all are done.
template <class Fn>
void parallel_for(int64_t n_tasks, int num_threads, const Fn& fn) {
  detail::ThreadPool::instance().run(
      n_tasks, num_threads, [](const void* context, int64_t task) { (*static_cast<const Fn*>(context))(task); }, &fn);
}

}  // namespace s2d
