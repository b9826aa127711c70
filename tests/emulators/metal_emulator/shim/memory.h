// Checks on every access to device, constant and threadgroup memory.
#pragma once
#include "counts.h"

namespace emu {

// Who wrote an output's element: 1 + the thread's index in the launch, 0 for nobody.
struct OutputMark {
  uint32_t writer, epoch;
};

enum Readers : uint16_t { kOneThread, kOneSimd, kManySimds };

// Who touched an element of threadgroup memory last, and when. `epoch` changes at threadgroup
// barriers, `simd_epoch` at the simdgroup barriers of that thread's simdgroup.
struct SharedMark {
  uint32_t write_epoch, write_simd_epoch, read_epoch, read_simd_epoch;
  uint16_t writer, reader;
  Readers readers;
};

constexpr uint32_t kThreadgroupBytes = 32768, kMaxVariables = 64;

struct SharedMemory {
  alignas(64) char bytes[kThreadgroupBytes];
  SharedMark marks[kThreadgroupBytes];
  Buffer variables[kMaxVariables];
  uint32_t used, used_marks;
};
inline SharedMemory shared;

// True if nothing orders the running thread after an access of `other` in this epoch.
inline bool unordered(uint32_t other, uint32_t simd_epoch) {
  bool same_simd = other / kLanes == state.simd;
  return !(same_simd && simd_epoch != simds[state.simd].epoch);
}

inline int64_t element(const Buffer* b, int64_t mark) { return (mark << b->shift) / b->item; }

inline void check_shared_read(Buffer* b, int64_t i, int line) {
  SharedMark& m = static_cast<SharedMark*>(b->shadow)[i];
  if (m.write_epoch < state.shared_base) {
    fault(kUninitialised, b, element(b, i), line,
          "reads threadgroup memory that no thread has written");
  }
  if (m.write_epoch == state.shared_epoch && m.writer != state.thread &&
      unordered(m.writer, m.write_simd_epoch)) {
    fault(kRace, b, element(b, i), line,
          "reads what thread %u of the threadgroup wrote, with no barrier in between", m.writer);
  }
  uint32_t epoch = simds[state.simd].epoch;
  bool first = m.read_epoch != state.shared_epoch;
  if (first || m.reader == state.thread) {
    if (first) m.readers = kOneThread;
  } else if (m.reader / kLanes != state.simd) {
    m.readers = kManySimds;
  } else if (m.readers != kManySimds) {
    m.readers = m.read_simd_epoch == epoch ? kOneSimd : kOneThread;
  }
  m.read_epoch = state.shared_epoch;
  m.read_simd_epoch = epoch;
  m.reader = state.thread;
}

inline void check_shared_write(Buffer* b, int64_t i, int line) {
  SharedMark& m = static_cast<SharedMark*>(b->shadow)[i];
  if (m.write_epoch == state.shared_epoch && m.writer != state.thread &&
      unordered(m.writer, m.write_simd_epoch)) {
    fault(kRace, b, element(b, i), line,
          "overwrites what thread %u of the threadgroup wrote, with no barrier in between",
          m.writer);
  }
  if (m.read_epoch == state.shared_epoch &&
      (m.readers == kManySimds || ((m.readers == kOneSimd || m.reader != state.thread) &&
                                   unordered(m.reader, m.read_simd_epoch)))) {
    fault(kRace, b, element(b, i), line,
          "overwrites what thread %u of the threadgroup reads, with no barrier in between",
          m.reader);
  }
  m.write_epoch = state.shared_epoch;
  m.write_simd_epoch = simds[state.simd].epoch;
  m.writer = state.thread;
}

inline void check_output_read(Buffer* b, int64_t i, int line) {
  const OutputMark& m = static_cast<OutputMark*>(b->shadow)[i];
  if (m.writer == 0) {
    if (b->initialised) return;
    fault(kUninitialised, b, element(b, i), line,
          "reads an output element that no thread has written");
  }
  bool own_group = m.writer >= state.group_first && m.epoch >= state.device_base;
  if (m.writer != state.linear && !(own_group && m.epoch < state.device_epoch)) {
    fault(kRace, b, element(b, i), line,
          "reads what another thread wrote, with no barrier in between");
  }
}

inline void check_output_write(Buffer* b, int64_t i, int line) {
  OutputMark& m = static_cast<OutputMark*>(b->shadow)[i];
  if (m.writer != 0 && m.writer != state.linear && state.launch->single_writer) {
    fault(kWrittenTwice, b, element(b, i), line, "writes an element that another thread wrote");
  }
  m = {state.linear, state.device_epoch};
}

inline void check_place(Buffer* b, int64_t offset, uint32_t size, uint32_t align, const char* verb,
                        int line) {
  if (!b) fault(kOutOfBounds, b, -1, line, "%s through a null pointer", verb);
  int64_t index = offset / b->item - (offset % b->item < 0);
  if (offset < 0 || offset + int64_t(size) > b->size) {
    fault(kOutOfBounds, b, index, line, "%s %u bytes at element %ld, outside its %ld elements",
          verb, size, long(index), long(b->size / b->item));
  }
  if ((offset + b->skew) % align) {
    fault(kMisaligned, b, index, line,
          "%s a type of %u bytes at element %ld, which is not aligned to %u bytes%s", verb, size,
          long(index), align, b->skew % align ? " (the array itself is a slice that is not)" : "");
  }
}

extern "C" {

const void* emu_read(Buffer* b, int64_t offset, uint32_t size, uint32_t align, int line) {
  if (!b || offset < 0 || offset + size > b->size || (offset + b->skew) % align) {
    check_place(b, offset, size, align, "reads", line);
  }
  if (b->kind == kThreadgroup) {
    for (int64_t i = offset >> b->shift; i <= (offset + size - 1) >> b->shift; i++) {
      check_shared_read(b, i, line);
    }
    b->read += size;
  } else {
    if (b->kind == kOutput) {
      for (int64_t i = offset >> b->shift; i <= (offset + size - 1) >> b->shift; i++) {
        check_output_read(b, i, line);
      }
    }
    if (state.launch->count) {
      b->read += count_bytes(b, offset, size, __builtin_return_address(0));
    }
  }
  return b->base + offset;
}

void* emu_write(Buffer* b, int64_t offset, uint32_t size, uint32_t align, int line) {
  if (!b || offset < 0 || offset + size > b->size || (offset + b->skew) % align) {
    check_place(b, offset, size, align, "writes", line);
  }
  if (b->kind == kThreadgroup) {
    for (int64_t i = offset >> b->shift; i <= (offset + size - 1) >> b->shift; i++) {
      check_shared_write(b, i, line);
    }
    b->written += size;
  } else {
    if (b->kind == kInput) {
      fault(kReadOnly, b, offset / b->item, line, "writes to an input");
    }
    for (int64_t i = offset >> b->shift; i <= (offset + size - 1) >> b->shift; i++) {
      check_output_write(b, i, line);
    }
    if (state.launch->count) {
      b->written += count_bytes(b, offset, size, __builtin_return_address(0));
    }
  }
  return b->base + offset;
}

// The first thread that reaches a declaration allocates it, for the whole launch.
Buffer* emu_threadgroup(int id, const char* name, uint32_t size, uint32_t item, int line) {
  Buffer& b = shared.variables[id];
  if (b.base) return &b;
  uint32_t start = (shared.used + 15) / 16 * 16;
  uint32_t shift = uint32_t(__builtin_ctz(item));
  b = {name,
       shared.bytes + start,
       size,
       item,
       shift,
       kThreadgroup,
       0,
       0,
       shared.marks + shared.used_marks,
       0,
       0};
  shared.used_marks += size >> shift;
  shared.used = start + size;
  if (shared.used > kThreadgroupBytes) {
    fault(kThreadgroupMemory, &b, -1, line, "brings threadgroup memory to %u bytes, over %u",
          shared.used, kThreadgroupBytes);
  }
  return &b;
}

void emu_index_fault(Buffer* b, int64_t index, int64_t length, int line) {
  fault(kOutOfBounds, b, index, line, "index %ld is outside a dimension of %ld", long(index),
        long(length));
}

// Called by the sanitizer's checks in the kernel.
EXPORT void __ubsan_handle_out_of_bounds_minimal() {
  fault(kOutOfBounds, nullptr, -1, 0, "index outside an array of the thread's own");
}
EXPORT void __ubsan_handle_divrem_overflow_minimal() {
  fault(kArithmetic, nullptr, -1, 0, "integer division by zero");
}

// `what` is a format of two numbers.
[[noreturn]] void emu_tensor_fault(FaultKind kind, const Buffer* b, int line, const char* what,
                                   int64_t got, int64_t limit) {
  char message[256];
  snprintf(message, sizeof message, what, long(got), long(limit));
  fault(kind, b, -1, line, "%s", message);
}

void emu_not_modelled(const char* what, int line) {
  fault(kNotModelled, nullptr, -1, line, "%s", what);
}

void emu_lane_fault(const char* what, int64_t lane, int line) {
  fault(kUndefinedLane, nullptr, -1, line, "%s needs lane %ld of a simdgroup of %u", what,
        long(lane), emu_self.lanes);
}
}

}  // namespace emu
