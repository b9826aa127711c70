// What MLX calls of its BLAS, under MLX's names, by the OpenBLAS of PyPI's scipy-openblas32, whose
// names begin with scipy_.

#define GEMM(name, scalar, value)                                                                \
  void scipy_##name(int, int, int, int, int, int, scalar, const value*, int, const value*, int,  \
                    scalar, value*, int);                                                        \
  void name(int order, int a_transpose, int b_transpose, int m, int n, int k, scalar alpha,      \
            const value* a, int lda, const value* b, int ldb, scalar beta, value* c, int ldc) {  \
    scipy_##name(order, a_transpose, b_transpose, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc); \
  }

GEMM(cblas_sgemm, float, float)
GEMM(cblas_dgemm, double, double)
GEMM(cblas_cgemm, const void*, void)
