// Tensors and cooperative tensors of Metal 4, by sections 2.21 and 7 of the Metal Shading Language
// Specification: what it calls undefined is a fault. A kernel of MLX makes tensors inline.
#pragma once
#include "simd.h"

#if __METAL_VERSION__ < 400
#error "tensors need Metal 4"
#endif

#define LINE int line = __builtin_LINE()

namespace emu {

// A type in an address space, as in `tensor<device half, ...>`.
template <class S, class T>
struct in {};

}  // namespace emu

namespace metal {

inline constexpr size_t dynamic_extent = size_t(-1);

template <class T, size_t N>
struct array {
  T elements[N];
  INLINE constexpr T operator[](size_t i) const { return elements[i]; }
};

template <class Index, size_t... Extents>
struct extents {
  using index_type = Index;
  Index sizes[sizeof...(Extents)] = {Index(Extents)...};

  static constexpr size_t rank() { return sizeof...(Extents); }
  static constexpr size_t static_extent(size_t r) {
    const size_t known[] = {Extents...};
    return known[r];
  }
  static constexpr size_t rank_dynamic() { return (size_t(Extents == dynamic_extent) + ...); }
  extents() = default;
  template <class... I>
    requires(sizeof...(I) == rank_dynamic() && sizeof...(I) > 0)
  INLINE constexpr extents(I... dynamic) {
    const size_t known[] = {Extents...};
    const Index given[] = {Index(dynamic)..., 0};
    size_t next = 0;
    for (size_t i = 0; i < rank(); i++) {
      if (known[i] == dynamic_extent) sizes[i] = given[next++];
    }
  }
  INLINE constexpr Index extent(size_t r) const { return sizes[r]; }
};

template <class Index, size_t Rank>
struct dextents_of;
template <class Index>
struct dextents_of<Index, 1> : type_identity<extents<Index, dynamic_extent>> {};
template <class Index>
struct dextents_of<Index, 2> : type_identity<extents<Index, dynamic_extent, dynamic_extent>> {};
template <class Index, size_t Rank>
using dextents = typename dextents_of<Index, Rank>::type;

struct tensor_handle {};
struct tensor_inline {};

template <class Element, class Extents, class Descriptor = tensor_handle>
struct tensor {
  static_assert(is_same_v<Descriptor, tensor_inline>, "a kernel of MLX has inline tensors only");
};

template <class S, class T, class Extents>
struct tensor<emu::in<S, T>, Extents, tensor_inline> {
  using element_type = T;
  using value_type = typename remove_const<T>::type;
  using extents_type = Extents;
  using index_type = typename Extents::index_type;
  static constexpr size_t get_rank() { return Extents::rank(); }

  emu::Buffer* buffer;
  int64_t offset;  // bytes
  Extents sizes;
  index_type strides[Extents::rank()];

  template <class I>
  INLINE tensor(emu::ptr<S, T> data, Extents e, array<I, Extents::rank()> s, LINE)
      : buffer(data.buffer), offset(data.offset), sizes(e) {
    for (size_t r = 0; r < get_rank(); r++) strides[r] = index_type(s[r]);
    check(line);
  }
  INLINE tensor(emu::ptr<S, T> data, Extents e, LINE)
      : buffer(data.buffer), offset(data.offset), sizes(e) {
    strides[0] = 1;
    for (size_t r = 1; r < get_rank(); r++) strides[r] = strides[r - 1] * sizes.extent(r - 1);
    check(line);
  }

  INLINE index_type get_extent(size_t r) const { return sizes.extent(r); }
  INLINE index_type get_stride(size_t r) const { return strides[r]; }

  // What is left from an index on, or so much of it: never more than the tensor has.
  template <size_t... Sizes, class... I>
  INLINE auto slice(I... index) const {
    static_assert(sizeof...(I) == Extents::rank());
    if constexpr (sizeof...(Sizes) == 0) {
      return cut<dextents<index_type, Extents::rank()>>({dynamic<I>()...}, {index_type(index)...});
    } else {
      return cut<extents<index_type, Sizes...>>({Sizes...}, {index_type(index)...});
    }
  }

  // Where an element lies in its buffer.
  INLINE int64_t place(index_type i, index_type j) const {
    return offset + int64_t(sizeof(T)) * (int64_t(i) * strides[0] + int64_t(j) * strides[1]);
  }

 private:
  template <class I>
  static constexpr size_t dynamic() {
    return dynamic_extent;
  }

  INLINE void check(int line) const {
    if (strides[0] != 1) emu::emu_not_modelled("a tensor whose first stride is not 1", line);
    for (size_t r = 0; r < get_rank(); r++) {
      if (get_extent(r) < 0) {
        emu::emu_tensor_fault(emu::kOutOfBounds, buffer, line,
                              "a tensor's extent is %ld, below %ld", get_extent(r), 0);
      }
    }
  }

  template <class E>
  INLINE auto cut(array<size_t, Extents::rank()> wanted,
                  array<index_type, Extents::rank()> from) const {
    using Slice = tensor<emu::in<S, T>, E, tensor_inline>;
    E left;
    array<index_type, Extents::rank()> same;
    int64_t start = offset;
    for (size_t r = 0; r < get_rank(); r++) {
      const bool rest = wanted[r] == dynamic_extent;
      const int64_t size = rest ? get_extent(r) - from[r] : int64_t(wanted[r]);
      if (from[r] < 0 || size < 0 || from[r] + size > get_extent(r)) {
        emu::emu_tensor_fault(emu::kOutOfBounds, buffer, 0,
                              "a slice ends at %ld, outside the tensor's extent of %ld",
                              from[r] + size, get_extent(r));
      }
      left.sizes[r] = index_type(size);
      same.elements[r] = strides[r];
      start += int64_t(sizeof(T)) * int64_t(from[r]) * strides[r];
    }
    return Slice(emu::ptr<S, T>(buffer, start), left, same);
  }
};

template <class S, class T, class E, class I, size_t N>
tensor(emu::ptr<S, T>, E, array<I, N>) -> tensor<emu::in<S, T>, E, tensor_inline>;
template <class S, class T, class E>
tensor(emu::ptr<S, T>, E) -> tensor<emu::in<S, T>, E, tensor_inline>;

template <size_t N>
struct execution_simdgroups {
  static constexpr size_t static_size = N;
};
using execution_simdgroup = execution_simdgroups<1>;

// A tile of `Layout::rows` x `Layout::cols` that is shared out among the threads of a scope. Which
// thread holds which element is for the implementation to say, and some slots hold none: here they
// are scattered, otherwise in each schedule, so that text which takes a place for granted fails.
template <class T, class Extents, class Layout>
struct cooperative_tensor {
  using element_type = T;
  using value_type = T;
  using layout = Layout;
  static constexpr uint kThreads = 32 * Layout::simdgroups;
  static constexpr uint kElements = Layout::rows * Layout::cols;
  static constexpr uint kCapacity = (kElements + kThreads - 1) / kThreads + 1;

  T elements[kCapacity];

  // Elements are what no thread has written, until one has.
  INLINE cooperative_tensor() {
    for (uint i = 0; i < kCapacity; i++) elements[i] = as_type<T>(kUnwritten);
  }
  INLINE ushort get_capacity() const { return kCapacity; }
  INLINE bool is_valid_element(ushort i) const { return i < kCapacity && element(i) < kElements; }
  INLINE T& operator[](ushort i, LINE) {
    check(i, line);
    return elements[i];
  }
  // Column, row.
  INLINE array<int, 2> get_multidimensional_index(ushort i, LINE) const {
    check(i, line);
    return {int(element(i) % Layout::cols), int(element(i) / Layout::cols)};
  }

  INLINE uint element(uint i) const {
    const uint thread = Layout::simdgroups == 1 ? emu_self.lane : emu_self.thread;
    return ((thread * kCapacity + i) * 7919 + emu_self.layout) % (kThreads * kCapacity);
  }
  static constexpr uint kUnwritten = 0x7fd0beef;  // a NaN of its own

 private:
  INLINE void check(ushort i, int line) const {
    if (!is_valid_element(i)) {
      emu::emu_tensor_fault(emu::kOutOfBounds, nullptr, line,
                            "element %ld of a cooperative tensor of capacity %ld is not valid", i,
                            kCapacity);
    }
  }
};

}  // namespace metal

#undef LINE
