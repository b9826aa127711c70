// Runs a launch: one fiber a thread, scheduled on one OS thread between synchronisation points.
#include "memory.h"

namespace emu {

extern "C" Self emu_self = {};

namespace {

// Flags of a wait: metal::mem_flags, or a simdgroup operation that orders no memory.
constexpr uint32_t kOperation = 4;
constexpr size_t kStackBytes = 256 << 10;
char* stacks;

// Makes the next lane of the simdgroup the running one and returns its stack; the scheduler's after
// the last.
INLINE void* next_stack() {
  if (state.turn == state.lanes) return state.scheduler_sp;
  state.thread = state.simd * kLanes + state.order[state.turn++];
  state.fiber = &fibers[state.thread];
  state.linear = state.group_first + state.thread;
  emu_self.lane = state.thread % kLanes;
  emu_self.thread = state.thread;
  if (state.launch->count) visits.clear();
  return state.fiber->sp;
}

// Waiting hands the processor to the next lane; `site` tells one place in the text from another.
INLINE void wait(FiberState kind, Resolve resolve, const char* what, uint32_t flags, int line,
                 const void* site) {
  Fiber& f = *state.fiber;
  f.state = kind;
  f.resolve = resolve;
  f.what = what;
  f.flags = flags;
  f.line = line;
  f.site = site;
  emu_switch(&f.sp, next_stack());
}

void fiber_main() {
  state.launch->entry(state.launch->buffers, &attributes[state.thread]);
  Fiber& f = *state.fiber;
  f.state = kDone;
  emu_switch(&f.sp, next_stack());
  __builtin_unreachable();
}

bool failed() { return state.launch->fault.kind != kNone; }

// Reports a fault from the scheduler, on behalf of a waiting thread.
void divergence(Fiber& at, const char* how) {
  Fault& f = state.launch->fault;
  f.kind = kDivergence;
  f.line = at.line;
  f.index = -1;
  f.buffer[0] = 0;
  snprintf(f.message, sizeof f.message, "%s in divergent flow: %s", at.what, how);
  uint3 p = attributes[&at - fibers].thread_position_in_grid;
  f.thread[0] = p.x, f.thread[1] = p.y, f.thread[2] = p.z;
}

// Checks that `other` waits where `first` waits.
bool together(Fiber& first, Fiber& other, const char* whose) {
  char how[256];
  if (other.state == kDone) {
    snprintf(how, sizeof how, "another thread of the %s has returned", whose);
  } else if (other.state != first.state || other.site != first.site) {
    snprintf(how, sizeof how, "another thread of the %s waits at %s, line %d", whose, other.what,
             other.line);
  } else if (other.operands != first.operands) {
    snprintf(how, sizeof how, "another thread of the %s multiplies other tensors", whose);
  } else if (other.trace != first.trace) {
    snprintf(how, sizeof how, "another thread of the %s did not execute the same %s before it",
             whose, first.mark ? first.mark : other.mark);
  } else {
    return true;
  }
  divergence(first, how);
  return false;
}

void shuffle(uint32_t* order, uint32_t n) {
  switch (state.launch->schedule) {
    case kForward:
      for (uint32_t i = 0; i < n; i++) order[i] = i;
      break;
    case kBackward:
      for (uint32_t i = 0; i < n; i++) order[i] = n - 1 - i;
      break;
    default:
      for (uint32_t i = 0; i < n; i++) {
        uint32_t j = random_below(i + 1);
        order[i] = order[j];
        order[j] = i;
      }
  }
}

// Runs the lanes of a simdgroup up to their next synchronisation and, if that is a simdgroup
// operation, carries it out. True if the simdgroup can go on.
bool step(uint32_t simd, uint32_t threads) {
  uint32_t first = simd * kLanes;
  uint32_t lanes = threads - first < kLanes ? threads - first : kLanes;
  if (fibers[first].state != kReady) return false;
  state.simd = simd;
  emu_self.lanes = lanes;
  emu_self.exchange = simds[simd].exchange[simds[simd].parity];
  if (state.launch->count) touched.clear();
  shuffle(state.order, lanes);
  state.lanes = lanes;
  state.turn = 0;
  emu_switch(&state.scheduler_sp, next_stack());
  if (failed()) return false;
  Fiber* waiting = nullptr;
  for (uint32_t i = 0; i < lanes && !waiting; i++) {
    if (fibers[first + i].state != kDone) waiting = &fibers[first + i];
  }
  if (!waiting) {
    for (uint32_t i = 1; i < lanes; i++) {
      if (fibers[first + i].trace == fibers[first].trace) continue;
      Fiber& f = fibers[fibers[first].mark ? first : first + i];
      f.what = f.mark;
      f.line = f.mark_line;
      divergence(f, "another thread of the simdgroup did not execute it");
      return false;
    }
    return false;
  }
  for (uint32_t i = 0; i < lanes; i++) {
    if (!together(*waiting, fibers[first + i], "simdgroup")) return false;
  }
  if (waiting->state == kAtBarrier) return false;
  if (waiting->flags & 2) simds[simd].epoch = ++state.simd_epochs;
  if (waiting->resolve) waiting->resolve(emu_self.exchange, lanes);
  simds[simd].parity ^= 1;
  Counts& counts = state.launch->counts;
  (waiting->flags & kOperation ? counts.simd_operations : counts.simd_barriers)++;
  for (uint32_t i = 0; i < lanes; i++) {
    fibers[first + i].state = kReady;
    fibers[first + i].trace = fibers[first + i].operands = 0;
    fibers[first + i].mark = nullptr;
  }
  return true;
}

void new_epoch(uint32_t flags) {
  if (flags & 1) state.device_epoch++;
  if (flags & 2) state.shared_epoch++;
}

// Runs a threadgroup to its end, barrier by barrier.
void run_threads(uint32_t threads) {
  uint32_t n_simds = (threads + kLanes - 1) / kLanes, order[kMaxSimds];
  new_epoch(3);
  state.shared_base = state.shared_epoch;
  state.device_base = state.device_epoch;
  while (true) {
    // In random order simdgroups take turns at each simdgroup operation; else each runs on to the
    // barrier.
    for (bool going = true; going;) {
      going = false;
      shuffle(order, n_simds);
      for (uint32_t i = 0; i < n_simds; i++) {
        while (step(order[i], threads)) {
          going = true;
          if (state.launch->schedule == kRandom) break;
        }
        if (failed()) return;
      }
    }
    Fiber* waiting = nullptr;
    for (uint32_t i = 0; i < n_simds && !waiting; i++) {
      if (fibers[i * kLanes].state == kAtBarrier) waiting = &fibers[i * kLanes];
    }
    if (!waiting) return;
    for (uint32_t i = 0; i < threads; i++) {
      Fiber& f = fibers[i];
      if (!together(*waiting, f, "threadgroup")) return;
    }
    for (uint32_t i = 0; i < threads; i++) {
      fibers[i].state = kReady;
      fibers[i].trace = fibers[i].operands = 0;
      fibers[i].mark = nullptr;
    }
    state.launch->counts.barriers++;
    new_epoch(waiting->flags);
  }
}

uint32_t ceil_div(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

// Sets up the fibers of the threadgroup at `group`; returns how many threads it has.
uint32_t start_threads(uint3 group, uint3 groups) {
  const Launch& launch = *state.launch;
  uint3 grid(launch.grid[0], launch.grid[1], launch.grid[2]);
  uint3 full(launch.threadgroup[0], launch.threadgroup[1], launch.threadgroup[2]);
  uint3 size = metal::vec<uint, 3>(0u);
  for (int d = 0; d < 3; d++) {
    uint32_t left = grid[d] - group[d] * full[d];
    size[d] = left < full[d] ? left : full[d];
  }
  uint32_t threads = size.x * size.y * size.z, all = full.x * full.y * full.z;
  Attributes a = {};
  a.dispatch_threads_per_threadgroup = full;
  a.grid_origin = uint3(0u);
  a.grid_size = a.threads_per_grid = grid;
  a.threadgroup_position_in_grid = group;
  a.threadgroups_per_grid = groups;
  a.threads_per_threadgroup = size;
  a.dispatch_quadgroups_per_threadgroup = ceil_div(all, 4);
  a.dispatch_simdgroups_per_threadgroup = ceil_div(all, kLanes);
  a.quadgroups_per_threadgroup = ceil_div(threads, 4);
  a.simdgroups_per_threadgroup = ceil_div(threads, kLanes);
  a.thread_execution_width = a.threads_per_simdgroup = kLanes;
  for (uint32_t i = 0; i < threads; i++) {
    uint3 p(i % size.x, i / size.x % size.y, i / (size.x * size.y));
    a.thread_position_in_threadgroup = p;
    a.thread_position_in_grid =
        uint3(group.x * full.x + p.x, group.y * full.y + p.y, group.z * full.z + p.z);
    a.thread_index_in_threadgroup = i;
    a.thread_index_in_simdgroup = i % kLanes;
    a.simdgroup_index_in_threadgroup = i / kLanes;
    a.thread_index_in_quadgroup = i % 4;
    a.quadgroup_index_in_threadgroup = i / 4;
    Fiber& f = fibers[i];
    attributes[i] = a;
    f.state = kReady;
    f.trace = f.operands = 0;
    f.mark = nullptr;
    // The odd offset keeps the tops of the stacks out of one set of the cache.
    f.sp = fiber_stack(stacks + (i + 1) * kStackBytes - (i % 31) * 192 / 16 * 16, fiber_main);
  }
  for (uint32_t s = 0; s < ceil_div(threads, kLanes); s++) {
    simds[s].epoch = ++state.simd_epochs;
    simds[s].parity = 0;
  }
  return threads;
}

}  // namespace

extern "C" {

// The site is the address in the kernel that the call returns to.
void emu_barrier(uint32_t flags, int line) {
  wait(kAtBarrier, nullptr, "threadgroup_barrier", flags, line, __builtin_return_address(0));
}

void emu_simd_barrier(uint32_t flags, int line) {
  wait(kAtSimd, nullptr, "simdgroup_barrier", flags, line, __builtin_return_address(0));
}

void emu_simd_wait(Resolve resolve, const char* what, int line) {
  wait(kAtSimd, resolve, what, kOperation, line, __builtin_return_address(0));
}

// All threads of the execution scope meet: of one simdgroup, or of the whole threadgroup.
void emu_tensor_wait(uint32_t simdgroups, uint64_t operands, const char* what, int line) {
  uint32_t all = attributes[state.thread].simdgroups_per_threadgroup;
  if (simdgroups != 1 && simdgroups != all) {
    fault(kScope, nullptr, -1, line, "%s of %u simdgroups in a threadgroup of %u", what, simdgroups,
          all);
  }
  if (emu_self.lanes != kLanes) emu_lane_fault(what, kLanes - 1, line);
  state.fiber->operands = operands;
  const void* site = __builtin_return_address(0);
  if (simdgroups == 1) {
    wait(kAtSimd, nullptr, what, kOperation, line, site);
  } else {
    wait(kAtBarrier, nullptr, what, 0, line, site);
  }
}

void emu_multiply_accumulate(char* exchange, uint32_t) {
  MatrixProduct& p = *reinterpret_cast<MatrixProduct*>(exchange);
  for (int i = 0; i < 8; i++) {
    for (int k = 0; k < 8; k++) p.d[i] += p.a[i][k] * p.b[k];
  }
}

void emu_simd_mark(const char* what, int line) {
  Fiber& f = *state.fiber;
  f.trace = mix(f.trace + reinterpret_cast<uint64_t>(__builtin_return_address(0)));
  f.mark = what;
  f.mark_line = line;
}

EXPORT void emu_run(Launch* launch) {
  // 256 MB that the system maps page by page, as stacks touch them.
  if (!stacks) stacks = static_cast<char*>(calloc(kMaxThreads, kStackBytes));
  state.launch = launch;
  state.random = launch->seed * 0x9e3779b97f4a7c15u + 1;
  emu_self.macs = emu_self.matrix_loads = emu_self.matrix_products = 0;
  emu_self.layout = launch->seed + 101 * (launch->schedule + 1);
  shared.used = shared.used_marks = 0;
  for (Buffer& b : shared.variables) b = {};
  launch->counts = {};
  launch->fault.kind = kNone;

  uint3 groups(ceil_div(launch->grid[0], launch->threadgroup[0]),
               ceil_div(launch->grid[1], launch->threadgroup[1]),
               ceil_div(launch->grid[2], launch->threadgroup[2]));
  uint32_t n = groups.x * groups.y * groups.z;
  uint32_t* order = static_cast<uint32_t*>(calloc(n, sizeof(uint32_t)));
  shuffle(order, n);
  uint32_t sample = launch->sample && launch->sample < n ? launch->sample : n;
  state.group_first = 1;
  for (uint32_t i = 0; i < sample && !failed(); i++) {
    uint32_t g = order[uint64_t(i) * n / sample];
    uint32_t threads = start_threads(
        uint3(g % groups.x, g / groups.x % groups.y, g / (groups.x * groups.y)), groups);
    run_threads(threads);
    state.group_first += threads;
  }
  free(order);

  Counts& counts = launch->counts;
  counts.macs = emu_self.macs;
  counts.matrix_loads = emu_self.matrix_loads / kLanes;
  counts.matrix_products = emu_self.matrix_products / kLanes;
  counts.threadgroup_memory = shared.used;
  for (const Buffer& b : shared.variables) {
    counts.threadgroup_read += b.read;
    counts.threadgroup_written += b.written;
  }
}
}

}  // namespace emu
