#pragma once

// Barriers in shared memory between warps that copy and warps that compute: mbarrier of NVIDIA's
// PTX ISA. The phases of a barrier are numbered from 0. A phase ends when `count` threads have
// arrived in it.

__device__ __forceinline__ unsigned shared_address(const void* p) {
  return (unsigned)__cvta_generic_to_shared(p);
}

__device__ __forceinline__ void init_barrier(unsigned long long* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
}

__device__ __forceinline__ void arrive(unsigned long long* barrier) {
  const unsigned address = shared_address(barrier);
  asm volatile(
      "{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}\n" ::"r"(address)
      : "memory");
}

// Arrive once all asynchronous copies of this thread have landed.
__device__ __forceinline__ void arrive_copied(unsigned long long* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Wait for the end of the last phase whose number is `parity` modulo 2. Phase -1 has ended.
__device__ __forceinline__ void wait_barrier(unsigned long long* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nwaiting:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra waiting;\n}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// A place in a ring of buffers, each with its barriers.
struct Ring {
  const int stages;
  int buffer = 0;
  int parity = 0;
  __device__ __forceinline__ void advance() {
    if (++buffer == stages) {
      buffer = 0;
      parity ^= 1;
    }
  }
};

// Leave each thread of this warpgroup COUNT registers: fewer than it had, or more once others have
// given some back.
template <int COUNT>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
