// The products as primitives of MLX on the streams of a CPU, and their binding to Python.
//
// Nothing is computed when a product is made: MLX calls eval_cpu when a result is needed, and that
// hands a kernel with its pointers to the stream's thread. Derivatives, vmap and the checks of
// operands are Python's, above this.
//
// The binding is by ctypes, with Python's lock held. An mx.array is a nanobind object: an int32
// behind the header of PyObject says where in it the mlx::core::array lies. binding.py checks that
// before it calls anything else here.

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"
#include "pool.h"

#include "mlx/allocator.h"
#include "mlx/array.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "mlx/primitives.h"
#include "mlx/version.h"

namespace mx = mlx::core;

namespace mlx_sparse_nn {
namespace {

// Bytes of a cache line, to which scratch is aligned.
constexpr size_t ALIGNMENT = 64;

// A kernel, and how much scratch it takes.
template <class Arguments>
struct Kernel {
  void (*compute)(const Arguments*);
  size_t (*scratch)(const Arguments*);
};

void* temporary(size_t bytes, mx::cpu::CommandEncoder& encoder) {
  if (bytes == 0) return nullptr;
  const int lines = bytes / ALIGNMENT + 2;  // of the cache: bytes alone need not fit an int
  mx::array array({lines, static_cast<int>(ALIGNMENT)}, mx::uint8, nullptr, {});
  array.set_data(mx::allocator::malloc(array.nbytes()));
  encoder.add_temporary(array);
  const auto address = reinterpret_cast<uintptr_t>(array.data<char>());
  return reinterpret_cast<void*>((address + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
}

// Copies n items that lie `step` bytes apart; returns where it stopped writing.
template <size_t ITEM>
char* gather_row(const char* from, int64_t step, int n, char* to) {
  for (int i = 0; i < n; ++i, to += ITEM) std::memcpy(to, from + i * step, ITEM);
  return to;
}

// Copies items from a strided array into one without gaps; returns where it stopped writing.
char* gather(const char* from, char* to, const mx::array& like, int axis) {
  const int64_t step = like.strides(axis) * static_cast<int64_t>(like.itemsize());
  const int n = like.shape(axis);
  if (axis == static_cast<int>(like.ndim()) - 1) {
    switch (like.itemsize()) {
      case 2:
        return gather_row<2>(from, step, n, to);
      case 4:
        return gather_row<4>(from, step, n, to);
      default:
        return gather_row<8>(from, step, n, to);
    }
  }
  for (int i = 0; i < n; ++i) to = gather(from + i * step, to, like, axis + 1);
  return to;
}

// Returns the values of an array without gaps between them: a copy where there are some.
const void* contiguous(const mx::array& array, mx::cpu::CommandEncoder& encoder) {
  if (array.flags().row_contiguous) return array.data<char>();
  char* to = static_cast<char*>(temporary(array.nbytes(), encoder));
  encoder.dispatch([from = array.data<char>(), to, like = mx::array::unsafe_weak_copy(array)]() {
    gather(from, to, like, 0);
  });
  return to;
}

// A vector is a single row.
Rows rows_of(const mx::array& x) {
  const auto& strides = x.strides();
  const int n = x.ndim();
  return {const_cast<char*>(x.data<char>()), n > 2 ? strides[0] : 0, n > 1 ? strides[n - 2] : 0,
          strides[n - 1]};
}
int n_rows(const mx::array& x) { return x.ndim() > 1 ? x.shape(-2) : 1; }

// The CSR of a matrix of these sizes, past which its last blocks may reach.
Csr csr_of(const mx::array& indptr, const mx::array& indices, int64_t B, int64_t n_rows,
           int64_t n_cols, mx::cpu::CommandEncoder& encoder) {
  return {static_cast<const int32_t*>(contiguous(indptr, encoder)),
          static_cast<const int32_t*>(contiguous(indices, encoder)),
          nullptr,
          static_cast<int64_t>(indptr.size()) - 1,
          (n_cols + B - 1) / B,
          static_cast<int64_t>(indices.size()),
          B,
          n_rows,
          n_cols};
}

// V of operands (N, width) or (V, N, width).
int n_matrices(const mx::array& x) { return x.ndim() > 2 ? x.shape(0) : 1; }

// Allocates y in the order of x: by columns if x is, so that the rows of A are written as they lie.
Rows allocate_like(const mx::array& x, mx::array& y) {
  const int64_t n_x = n_rows(y), width = y.shape(-1);
  if (n_x == 1 || width == 1 || x.strides(-1) == 1 || x.strides(-2) != 1) {
    y.set_data(mx::allocator::malloc(y.nbytes()));
  } else {
    mx::Strides strides = {1, n_x};
    if (y.ndim() > 2) strides.insert(strides.begin(), n_x * width);
    mx::array::Flags flags{};
    flags.contiguous = true;
    flags.row_contiguous = false;
    flags.col_contiguous = y.ndim() == 2;
    y.set_data(mx::allocator::malloc(y.nbytes()), y.size(), strides, flags);
  }
  return rows_of(y);
}

// The base of all: computed on a CPU, and differentiated by Python. Python also maps it, but for
// functions that MLX maps without a call of Python, as mx.checkpoint's.
class CPUPrimitive : public mx::Primitive {
 public:
  using mx::Primitive::Primitive;
  using Mapped = std::pair<std::vector<mx::array>, std::vector<int>>;

  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::runtime_error("[mlx_sparse_nn] this product was made for a CPU");
  }

 protected:
  // Returns an operand with its mapped axis, of size m, before all others, or joined with V.
  mx::array matrices(const mx::array& a, int axis, int m, bool has_v) {
    auto shape = a.shape();
    shape.insert(shape.begin(), m);
    const auto first = axis >= 0
                           ? mx::moveaxis(a, axis, 0, stream())
                           : mx::broadcast_to(mx::expand_dims(a, 0, stream()), shape, stream());
    return has_v ? mx::flatten(first, 0, 1, stream()) : first;
  }

  static void check_unmapped(const std::vector<int>& axes, std::initializer_list<int> indices) {
    for (int i : indices) {
      if (axes[i] >= 0) throw std::invalid_argument("[mlx_sparse_nn] index arrays are not mapped");
    }
  }
};

// Inputs: indptr, indices, data, x, [scales, biases], [perm], [bias].
class SparseProduct : public CPUPrimitive {
 public:
  enum class Kind { STORED, QUANTIZED, SPREAD };

  // `width` is that of the result: the rows of the CSR, or of SPREAD the columns.
  SparseProduct(mx::Stream stream, const void* kernel, Kind kind, int width, bool transposed,
                bool biased)
      : CPUPrimitive(stream),
        kernel_(kernel),
        kind_(kind),
        width_(width),
        transposed_(transposed),
        biased_(biased) {}

  const char* name() const override {
    return kind_ == Kind::QUANTIZED ? "QuantizedSparseProduct" : "SparseProduct";
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& same = static_cast<const SparseProduct&>(other);
    return kernel_ == same.kernel_ && width_ == same.width_ && transposed_ == same.transposed_ &&
           biased_ == same.biased_;
  }

  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    auto shape = inputs[3].shape();
    shape.back() = width_;
    return {shape};
  }

  // Mapped over x alone, it is one product of more rows; over stored values, of more matrices.
  Mapped vmap(const std::vector<mx::array>& inputs, const std::vector<int>& axes) override {
    if (static_cast<int>(inputs[3].ndim()) - (axes[3] >= 0) == 1) return vmap_vector(inputs, axes);
    const bool quantized = kind_ == Kind::QUANTIZED;
    const int last = inputs.size() - 1, perm = quantized ? 6 : 4;
    check_unmapped(axes, {0, 1, transposed_ ? perm : 0});
    auto in = inputs;
    const bool adds = biased_ && axes[last] >= 0;  // a mapped bias
    if (adds) in.pop_back();
    const auto &x = inputs[3], &bias = inputs[last];
    const bool has_v = static_cast<int>(x.ndim()) - (axes[3] >= 0) > 2;
    const std::vector<int> values = quantized ? std::vector{2, 4, 5} : std::vector{2};
    int m = -1;  // matrices, if any values are mapped
    for (int i : values) {
      if (axes[i] >= 0) m = inputs[i].shape(axes[i]);
    }
    int axis = -1;
    auto unbatched = mx::Shape{};
    if (m >= 0) {
      for (int i : values) in[i] = matrices(inputs[i], axes[i], m, has_v);
      in[3] = matrices(x, axes[3], m, has_v);
      axis = 0;
      if (has_v) unbatched = {m, x.shape(axes[3] == 0 ? 1 : 0)};
    } else if (axes[3] >= 0) {
      axis = has_v ? 1 : 0;
      const auto moved = mx::moveaxis(x, axes[3], axis, stream());
      unbatched = {moved.shape(axis), moved.shape(axis + 1)};
      in[3] = mx::flatten(moved, axis, axis + 1, stream());
    }
    auto primitive = std::make_shared<SparseProduct>(stream(), kernel_, kind_, width_, transposed_,
                                                     biased_ && !adds);
    const auto shape = primitive->output_shapes(in)[0];
    mx::array y(shape, x.dtype(), primitive, std::move(in));
    if (unbatched.size()) y = mx::unflatten(y, axis, unbatched, stream());
    if (adds) {
      auto added = mx::moveaxis(bias, axes[last], 0, stream());  // (m, n_rows)
      if (axis < 0) y = mx::expand_dims(y, axis = 0, stream());
      while (added.ndim() < y.ndim() - axis) added = mx::expand_dims(added, 1, stream());
      y = mx::add(y, added, stream());
    }
    return {{y}, {axis}};
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    auto& encoder = mx::cpu::get_command_encoder(stream());
    const auto &data = inputs[2], &x = inputs[3];
    auto next = inputs.begin() + 4;
    QuantizedProduct q{};
    Product& p = q.product;
    // Scalars are (n_blocks,) or (V, n_blocks); blocks have two more axes.
    const int64_t B = data.ndim() > 2 ? data.shape(-2) : 1, n_x = x.shape(-1);
    p.a = kind_ == Kind::SPREAD ? csr_of(inputs[0], inputs[1], B, n_x, width_, encoder)
                                : csr_of(inputs[0], inputs[1], B, width_, n_x, encoder);
    p.data = contiguous(data, encoder);
    if (kind_ == Kind::QUANTIZED) {
      q.bits = 32 * data.shape(-1) / p.a.B;
      q.group = p.a.B / next->shape(-1);
      q.scales = contiguous(*next++, encoder);
      q.biases = contiguous(*next++, encoder);
    }
    if (transposed_) p.a.perm = static_cast<const int32_t*>(contiguous(*next++, encoder));
    if (biased_) p.bias = contiguous(*next++, encoder);
    p.x = rows_of(x);
    p.y = allocate_like(x, outputs[0]);
    p.V = n_matrices(x);
    p.N = n_rows(x);
    p.crew = crew();
    if (kind_ == Kind::QUANTIZED) {
      const auto& kernel = *static_cast<const Kernel<QuantizedProduct>*>(kernel_);
      p.scratch = temporary(kernel.scratch(&q), encoder);
      encoder.dispatch([q, compute = kernel.compute]() { compute(&q); });
    } else {
      const auto& kernel = *static_cast<const Kernel<Product>*>(kernel_);
      p.scratch = temporary(kernel.scratch(&p), encoder);
      encoder.dispatch([p, compute = kernel.compute]() { compute(&p); });
    }
  }

 private:
  // The same of a vector x: as of a single row.
  Mapped vmap_vector(const std::vector<mx::array>& inputs, const std::vector<int>& axes) {
    auto in = inputs;
    auto in_axes = axes;
    if (axes[3] >= 0) {
      in[3] = mx::moveaxis(in[3], axes[3], 0, stream());
      in_axes[3] = 0;
    }
    in[3] = mx::expand_dims(in[3], -2, stream());
    auto [out, out_axes] = vmap(in, in_axes);
    return {{mx::squeeze(out[0], -2, stream())}, out_axes};
  }

  const void* kernel_;
  Kind kind_;
  int width_;
  bool transposed_;
  bool biased_;
};

// Inputs: indptr, indices, y, x.
class SampledSparseProduct : public CPUPrimitive {
 public:
  SampledSparseProduct(mx::Stream stream, const Kernel<SampledProduct>* kernel, int block_size)
      : CPUPrimitive(stream), kernel_(kernel), B_(block_size) {}

  const char* name() const override { return "SampledSparseProduct"; }

  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& same = static_cast<const SampledSparseProduct&>(other);
    return kernel_ == same.kernel_ && B_ == same.B_;
  }

  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    mx::Shape shape;
    if (inputs[2].ndim() > 2) shape.push_back(inputs[2].shape(0));
    shape.push_back(inputs[1].size());
    if (B_ > 1) shape.insert(shape.end(), {B_, B_});
    return {shape};
  }

  Mapped vmap(const std::vector<mx::array>& inputs, const std::vector<int>& axes) override {
    check_unmapped(axes, {0, 1});
    auto in = inputs;
    const int mapped = axes[2] >= 0 ? 2 : 3, m = inputs[mapped].shape(axes[mapped]);
    const bool has_v = inputs[mapped].ndim() > 3;
    for (int i : {2, 3}) in[i] = matrices(inputs[i], axes[i], m, has_v);
    const auto shape = output_shapes(in)[0];
    auto primitive = std::make_shared<SampledSparseProduct>(stream(), kernel_, B_);
    const int n = inputs[mapped].shape(axes[mapped] == 0 ? 1 : 0);
    mx::array out(shape, inputs[3].dtype(), primitive, std::move(in));
    return {{has_v ? mx::unflatten(out, 0, {m, n}, stream()) : out}, {0}};
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    auto& encoder = mx::cpu::get_command_encoder(stream());
    const auto &y = inputs[2], &x = inputs[3];
    outputs[0].set_data(mx::allocator::malloc(outputs[0].nbytes()));
    SampledProduct p{};
    p.a = csr_of(inputs[0], inputs[1], B_, y.shape(-1), x.shape(-1), encoder);
    p.out = outputs[0].data<char>();
    p.y = rows_of(y);
    p.x = rows_of(x);
    p.V = n_matrices(x);
    p.N = x.shape(-2);
    p.crew = crew();
    p.scratch = temporary(kernel_->scratch(&p), encoder);
    encoder.dispatch([p, compute = kernel_->compute]() { compute(&p); });
  }

 private:
  const Kernel<SampledProduct>* kernel_;
  int B_;
};

// Inputs: terms, coefficients (n_terms), x (..., size), [diagonal (size)]; or V of each, x with N
// states for each.
class PauliSum : public CPUPrimitive {
 public:
  PauliSum(mx::Stream stream, const Kernel<PauliProduct>* kernel)
      : CPUPrimitive(stream), kernel_(kernel) {}

  const char* name() const override { return "PauliSparseProduct"; }

  bool is_equivalent(const mx::Primitive& other) const override {
    return kernel_ == static_cast<const PauliSum&>(other).kernel_;
  }

  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return {inputs[2].shape()};
  }

  // Mapped over x alone, it is one product of more states; over others, of more sums.
  Mapped vmap(const std::vector<mx::array>& inputs, const std::vector<int>& axes) override {
    check_unmapped(axes, {0});
    auto in = inputs;
    const bool has_v = static_cast<int>(inputs[1].ndim()) - (axes[1] >= 0) > 1;
    int m = axes[1] >= 0 ? inputs[1].shape(axes[1]) : -1;
    if (inputs.size() > 3 && axes[3] >= 0) m = inputs[3].shape(axes[3]);
    const int axis = m < 0 && has_v ? 1 : 0;
    mx::Shape shape;
    if (m < 0) {
      in[2] = mx::moveaxis(in[2], axes[2], axis, stream());
      shape = in[2].shape();
      if (has_v) in[2] = mx::flatten(in[2], 1, 2, stream());
    } else {
      in[2] = matrices(in[2], axes[2], m, false);  // (m, ..., size) or (m, V, N, size)
      shape = in[2].shape();
      const int64_t V = has_v ? int64_t(m) * shape[1] : m;
      const int size = shape.back();
      int N = 1;  // of a batch of 0, too
      for (size_t i = has_v ? 2 : 1; i + 1 < shape.size(); ++i) N *= shape[i];
      in[2] = mx::reshape(in[2], {static_cast<int>(V), N, size}, stream());
      for (size_t i = 1; i < in.size(); ++i) {
        if (i != 2) in[i] = matrices(inputs[i], axes[i], m, has_v);
      }
    }
    auto primitive = std::make_shared<PauliSum>(stream(), kernel_);
    const mx::array y(in[2].shape(), in[2].dtype(), primitive, in);
    return {{mx::reshape(y, shape, stream())}, {axis}};
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    auto& encoder = mx::cpu::get_command_encoder(stream());
    const auto &coefficients = inputs[1], &x = inputs[2];
    outputs[0].set_data(mx::allocator::malloc(outputs[0].nbytes()));
    PauliProduct p{};
    p.terms = static_cast<const int32_t*>(contiguous(inputs[0], encoder));
    p.coefficients = contiguous(coefficients, encoder);
    p.x = contiguous(x, encoder);
    p.diagonal = inputs.size() > 3 ? contiguous(inputs[3], encoder) : nullptr;
    p.out = outputs[0].data<char>();
    p.n_terms = inputs[0].shape(0);
    p.V = coefficients.ndim() > 1 ? coefficients.shape(0) : 1;
    p.N = x.size() / x.shape(-1) / std::max<int64_t>(p.V, 1);
    p.parts = x.dtype() == mx::complex64 ? 2 : 1;
    p.size = x.shape(-1) * p.parts;
    p.crew = crew();
    p.scratch = temporary(kernel_->scratch(&p), encoder);
    encoder.dispatch([p, compute = kernel_->compute]() { compute(&p); });
  }

 private:
  const Kernel<PauliProduct>* kernel_;
};

// Inputs: terms, u, x.
class PauliMomentsOf : public CPUPrimitive {
 public:
  PauliMomentsOf(mx::Stream stream, const Kernel<PauliMoments>* kernel)
      : CPUPrimitive(stream), kernel_(kernel) {}

  const char* name() const override { return "PauliMomentsSparseProduct"; }

  bool is_equivalent(const mx::Primitive& other) const override {
    return kernel_ == static_cast<const PauliMomentsOf&>(other).kernel_;
  }

  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return {{inputs[2].shape(0), inputs[0].shape(0)}};
  }

  Mapped vmap(const std::vector<mx::array>& inputs, const std::vector<int>& axes) override {
    check_unmapped(axes, {0});
    auto in = inputs;
    const int mapped = axes[1] >= 0 ? 1 : 2, m = inputs[mapped].shape(axes[mapped]);
    const int V = inputs[mapped].shape(axes[mapped] == 0 ? 1 : 0);
    for (int i : {1, 2}) in[i] = matrices(inputs[i], axes[i], m, true);
    const auto shape = output_shapes(in)[0];
    auto primitive = std::make_shared<PauliMomentsOf>(stream(), kernel_);
    const mx::array out(shape, inputs[2].dtype(), primitive, std::move(in));
    return {{mx::unflatten(out, 0, {m, V}, stream())}, {0}};
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    auto& encoder = mx::cpu::get_command_encoder(stream());
    outputs[0].set_data(mx::allocator::malloc(outputs[0].nbytes()));
    PauliMoments p{};
    p.terms = static_cast<const int32_t*>(contiguous(inputs[0], encoder));
    p.u = contiguous(inputs[1], encoder);
    p.x = contiguous(inputs[2], encoder);
    p.out = outputs[0].data<char>();
    p.n_terms = inputs[0].shape(0);
    p.V = inputs[2].shape(0);
    p.N = inputs[2].shape(1);
    p.size = inputs[2].shape(2);
    p.crew = crew();
    p.scratch = temporary(kernel_->scratch(&p), encoder);
    encoder.dispatch([p, compute = kernel_->compute]() { compute(&p); });
  }

 private:
  const Kernel<PauliMoments>* kernel_;
};

// Inputs: a_indptr, a_indices, and the values of two of a, b and c in this order, (V, n_blocks) or
// (V, n_blocks, B, B); b_indptr, b_indices, c_indptr, c_indices.
class SparseSparseProduct : public CPUPrimitive {
 public:
  enum class Out { A, B, C };

  // `n_cols` are the block-columns of b and c.
  SparseSparseProduct(mx::Stream stream, const Kernel<Spgemm>* kernel, Out out, int n_cols)
      : CPUPrimitive(stream), kernel_(kernel), out_(out), n_cols_(n_cols) {}

  const char* name() const override { return "SparseSparseProduct"; }

  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& same = static_cast<const SparseSparseProduct&>(other);
    return kernel_ == same.kernel_ && out_ == same.out_ && n_cols_ == same.n_cols_;
  }

  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    auto shape = inputs[2].shape();
    shape[1] = inputs[out_ == Out::A ? 1 : out_ == Out::B ? 5 : 7].size();
    return {shape};
  }

  Mapped vmap(const std::vector<mx::array>& inputs, const std::vector<int>& axes) override {
    check_unmapped(axes, {0, 1, 4, 5, 6, 7});
    auto in = inputs;
    const int mapped = axes[2] >= 0 ? 2 : 3, m = inputs[mapped].shape(axes[mapped]);
    for (int i : {2, 3}) in[i] = matrices(inputs[i], axes[i], m, true);
    const int V = inputs[mapped].shape(axes[mapped] == 0 ? 1 : 0);
    const auto shape = output_shapes(in)[0];
    auto primitive = std::make_shared<SparseSparseProduct>(stream(), kernel_, out_, n_cols_);
    mx::array out(shape, inputs[3].dtype(), primitive, std::move(in));
    return {{mx::unflatten(out, 0, {m, V}, stream())}, {0}};
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    auto& encoder = mx::cpu::get_command_encoder(stream());
    outputs[0].set_data(mx::allocator::malloc(outputs[0].nbytes()));
    const int32_t* index[6];
    const int places[] = {0, 1, 4, 5, 6, 7};
    for (int i = 0; i < 6; ++i) {
      index[i] = static_cast<const int32_t*>(contiguous(inputs[places[i]], encoder));
    }
    void* first = const_cast<void*>(contiguous(inputs[2], encoder));
    void* second = const_cast<void*>(contiguous(inputs[3], encoder));
    void* out = outputs[0].data<char>();
    Spgemm p{index[0], index[1], index[2], index[3], index[4], index[5]};
    p.a = out_ == Out::A ? out : first;
    p.b = out_ == Out::B ? out : out_ == Out::A ? first : second;
    p.c = out_ == Out::C ? out : second;
    p.R = static_cast<int64_t>(inputs[0].size()) - 1;
    p.K = static_cast<int64_t>(inputs[4].size()) - 1;
    p.C = n_cols_;
    p.B = inputs[2].ndim() > 2 ? inputs[2].shape(-1) : 1;
    p.V = inputs[2].shape(0);
    p.crew = crew();
    p.scratch = temporary(kernel_->scratch(&p), encoder);
    encoder.dispatch([p, compute = kernel_->compute]() { compute(&p); });
  }

 private:
  const Kernel<Spgemm>* kernel_;
  Out out_;
  int n_cols_;
};

// ------------------------------------------------------------------------------------- Python

size_t header = 0;     // bytes of PyObject
void* none = nullptr;  // Python's None

mx::array& unwrap(void* object) {
  char* start = static_cast<char*>(object);
  int32_t offset;
  std::memcpy(&offset, start + header, sizeof offset);
  return *reinterpret_cast<mx::array*>(start + offset);
}

// Writes into an array object of Python's what a primitive computes of operands, one of which has
// its dtype; None is left out. Returns what went wrong, or null.
template <class Make>
const char* write(void* out, std::initializer_list<void*> operands, int like, Make make) {
  static std::string message;
  try {
    std::vector<mx::array> inputs;
    inputs.reserve(operands.size());
    for (void* operand : operands) {
      if (operand != none) inputs.push_back(unwrap(operand));
    }
    const auto dtype = inputs[like].dtype();
    std::shared_ptr<mx::Primitive> primitive = make(mx::default_stream(mx::default_device()));
    auto shape = primitive->output_shapes(inputs)[0];
    unwrap(out) = mx::array(std::move(shape), dtype, std::move(primitive), std::move(inputs));
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace

MLX_SPARSE_EXPORT const char* mlx_version() { return mx::version(); }

MLX_SPARSE_EXPORT void set_up(size_t header_bytes, void* python_none, int n_threads) {
  header = header_bytes;
  none = python_none;
  pool_size() = n_threads;
}

// Writes the number of axes, the size and the bytes of an item of an array, to check that it is
// one.
MLX_SPARSE_EXPORT void probe(void* object, int64_t* out) {
  const auto& array = unwrap(object);
  out[0] = array.ndim();
  out[1] = array.size();
  out[2] = array.itemsize();
}

// Writes into an array object of Python's n int32 that nobody has written yet.
MLX_SPARSE_EXPORT void make_indices(void* out, int n) {
  mx::array indices({n}, mx::int32, nullptr, {});
  indices.set_data(mx::allocator::malloc(indices.nbytes()));
  indices.set_status(mx::array::Status::available);
  unwrap(out) = indices;
}

// Whether MLX takes an array for a tracer: one kept from a trace, while a transform is running.
MLX_SPARSE_EXPORT bool is_tracer(void* object) { return unwrap(object).is_tracer(); }

MLX_SPARSE_EXPORT const char* make_spmm(void* out, const void* kernel, void* data, void* indptr,
                                        void* indices, void* perm, void* x, void* bias, int width) {
  return write(out, {indptr, indices, data, x, perm, bias}, 3, [&](mx::Stream stream) {
    return std::make_shared<SparseProduct>(stream, kernel, SparseProduct::Kind::STORED, width,
                                           perm != none, bias != none);
  });
}

// The transpose of scalars times one row, by the CSR of the matrix itself.
MLX_SPARSE_EXPORT const char* make_spmm_t(void* out, const void* kernel, void* data, void* indptr,
                                          void* indices, void* x, int width) {
  return write(out, {indptr, indices, data, x}, 3, [&](mx::Stream stream) {
    return std::make_shared<SparseProduct>(stream, kernel, SparseProduct::Kind::SPREAD, width,
                                           false, false);
  });
}

MLX_SPARSE_EXPORT const char* make_qspmm(void* out, const void* kernel, void* packed, void* scales,
                                         void* biases, void* indptr, void* indices, void* perm,
                                         void* x, void* bias, int width) {
  return write(
      out, {indptr, indices, packed, x, scales, biases, perm, bias}, 3, [&](mx::Stream stream) {
        return std::make_shared<SparseProduct>(stream, kernel, SparseProduct::Kind::QUANTIZED,
                                               width, perm != none, bias != none);
      });
}

MLX_SPARSE_EXPORT const char* make_sddmm(void* out, const void* kernel, void* indptr, void* indices,
                                         void* y, void* x, int block_size) {
  return write(out, {indptr, indices, y, x}, 3, [&](mx::Stream stream) {
    return std::make_shared<SampledSparseProduct>(
        stream, static_cast<const Kernel<SampledProduct>*>(kernel), block_size);
  });
}

MLX_SPARSE_EXPORT const char* make_pauli_product(void* out, const void* kernel, void* terms,
                                                 void* coefficients, void* x, void* diagonal) {
  return write(out, {terms, coefficients, x, diagonal}, 2, [&](mx::Stream stream) {
    return std::make_shared<PauliSum>(stream, static_cast<const Kernel<PauliProduct>*>(kernel));
  });
}

MLX_SPARSE_EXPORT const char* make_pauli_moments(void* out, const void* kernel, void* terms,
                                                 void* u, void* x) {
  return write(out, {terms, u, x}, 2, [&](mx::Stream stream) {
    return std::make_shared<PauliMomentsOf>(stream,
                                            static_cast<const Kernel<PauliMoments>*>(kernel));
  });
}

// `which` of a, b and c is computed of the other two: 0, 1 or 2.
MLX_SPARSE_EXPORT const char* make_spgemm(void* out, const void* kernel, void* a_indptr,
                                          void* a_indices, void* first, void* second,
                                          void* b_indptr, void* b_indices, void* c_indptr,
                                          void* c_indices, int which, int n_cols) {
  const auto operands = {a_indptr, a_indices, first,    second,
                         b_indptr, b_indices, c_indptr, c_indices};
  return write(out, operands, 2, [&](mx::Stream stream) {
    return std::make_shared<SparseSparseProduct>(stream, static_cast<const Kernel<Spgemm>*>(kernel),
                                                 static_cast<SparseSparseProduct::Out>(which),
                                                 n_cols);
  });
}

}  // namespace mlx_sparse_nn
