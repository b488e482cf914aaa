// Runs the threads of a block as fibers, warp by warp, each until it waits for others, and says when they can never come. Stricter than a GPU: a thread that
// has ended while others wait for it is an error, and so are two barriers of different lines that would release one another.
//
// Buffers from emulated_memory end where a page without access begins; a thread that touches one is stopped, and the launch fails.
#pragma once

#include <csetjmp>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include "cuda_builtins.h"

Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr size_t STACK_BYTES = 128 << 10, PAGE = 4096;
constexpr unsigned char UNTOUCHED = 0xa5;
constexpr int WARP_LANES = 32;

// ---- fibers --------------------------------------------------------------------------------------------------------------------------

#ifdef __x86_64__
// Saves what a function must keep for its caller, and the stack: swapcontext would ask the system for its signal mask every time.
extern "C" void emulated_switch(void** save, void* load);
asm(R"(
.text
.globl emulated_switch
.hidden emulated_switch
.type emulated_switch, @function
emulated_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulated_switch, .-emulated_switch
)");

struct Context {
  void* stack = nullptr;
  void start(char* low, void (*entry)()) {
    void** top = reinterpret_cast<void**>(low + STACK_BYTES) - 2;
    *top = reinterpret_cast<void*>(entry);  // where the first switch returns to, with the stack as after a call
    stack = top - 6;
  }
  void switch_to(Context& other) { emulated_switch(&stack, other.stack); }
};
#else
struct Context {
  ucontext_t context;
  void start(char* low, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = low;
    context.uc_stack.ss_size = STACK_BYTES;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  void switch_to(Context& other) { swapcontext(&context, &other.context); }
};
#endif

enum State { READY, WAITING, ENDED };

struct Fiber {
  Context context;
  State state;
  int what, lane, line;
  unsigned mask;
  uint64_t value, result;
};

struct Machine {
  Context scheduler;
  std::vector<Fiber> fibers;
  char* stacks = nullptr;
  size_t num_stacks = 0;
  int current = 0;
  void (*thread)(void*) = nullptr;
  void* arguments = nullptr;
  std::string error;
};
Machine machine;

void run_thread() {
  machine.thread(machine.arguments);
  Fiber& me = machine.fibers[machine.current];
  me.state = ENDED;
  me.context.switch_to(machine.scheduler);
}

const char* const NAMES[] = {"__syncthreads", "__syncthreads_and", "__syncwarp", "__ballot_sync", "__any_sync", "__all_sync", "a shuffle"};

std::string place(int thread) {
  return "thread " + std::to_string(thread) + " of block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
         std::to_string(blockIdx.z) + ")";
}

std::string describe(int thread) {
  const Fiber& f = machine.fibers[thread];
  if (f.state == ENDED) return place(thread) + " has ended";
  return place(thread) + " waits at " + NAMES[f.what] + " in line " + std::to_string(f.line);
}

bool is_of_block(int what) { return what == SYNC_BLOCK || what == SYNC_BLOCK_AND; }

// Release `first` and those that it waits for, if all of them are there.
bool release(int first) {
  const Fiber& asking = machine.fibers[first];
  const bool block = is_of_block(asking.what);
  const int begin = block ? 0 : first / WARP_LANES * WARP_LANES, size = static_cast<int>(machine.fibers.size());
  const int end = block ? size : std::min(size, begin + WARP_LANES);
  const auto takes_part = [&](int thread) { return block || (asking.mask >> (thread - begin) & 1); };
  if (!takes_part(first)) {
    machine.error = describe(first) + ", but is not in its own mask";
    return false;
  }
  uint64_t bits = 0;
  bool all = true;
  for (int t = begin; t < end; ++t) {
    const Fiber& f = machine.fibers[t];
    if (!takes_part(t)) continue;
    if (f.state != WAITING || f.what != asking.what || f.line != asking.line || f.mask != asking.mask) return false;
    bits |= (f.value & 1) << (t - begin) % 64;
    all = all && f.value;
  }
  for (int t = begin; t < end; ++t) {
    if (!takes_part(t)) continue;
    Fiber& f = machine.fibers[t];
    if (f.what == SHUFFLE && (begin + f.lane >= end || !takes_part(begin + f.lane))) {
      machine.error = describe(t) + " for the value of a lane that takes no part";
      return false;
    }
    f.state = READY;
    f.result = f.what == SHUFFLE ? machine.fibers[begin + f.lane].value
               : f.what == ALL || f.what == SYNC_BLOCK_AND ? all
               : f.what == ANY                             ? bits != 0
                                                           : bits;
  }
  return true;
}

// Run a warp until it waits for other warps. The others stand still meanwhile: a value that should have waited for them is then missing.
// Returns false after an error.
bool run_warp(unsigned warp, unsigned threads, bool backwards) {
  const unsigned begin = warp * WARP_LANES, count = std::min<unsigned>(WARP_LANES, threads - begin);
  for (bool released = true; released;) {
    for (unsigned i = 0; i < count; ++i) {
      const unsigned t = begin + (backwards ? count - 1 - i : i);
      if (machine.fibers[t].state != READY) continue;
      machine.current = static_cast<int>(t);
      threadIdx = {t, 0, 0};
      machine.scheduler.switch_to(machine.fibers[t].context);
    }
    released = false;
    for (unsigned t = begin; t < begin + count; ++t) {
      if (machine.fibers[t].state == WAITING && !is_of_block(machine.fibers[t].what)) released |= release(static_cast<int>(t));
      if (!machine.error.empty()) return false;
    }
  }
  return true;
}

// Returns false after an error.
bool run_block(unsigned threads, bool backwards) {
  const size_t pitch = STACK_BYTES + PAGE;
  if (machine.num_stacks < threads) {
    if (machine.stacks) munmap(machine.stacks, machine.num_stacks * pitch);
    machine.stacks = static_cast<char*>(mmap(nullptr, threads * pitch, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    machine.num_stacks = threads;
    for (unsigned t = 0; t < threads; ++t) mprotect(machine.stacks + t * pitch, PAGE, PROT_NONE);
  }
  machine.fibers.assign(threads, Fiber{});
  for (unsigned t = 0; t < threads; ++t) machine.fibers[t].context.start(machine.stacks + t * pitch + PAGE, run_thread);
  const unsigned warps = (threads + WARP_LANES - 1) / WARP_LANES;
  for (;;) {
    for (unsigned i = 0; i < warps; ++i) {
      if (!run_warp(backwards ? warps - 1 - i : i, threads, backwards)) return false;
    }
    bool released = false;
    int waiting = -1;
    for (unsigned t = 0; t < threads; ++t) {
      if (machine.fibers[t].state != WAITING) continue;
      waiting = static_cast<int>(t);
      released |= release(waiting);
      if (!machine.error.empty()) return false;
    }
    if (waiting < 0 && !released) return true;
    if (!released) {
      machine.error = "threads wait for one another for ever: " + describe(waiting);
      for (unsigned t = 0; t < threads; ++t) {
        const Fiber &f = machine.fibers[t], &w = machine.fibers[waiting];
        const bool asked = is_of_block(w.what) || (t / WARP_LANES == waiting / WARP_LANES && (w.mask >> t % WARP_LANES & 1));
        if (asked && (f.state == ENDED || f.what != w.what || f.line != w.line)) {
          machine.error += "; " + describe(static_cast<int>(t));
          break;
        }
      }
      return false;
    }
  }
}

// ---- memory --------------------------------------------------------------------------------------------------------------------------

struct Mapping {
  char* begin;
  size_t bytes;      // of the pages that can be touched
  size_t asked, at;  // what was asked for begins `at` bytes behind `begin`
};
std::vector<Mapping> mappings;

sigjmp_buf after_fault;

void on_fault(int, siginfo_t* info, void*) {
  const char* address = static_cast<const char*>(info->si_addr);
  // Of a vector that is not aligned, some processors tell no address.
  machine.error = place(machine.current) + " reads or writes where nothing is, or at no multiple of the size of what is read";
  for (size_t i = 0; i < mappings.size(); ++i) {
    const Mapping& m = mappings[i];
    if (address < m.begin - PAGE || address >= m.begin + m.bytes + PAGE) continue;
    machine.error = place(machine.current) + " reads or writes at byte " + std::to_string(address - (m.begin + m.at)) + " of a buffer of " +
                    std::to_string(m.asked) + " bytes";
  }
  siglongjmp(after_fault, 1);
}

}  // namespace

extern "C" uint64_t emulated_together(int what, unsigned mask, uint64_t value, int lane, int line) {
  Fiber& me = machine.fibers[machine.current];
  me.state = WAITING;
  me.what = what, me.mask = mask, me.value = value, me.lane = lane, me.line = line;
  me.context.switch_to(machine.scheduler);
  return me.result;
}

extern "C" int emulated_launch(void (*thread)(void*), void* arguments, const Launch* launch) {
  static std::vector<char> signal_stack(64 << 10);
  stack_t previous_stack, stack = {};
  stack.ss_sp = signal_stack.data();
  stack.ss_size = signal_stack.size();
  struct sigaction action = {}, previous[2];
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaltstack(&stack, &previous_stack);
  sigaction(SIGSEGV, &action, &previous[0]);
  sigaction(SIGBUS, &action, &previous[1]);
  machine.thread = thread;
  machine.arguments = arguments;
  machine.error.clear();
  gridDim = {launch->grid[0], launch->grid[1], launch->grid[2]};
  blockDim = {launch->threads, 1, 1};
  if (sigsetjmp(after_fault, 1) == 0) {
    const uint64_t blocks = uint64_t{gridDim.x} * gridDim.y * gridDim.z;
    for (uint64_t i = 0; i < blocks; ++i) {
      const uint64_t b = launch->backwards ? blocks - 1 - i : i;
      blockIdx = {static_cast<unsigned>(b % gridDim.x), static_cast<unsigned>(b / gridDim.x % gridDim.y),
                  static_cast<unsigned>(b / gridDim.x / gridDim.y)};
      if (!run_block(launch->threads, launch->backwards)) break;
    }
  }
  sigaction(SIGSEGV, &previous[0], nullptr);
  sigaction(SIGBUS, &previous[1], nullptr);
  sigaltstack(&previous_stack, nullptr);
  return !machine.error.empty();
}

extern "C" __attribute__((visibility("default"))) const char* emulated_error() { return machine.error.c_str(); }

// Memory between two pages without access, on 16 bytes, as near to the second as that allows; every byte is 0xff (floats: not a number).
extern "C" __attribute__((visibility("default"))) void* emulated_memory(size_t bytes) {
  const size_t padded = (bytes + 15) / 16 * 16, inner = (padded + PAGE - 1) / PAGE * PAGE;
  char* pages = static_cast<char*>(mmap(nullptr, inner + 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (pages == MAP_FAILED) return nullptr;
  char* begin = pages + PAGE;
  std::memset(begin, UNTOUCHED, inner);
  std::memset(begin + inner - padded, 0xff, bytes);
  mprotect(pages, PAGE, PROT_NONE);
  mprotect(begin + inner, PAGE, PROT_NONE);
  mappings.push_back({begin, inner, bytes, inner - padded});
  return begin + inner - padded;
}

// Whether nothing was written around a buffer.
extern "C" __attribute__((visibility("default"))) int emulated_intact(const void* buffer) {
  for (const Mapping& m : mappings) {
    if (m.begin + m.at != buffer) continue;
    for (size_t i = 0; i < m.bytes; ++i) {
      if ((i < m.at || i >= m.at + m.asked) && static_cast<unsigned char>(m.begin[i]) != UNTOUCHED) return 0;
    }
  }
  return 1;
}

extern "C" __attribute__((visibility("default"))) void emulated_free(void* buffer) {
  for (size_t i = 0; i < mappings.size(); ++i) {
    if (mappings[i].begin + mappings[i].at != buffer) continue;
    munmap(mappings[i].begin - PAGE, mappings[i].bytes + 2 * PAGE);
    mappings.erase(mappings.begin() + static_cast<long>(i));
    return;
  }
}
