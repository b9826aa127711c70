// mpp::tensor_ops::matmul2d, by section 7.2 of the specification and the comments of Apple's
// MPPTensorOpsMatMul2d.h: products of tensors into a cooperative tensor of float.
#pragma once
#include "tensor.h"

namespace mpp::tensor_ops {

using metal::emu_self;

struct matmul2d_descriptor {
  enum class mode { multiply, multiply_accumulate };
  int m, n, k;
  bool transpose_left, transpose_right, relaxed_precision;
  mode matmul_mode;

  constexpr matmul2d_descriptor(int rows, int cols, int depth = int(metal::dynamic_extent),
                                bool left = false, bool right = false, bool relaxed = false,
                                mode how = mode::multiply)
      : m(rows),
        n(cols),
        k(depth),
        transpose_left(left),
        transpose_right(right),
        relaxed_precision(relaxed),
        matmul_mode(how) {}
};

// One for each operation: a cooperative tensor belongs to the operation that it came from.
template <matmul2d_descriptor D, class Scope, class Left, class Right, class T>
struct destination_layout {
  static constexpr uint simdgroups = Scope::static_size, rows = D.m, cols = D.n;
};

template <matmul2d_descriptor D, class Scope>
class matmul2d {
  static_assert(D.m % 16 == 0 || D.n % 16 == 0, "one of M and N must be a multiple of 16");
  static_assert(D.n % 8 == 0, "N must be a multiple of 8");
  static constexpr bool kDynamic = D.k == int(metal::dynamic_extent);
  static_assert(kDynamic || (D.k > 0 && D.k % 16 == 0), "K must be dynamic or a multiple of 16");

  template <class Left, class Right, class T>
  using destination = metal::cooperative_tensor<
      T, metal::extents<int, size_t(D.n), size_t(D.m)>,
      destination_layout<D, Scope, typename Left::value_type, typename Right::value_type, T>>;

 public:
  template <class Left, class Right, class T>
  INLINE destination<Left, Right, T> get_destination_cooperative_tensor() const {
    return {};
  }

  // C = A B, or C + A B: in float32, k ascending. Elements of A and B outside their tensors are
  // not read, which leaves those of C that hang on them undefined: NaN here. K is never cut.
  template <class Left, class Right, class C>
  COLLECTIVE void run(Left& left, Right& right, C& c, int line = __builtin_LINE()) const {
    using A = typename Left::element_type;
    using B = typename Right::element_type;
    static_assert(metal::is_same_v<A, B> && metal::is_same_v<typename C::element_type, float> &&
                      (metal::is_same_v<A, half> || metal::is_same_v<A, bfloat> ||
                       metal::is_same_v<A, float>),
                  "element types are half, bfloat or float, not const, and float for the product");
    static_assert(metal::is_same_v<C, destination<Left, Right, float>>,
                  "the cooperative tensor is of another operation or of other operands");
    emu::emu_tensor_wait(Scope::static_size, mix(hash(left), hash(right)), "matmul2d", line);

    const int a_depth = left.get_extent(D.transpose_left),
              a_rows = left.get_extent(!D.transpose_left);
    const int b_depth = right.get_extent(!D.transpose_right),
              b_cols = right.get_extent(D.transpose_right);
    const int depth = kDynamic ? a_depth : D.k;
    if (kDynamic ? a_depth != b_depth : (a_depth < D.k || b_depth < D.k)) {
      emu::emu_tensor_fault(emu::kOutOfBounds, (a_depth < b_depth ? left.buffer : right.buffer),
                            line,
                            kDynamic ? "the left tensor has K = %ld, the right one %ld"
                                     : "the tensors have K = %ld and %ld, below the operation's",
                            a_depth, b_depth);
    }
    check_static<Left>(!D.transpose_left, D.m, left.buffer, line);
    check_static<Right>(D.transpose_right, D.n, right.buffer, line);
    const int rows = a_rows < D.m ? a_rows : D.m, cols = b_cols < D.n ? b_cols : D.n;

    // The threads of the scope read each element of the operands once, checked and counted.
    constexpr uint threads = C::kThreads;
    const uint first = threads == 32 ? emu_self.lane : emu_self.thread;
    for (uint e = first; e < uint(rows) * uint(depth); e += threads) {
      emu::emu_read(left.buffer, at(left, D.transpose_left, e / uint(depth), e % uint(depth)),
                    sizeof(A), alignof(A), line);
    }
    for (uint e = first; e < uint(cols) * uint(depth); e += threads) {
      emu::emu_read(right.buffer, at(right, D.transpose_right, e % uint(depth), e / uint(depth)),
                    sizeof(B), alignof(B), line);
    }
    emu_self.macs += int64_t(D.m) * D.n * depth / threads;
    for (uint i = 0; i < C::kCapacity; i++) {
      const uint e = c.element(i);
      if (e >= C::kElements) continue;
      const int m = e / uint(D.n), n = e % uint(D.n);
      float sum = 0.0f;
      if (D.matmul_mode == matmul2d_descriptor::mode::multiply_accumulate) {
        if (as_type<uint>(c.elements[i]) == C::kUnwritten) {
          emu::emu_tensor_fault(emu::kUninitialised, nullptr, line,
                                "adds to element (%ld, %ld) of a cooperative tensor that no thread "
                                "has written",
                                n, m);
        }
        sum = c.elements[i];
      }
      if (m >= rows || n >= cols) {
        c.elements[i] = __builtin_nanf("");
        continue;
      }
      for (int k = 0; k < depth; k++) {
        sum += float(value(left, D.transpose_left, m, k)) *
               float(value(right, D.transpose_right, k, n));
      }
      c.elements[i] = sum;
    }
  }

 private:
  // A static extent promises that a whole tile lies inside: it is not looked at again.
  template <class Tensor>
  static INLINE void check_static(size_t r, int tile, const emu::Buffer* b, int line) {
    const size_t size = Tensor::extents_type::static_extent(r);
    if (size < size_t(tile)) {
      emu::emu_tensor_fault(emu::kOutOfBounds, b, line,
                            "a static extent of %ld, below the operation's %ld", size, tile);
    }
  }
  static INLINE uint64_t mix(uint64_t a, uint64_t b) {
    a = (a ^ (b + 0x9e3779b97f4a7c15u + (a << 6))) * 0x9e3779b97f4a7c15u;
    return (a ^ (a >> 29)) | 1;
  }
  template <class Tensor>
  static INLINE uint64_t hash(const Tensor& t) {
    uint64_t h = mix(reinterpret_cast<uint64_t>(t.buffer), uint64_t(t.offset));
    for (size_t r = 0; r < 2; r++) {
      h = mix(mix(h, uint64_t(t.get_extent(r))), uint64_t(t.get_stride(r)));
    }
    return h;
  }
  // Where element (row, col) of an operand lies.
  template <class Tensor>
  static INLINE int64_t at(const Tensor& t, bool transposed, int row, int col) {
    return transposed ? t.place(row, col) : t.place(col, row);
  }
  template <class Tensor>
  static INLINE auto value(const Tensor& t, bool transposed, int row, int col) {
    typename Tensor::value_type x{};
    const int64_t place = at(t, transposed, row, col);
    // The thread whose part a place outside is will say so: others go on till then.
    const bool inside = place >= 0 && place + int64_t(sizeof x) <= t.buffer->size;
    if (inside) __builtin_memcpy(&x, t.buffer->base + place, sizeof x);
    return x;
  }
};

}  // namespace mpp::tensor_ops
