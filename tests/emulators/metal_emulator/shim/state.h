// The state of one launch, and how it ends early: a fault.
#pragma once
#include <stdarg.h>

#include "runtime.h"
#include "switch.h"

// The C library comes with the Python process; its headers need not be there.
extern "C" {
int snprintf(char*, size_t, const char*, ...);
int vsnprintf(char*, size_t, const char*, va_list);
void* calloc(size_t, size_t);
void free(void*);
}

namespace emu {

struct Fault {
  uint32_t kind;
  int32_t line;        // of the Metal source, 0 if unknown
  int64_t index;       // element, -1 if none
  uint32_t thread[3];  // thread_position_in_grid
  char buffer[64];
  char message[384];
};

struct Counts {
  int64_t threadgroup_read, threadgroup_written, macs, matrix_loads, matrix_products, barriers,
      simd_barriers, simd_operations, threadgroup_memory;
};

enum Schedule : uint32_t { kForward, kBackward, kRandom };

struct Launch {
  void (*entry)(Buffer* const*, const Attributes*);
  Buffer** buffers;
  uint32_t grid[3], threadgroup[3];
  uint32_t schedule, seed;
  uint32_t count, single_writer;
  uint32_t sample;  // threadgroups to run, 0 for all
  Fault fault;
  Counts counts;
};

constexpr uint32_t kLanes = 32, kMaxThreads = 1024, kMaxSimds = kMaxThreads / kLanes;

enum FiberState : uint8_t { kReady, kAtSimd, kAtBarrier, kDone };

struct Fiber {
  void* sp;
  FiberState state;
  uint32_t flags;     // of the barrier it waits at
  int line;           // of the operation it waits at
  const char* what;   // its name
  const void* site;   // its call's address
  uint64_t operands;  // hash of the tensors that it multiplies, 0 for all else
  Resolve resolve;
  uint64_t trace;    // hash of the simdgroup operations that need no waiting
  const char* mark;  // the last of those
  int mark_line;
};

// Orders memory accesses within one simdgroup: replaced at each of its simdgroup barriers.
struct Simd {
  uint32_t epoch;
  uint32_t parity;
  alignas(64) char exchange[2][1024];
};

struct State {
  Launch* launch;
  void* scheduler_sp;
  Fiber* fiber;                         // running
  uint32_t thread, simd;                // its index in the threadgroup, and its simdgroup's
  uint32_t order[kLanes], lanes, turn;  // the order that the simdgroup's lanes run in
  uint32_t linear;                      // 1 + its index over all threadgroups
  uint32_t group_first;                 // linear of the threadgroup's first thread
  // Epochs never restart, so a mark left by an older threadgroup or launch reads as stale.
  uint32_t shared_base, shared_epoch;  // of threadgroup memory: at group start, and now
  uint32_t device_base, device_epoch;  // of device memory
  uint32_t simd_epochs;
  uint64_t random;
};

inline State state;
inline Fiber fibers[kMaxThreads];
inline Attributes attributes[kMaxThreads];
inline Simd simds[kMaxSimds];

[[noreturn, gnu::format(printf, 5, 6)]] inline void fault(FaultKind kind, const Buffer* buffer,
                                                          int64_t index, int line,
                                                          const char* format, ...) {
  Fault& f = state.launch->fault;
  f.kind = kind;
  f.line = line;
  f.index = index;
  snprintf(f.buffer, sizeof f.buffer, "%s", buffer ? buffer->name : "");
  va_list args;
  va_start(args, format);
  vsnprintf(f.message, sizeof f.message, format, args);
  va_end(args);
  uint3 p = attributes[state.thread].thread_position_in_grid;
  f.thread[0] = p.x, f.thread[1] = p.y, f.thread[2] = p.z;
  emu_switch(&state.fiber->sp, state.scheduler_sp);  // never comes back
  __builtin_unreachable();
}

inline uint32_t random_below(uint32_t n) {
  state.random = state.random * 6364136223846793005u + 1442695040888963407u;
  return uint32_t(((state.random >> 32) * n) >> 32);
}

}  // namespace emu
