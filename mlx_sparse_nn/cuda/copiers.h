#pragma once

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
  __device__ __forceinline__ void end() {
    commit_copies();
    ring.advance();
    if (++under_way > LAG) {
      wait_copies<LAG>();
      show();
    }
  }
  __device__ __forceinline__ void finish() {
    wait_copies<0>();
    while (under_way) {
      show();
    }
  }
  __device__ __forceinline__ void show() {
    show_copies();
    arrive(full + shown.buffer);
    shown.advance();
    under_way--;
  }
};
