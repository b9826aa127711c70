// How a kernel shares its work. Pieces are whole rows, so that no sum depends on the threads.

#pragma once

#include <algorithm>

#include "kernels.h"

namespace mlx_sparse_nn {

// Multiply-adds that are worth a thread, and pieces for each of the threads.
constexpr double WORK_PER_THREAD = 1e5;
constexpr int PIECES_PER_THREAD = 4;

// How many pieces n units of work are cut into, and the most threads that take one at once.
inline int64_t pieces(const Crew& crew, int64_t n, double work) {
  const double threads = std::min<double>(crew.size, work / WORK_PER_THREAD);
  return threads < 2 ? 1 : std::min(n, static_cast<int64_t>(threads) * PIECES_PER_THREAD);
}
inline int64_t workers(const Crew& crew, int64_t n, double work) {
  return std::min<int64_t>(crew.size, pieces(crew, n, work));
}

template <class F>
void run(const Crew& crew, int64_t n, const F& f) {
  crew.run(
      n, [](const void* g, int64_t i, int worker) { (*static_cast<const F*>(g))(i, worker); }, &f);
}

// Calls f(begin, end, worker) over [0, n) in pieces: on all threads if the work is worth it.
template <class F>
void share(const Crew& crew, int64_t n, double work, const F& f) {
  if (n <= 0) return;
  const int64_t m = pieces(crew, n, work);
  if (m == 1) return f(int64_t(0), n, 0);
  run(crew, m, [&](int64_t i, int worker) { f(n * i / m, n * (i + 1) / m, worker); });
}

// The same over rows of a CSR, in pieces of about as many stored entries and rows. indptr is that
// of the first row.
template <class F>
void share_rows(const Crew& crew, const int32_t* indptr, int64_t n_rows, double work, const F& f) {
  if (n_rows <= 0) return;
  const int64_t m = pieces(crew, n_rows, work);
  if (m == 1) return f(int64_t(0), n_rows, 0);
  const int64_t total = int64_t(indptr[n_rows]) - indptr[0] + n_rows;
  auto cut = [&](int64_t i) {  // the first row with i / m of all before it
    int64_t low = 0, high = n_rows;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (indptr[middle] - indptr[0] + middle < total * i / m) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  };
  run(crew, m, [&](int64_t i, int worker) {
    const int64_t begin = cut(i), end = i + 1 == m ? n_rows : cut(i + 1);
    if (begin < end) f(begin, end, worker);
  });
}

}  // namespace mlx_sparse_nn
