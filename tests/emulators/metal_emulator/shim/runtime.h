// What a compiled kernel and the runtime share: buffers, thread attributes, and the calls that
// every memory access, barrier and simdgroup operation goes through.
#pragma once
#include "types.h"

namespace emu {

#define EXPORT __attribute__((visibility("default")))

struct Buffer {
  const char* name;
  char* base;
  int64_t size;           // bytes
  uint32_t item;          // bytes of one element: the unit of messages
  uint32_t shift;         // the shadow keeps one mark for every 1 << shift bytes
  uint32_t kind;          // BufferKind
  uint32_t skew;          // address modulo 16
  uint32_t initialised;   // an output filled with init_value
  void* shadow;           // OutputMark (output) or SharedMark (threadgroup) for each of those
  int64_t read, written;  // bytes counted
};

enum FaultKind : uint32_t {
  kNone,
  kOutOfBounds,
  kMisaligned,
  kReadOnly,
  kUninitialised,
  kWrittenTwice,
  kRace,
  kDivergence,
  kUndefinedLane,
  kThreadgroupMemory,
  kArithmetic,
  kNotModelled,
  kScope,
};

enum BufferKind : uint32_t { kInput, kOutput, kThreadgroup };

struct Attributes {
  uint3 dispatch_threads_per_threadgroup, grid_origin, grid_size, thread_position_in_grid,
      thread_position_in_threadgroup, threadgroup_position_in_grid, threadgroups_per_grid,
      threads_per_grid, threads_per_threadgroup;
  uint dispatch_quadgroups_per_threadgroup, dispatch_simdgroups_per_threadgroup,
      quadgroup_index_in_threadgroup, quadgroups_per_threadgroup, simdgroup_index_in_threadgroup,
      simdgroups_per_threadgroup, thread_execution_width, thread_index_in_quadgroup,
      thread_index_in_simdgroup, thread_index_in_threadgroup, threads_per_simdgroup;
};

// The running thread, kept up to date by the scheduler.
struct Self {
  uint32_t lane;    // thread_index_in_simdgroup
  uint32_t lanes;   // threads in this simdgroup: 32 but for the last of a threadgroup
  char* exchange;   // 1 KB that the lanes of the simdgroup share during one simdgroup operation
  uint32_t thread;  // thread_index_in_threadgroup
  uint32_t layout;  // of cooperative tensors: another in each schedule
  // Of the launch: multiply-accumulates, and lanes that loaded or multiplied a matrix.
  int64_t macs, matrix_loads, matrix_products;
};

// Runs once all lanes have arrived at a simdgroup operation, on what they left in `exchange`.
using Resolve = void (*)(char* exchange, uint32_t lanes);

// The operands of simdgroup_multiply_accumulate in `exchange`, by rows.
struct MatrixProduct {
  typedef float Row __attribute__((vector_size(32)));
  Row a[8], b[8], d[8];
};

extern "C" {
EXPORT extern Self emu_self;
EXPORT const void* emu_read(Buffer*, int64_t offset, uint32_t size, uint32_t align, int line);
EXPORT void* emu_write(Buffer*, int64_t offset, uint32_t size, uint32_t align, int line);
EXPORT Buffer* emu_threadgroup(int id, const char* name, uint32_t size, uint32_t item, int line);
EXPORT CONVERGENT void emu_barrier(uint32_t flags, int line);
EXPORT CONVERGENT void emu_simd_barrier(uint32_t flags, int line);
EXPORT CONVERGENT void emu_simd_wait(Resolve, const char* what, int line);
EXPORT void emu_multiply_accumulate(char* exchange, uint32_t lanes);
EXPORT CONVERGENT void emu_simd_mark(const char* what, int line);
EXPORT CONVERGENT void emu_tensor_wait(uint32_t simdgroups, uint64_t operands, const char* what,
                                       int line);
[[noreturn]] EXPORT void emu_tensor_fault(FaultKind, const Buffer*, int line, const char* what,
                                          int64_t got, int64_t limit);
[[noreturn]] EXPORT void emu_index_fault(Buffer*, int64_t index, int64_t length, int line);
[[noreturn]] EXPORT void emu_not_modelled(const char* what, int line);
[[noreturn]] EXPORT void emu_lane_fault(const char* what, int64_t lane, int line);
}

}  // namespace emu
