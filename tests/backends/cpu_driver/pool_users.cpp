// Several threads share one pool, as streams of MLX do: each sums squares in many small jobs, of
// which one in eight comes after the pool has gone to sleep.

#include <stdint.h>
#include <stdio.h>

#include <chrono>
#include <thread>
#include <vector>

#include "pool.h"

using namespace mlx_sparse_nn;

namespace {

constexpr int USERS = 3;
constexpr int JOBS = 600;
std::atomic<int> wrong{0};

struct Job {
  std::atomic<int64_t>* sums;  // of each worker
  int n_workers;
};

void add_square(const void* context, int64_t i, int worker) {
  const Job& job = *static_cast<const Job*>(context);
  if (worker >= job.n_workers) {
    ++wrong;
  } else {
    job.sums[worker] += i * i;
  }
  if (i % 3 == 0) std::this_thread::yield();
}

void use() {
  const Crew threads = crew();
  for (int i = 1; i <= JOBS; ++i) {
    const int n = i % 2 ? i : 1 + i % 7;  // many with fewer pieces than threads
    std::vector<std::atomic<int64_t>> sums(std::min(n, threads.size));
    const Job job{sums.data(), static_cast<int>(sums.size())};
    threads.run(n, add_square, &job);
    int64_t sum = 0;
    for (auto& part : sums) sum += part;
    if (sum != int64_t(n - 1) * n * (2 * n - 1) / 6) ++wrong;
    if (i % 8 == 0) std::this_thread::sleep_for(2 * PATIENCE);
  }
}

}  // namespace

int main() {
  pool_size() = 8;
  std::vector<std::thread> users;
  for (int i = 0; i < USERS; ++i) users.emplace_back(use);
  for (auto& user : users) user.join();
  if (wrong) printf("%d of %d sums are wrong\n", wrong.load(), USERS * JOBS);
  return wrong != 0;
}
