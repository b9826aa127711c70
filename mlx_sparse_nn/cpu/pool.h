// The threads that share the work of kernels. They sleep while there is none for some time.

#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

#include "kernels.h"

namespace mlx_sparse_nn {

// How long a thread looks for more before it sleeps: to wake one takes a tenth of a millisecond,
// in which a small product is done.
constexpr std::chrono::microseconds PATIENCE(200);

// Waits for a condition while patience lasts, and lets other threads run; returns whether it came.
template <class Condition>
bool look_for(Condition condition) {
  const auto end = std::chrono::steady_clock::now() + PATIENCE;
  while (!condition()) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::yield();
  }
  return true;
}

class Pool {
 public:
  // The thread that calls run() works, too: n - 1 others help it. They are never joined, and a
  // pool is never destroyed: MLX's threads may compute while the process exits.
  explicit Pool(int n) : size(n) {
    for (int i = 1; i < n; ++i) std::thread([this] { help(); }).detach();
  }

  const int size;

  // Calls f(context, i, worker) for each i < n. May be called by several threads at once.
  void run(int64_t n, void (*f)(const void*, int64_t, int), const void* context) {
    Job job{n, f, context};
    std::unique_lock<std::mutex> lock(mutex_);
    jobs_.push_back(&job);
    ++n_jobs_;
    const int asleep = asleep_;
    lock.unlock();
    if (asleep > 0) {
      if (n > 2) {
        work_.notify_all();
      } else {
        work_.notify_one();
      }
    }
    job.take_steps(0);
    lock.lock();
    leave(job);
    lock.unlock();
    if (look_for([&] { return job.helpers == 0; })) return;
    lock.lock();
    done_.wait(lock, [&] { return job.helpers == 0; });
  }

 private:
  struct Job {
    const int64_t n;
    void (*const f)(const void*, int64_t, int);
    const void* const context;
    std::atomic<int64_t> next{0};
    std::atomic<int> helpers{0};  // at work now
    int workers = 1;              // that ever joined: the caller, and helpers

    void take_steps(int worker) {
      for (int64_t i; (i = next.fetch_add(1)) < n;) f(context, i, worker);
    }
  };

  void help() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      if (jobs_.empty()) {
        lock.unlock();
        look_for([this] { return n_jobs_ > 0; });
        lock.lock();
        ++asleep_;
        work_.wait(lock, [this] { return !jobs_.empty(); });
        --asleep_;
      }
      Job& job = *jobs_.front();
      // As many workers as pieces, at most: scratch is for no more.
      if (job.next >= job.n || job.workers >= job.n) {
        leave(job);
        continue;
      }
      const int worker = job.workers++;
      ++job.helpers;
      lock.unlock();
      job.take_steps(worker);
      lock.lock();
      leave(job);
      if (--job.helpers == 0) done_.notify_all();  // the job may be gone from here on
    }
  }

  // Takes a job off the list: all of its steps have been taken.
  void leave(const Job& job) {
    const auto at = std::find(jobs_.begin(), jobs_.end(), &job);
    if (at == jobs_.end()) return;
    jobs_.erase(at);
    --n_jobs_;
  }

  std::mutex mutex_;
  std::condition_variable work_;
  std::condition_variable done_;
  std::deque<Job*> jobs_;
  std::atomic<int> n_jobs_{0};  // of the list, to be read without the lock
  int asleep_ = 0;              // helpers
};

inline int& pool_size() {
  static int size = 1;
  return size;
}

inline Pool*& current_pool() {
  static Pool* pool = nullptr;
  return pool;
}

// The pool of this process: threads do not survive a fork, so that a child makes its own.
inline Pool& pool() {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  Pool*& pool = current_pool();
  if (!pool) {
    static const int registered = pthread_atfork([] { mutex.lock(); }, [] { mutex.unlock(); },
                                                 [] {
                                                   current_pool() = nullptr;
                                                   mutex.unlock();
                                                 });
    (void)registered;
    pool = new Pool(pool_size());
  }
  return *pool;
}

inline Crew crew() {
  auto run = [](int64_t n, void (*f)(const void*, int64_t, int), const void* context) {
    pool().run(n, f, context);
  };
  return {pool().size, run};
}

}  // namespace mlx_sparse_nn
