// What the kernels of a CPU take: plain C types, so that they compile without MLX. Letters as in
// ../metal/README.md. Sizes and steps are in elements.

#pragma once

#include <stddef.h>
#include <stdint.h>

#define MLX_SPARSE_EXPORT extern "C" __attribute__((visibility("default")))

namespace mlx_sparse_nn {

// How work is shared: run() calls f(context, i, worker) once for each i < n, on at most `size`
// threads, and returns when all is done. worker, less than `size` and n, tells calls apart that run
// at once.
struct Crew {
  int size;
  void (*run)(int64_t n, void (*f)(const void* context, int64_t i, int worker),
              const void* context);
};

// CSR of A by block-rows; or of its transpose, whose block j lies at perm[j] and is read
// transposed. The last blocks may reach past the matrix: what they hold there is nobody's, enters
// no result, and need not be finite.
struct Csr {
  const int32_t* indptr;   // (R + 1)
  const int32_t* indices;  // (n_blocks)
  const int32_t* perm;     // (n_blocks), or null: the matrix itself
  int64_t R;
  int64_t C;
  int64_t n_blocks;
  int64_t B;
  int64_t n_rows;  // of the matrix: at most R B, and more than (R - 1) B
  int64_t n_cols;
};

// V matrices of N rows, as MLX may pass them: element (v, n, c) is at v v_step + n n_step +
// c c_step. Any step may be 0 or negative.
struct Rows {
  void* values;
  int64_t v_step;
  int64_t n_step;
  int64_t c_step;
};

// y[v, n, r] = sum over c of A_v[r, c] x[v, n, c] + bias[r]
struct Product {
  Csr a;
  const void* data;  // (V, n_blocks, B, B)
  const void* bias;  // (n_rows), or null
  Rows x;            // (V, N, n_cols)
  Rows y;            // (V, N, n_rows); n_step or c_step is 1
  int64_t V;
  int64_t N;
  void* scratch;  // spmm_scratch() bytes, aligned to 64
  Crew crew;
};

// out[v, j] = sum over n of y[v, n, rows of j] x[v, n, columns of j], and zero past the matrix
struct SampledProduct {
  Csr a;      // perm is null
  void* out;  // (V, n_blocks, B, B)
  Rows y;     // (V, N, n_rows)
  Rows x;     // (V, N, n_cols)
  int64_t V;
  int64_t N;
  void* scratch;  // sddmm_scratch() bytes, aligned to 64
  Crew crew;
};

// spmm with blocks in MLX's affine packing: w = scale q + bias, q of `bits` bits, little-endian
// one after the other along each row of a block.
struct QuantizedProduct {
  Product product;     // data is (V, n_blocks, B, B bits / 32) uint32
  const void* scales;  // (V, n_blocks, B, B / group)
  const void* biases;  // likewise
  int64_t bits;
  int64_t group;
};

// V sums of Pauli strings, times N states each:
// out[v, n, i] = diagonal[v, i] x[v, n, i] + sum over t of c[v, t] s_t(i ^ m_t) x[v, n, i ^ m_t]
// s_t(j) is -1 to the number of clear bits of j among those of z_t. Values are real: of complex
// states, the parts of a number are two places, of which bit 0 tells.
struct PauliProduct {
  const int32_t* terms;      // (n_terms, 2): m_t, z_t
  const void* coefficients;  // (V, n_terms)
  const void* diagonal;      // (V, size / parts), or null
  const void* x;             // (V, N, size)
  void* out;                 // (V, N, size)
  int64_t n_terms;
  int64_t V;
  int64_t N;
  int64_t size;   // a power of two
  int64_t parts;  // 1, or 2 of complex states
  void* scratch;  // pauli_product_scratch() bytes, aligned to 64
  Crew crew;
};

// Their moments: out[v, t] = sum over n and i of u[v, n, i] s_t(i ^ m_t) x[v, n, i ^ m_t]
struct PauliMoments {
  const int32_t* terms;  // (n_terms, 2): m_t, z_t
  const void* u;         // (V, N, size)
  const void* x;         // (V, N, size)
  void* out;             // (V, n_terms)
  int64_t n_terms;
  int64_t V;
  int64_t N;
  int64_t size;   // a power of two
  void* scratch;  // pauli_moments_scratch() bytes, aligned to 64
  Crew crew;
};

// c = a b on three patterns of block-rows, where c stores all that may not be zero; or the sums
// that its gradients to a and b are. Two of the three are read.
struct Spgemm {
  const int32_t* a_indptr;  // (R + 1)
  const int32_t* a_indices;
  const int32_t* b_indptr;  // (K + 1)
  const int32_t* b_indices;
  const int32_t* c_indptr;  // (R + 1)
  const int32_t* c_indices;
  void* a;  // (V, n_blocks of a, B, B), and so on, without gaps
  void* b;
  void* c;
  int64_t R;
  int64_t K;
  int64_t C;
  int64_t B;
  int64_t V;
  void* scratch;  // spgemm_scratch() bytes, aligned to 64
  Crew crew;
};

}  // namespace mlx_sparse_nn
