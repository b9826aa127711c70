#pragma once

struct Nothing {
  __device__ __forceinline__ void operator()(int) const {}
};

// Stages that some threads copy for the tensor cores of others. A thread shows its copies of a
// stage when it has begun those of LAG stages more, so that it need not wait for them.
template <int STAGES, int LAG>
struct Copier {
  unsigned long long* full;   // barriers: a stage is there,
  unsigned long long* empty;  // or has been read
  Ring ring{STAGES};
  Ring shown{STAGES};
  int under_way = 0;
  // Begin a stage, and return its buffer.
  __device__ __forceinline__ int begin() {
    wait_barrier(empty + ring.buffer, ring.parity ^ 1);
    return ring.buffer;
  }
  __device__ __forceinline__ void end() { end(Nothing()); }
  __device__ __forceinline__ void finish() { finish(Nothing()); }
  // The same, and work(buffer) on what this thread has copied, before it is shown.
  template <typename Work>
  __device__ __forceinline__ void end(Work work) {
    commit_copies();
    ring.advance();
    if (++under_way > LAG) {
      wait_copies<LAG>();
      show(work);
    }
  }
  template <typename Work>
  __device__ __forceinline__ void finish(Work work) {
    wait_copies<0>();
    while (under_way) {
      show(work);
    }
  }
  template <typename Work>
  __device__ __forceinline__ void show(Work work) {
    work(shown.buffer);
    show_copies();
    arrive(full + shown.buffer);
    shown.advance();
    under_way--;
  }
};
