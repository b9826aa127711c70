// Pointers that carry their buffer. The rewrite turns `const device T*` into
// `emu::ptr<emu::device_space, const T>`, so an address space is a type, and each access is
// checked against the buffer the pointer came from.
#pragma once
#include "runtime.h"

namespace emu {

struct device_space {};
struct constant_space {};
struct threadgroup_space {};

template <class T>
INLINE T load(Buffer* b, int64_t offset, int line) {
  T value;
  __builtin_memcpy(&value, emu_read(b, offset, sizeof(T), alignof(T), line), sizeof(T));
  return value;
}

template <class T>
INLINE void store(Buffer* b, int64_t offset, const T& value, int line) {
  __builtin_memcpy(emu_write(b, offset, sizeof(T), alignof(T), line), &value, sizeof(T));
}

template <class S, class T>
struct ptr;

// An element that can be written. A temporary: `auto v = p[i]` makes a `ref` whose every use fails
// to compile, because a kernel that meant a copy of the value must not get an alias of it.
template <class S, class T>
struct ref {
  Buffer* buffer;
  int64_t offset;
  int line;

  INLINE operator T() && { return load<T>(buffer, offset, line); }
  template <class U>
    requires(!metal::is_same_v<T, U>)
  INLINE explicit operator U() && {
    return U(load<T>(buffer, offset, line));
  }
  INLINE ptr<S, T> operator&() && { return {buffer, offset}; }
  INLINE T operator=(T value) && {
    store<T>(buffer, offset, value, line);
    return value;
  }
  INLINE T operator=(ref&& other) && {
    return static_cast<ref&&>(*this) = static_cast<T>(static_cast<ref&&>(other));
  }
#define REF_UPDATE(op)                      \
  template <class U>                        \
  INLINE T operator op(U&& value) && {      \
    T next = load<T>(buffer, offset, line); \
    next op static_cast<U&&>(value);        \
    store<T>(buffer, offset, next, line);   \
    return next;                            \
  }
  REF_UPDATE(+=)
  REF_UPDATE(-=)
  REF_UPDATE(*=)
  REF_UPDATE(/=)
  REF_UPDATE(|=)
  REF_UPDATE(&=)
  REF_UPDATE(^=)
#undef REF_UPDATE
};

// A named reference, `device T& y = out[i];`, or a scalar threadgroup variable.
template <class S, class T>
struct lref {
  Buffer* buffer;
  int64_t offset;

  INLINE lref(ref<S, T>&& r) : buffer(r.buffer), offset(r.offset) {}
  INLINE explicit lref(Buffer* b) : buffer(b), offset(0) {}
  INLINE operator T() const { return load<T>(buffer, offset, 0); }
  INLINE ptr<S, T> operator&() const { return {buffer, offset}; }
  INLINE T operator=(T value) const { return element() = value; }
  INLINE T operator=(const lref& other) const { return element() = T(other); }
  template <class U>
  INLINE T operator+=(U&& value) const {
    return element() += static_cast<U&&>(value);
  }
  template <class U>
  INLINE T operator-=(U&& value) const {
    return element() -= static_cast<U&&>(value);
  }
  template <class U>
  INLINE T operator*=(U&& value) const {
    return element() *= static_cast<U&&>(value);
  }

 private:
  INLINE ref<S, T> element() const { return {buffer, offset, 0}; }
};

template <class S, class T>
struct ptr<S, const T> {
  Buffer* buffer = nullptr;
  int64_t offset = 0;  // bytes

  ptr() = default;
  INLINE ptr(Buffer* b, int64_t o) : buffer(b), offset(o) {}
  template <class U>
  INLINE explicit ptr(const ptr<S, U>& other) : buffer(other.buffer), offset(other.offset) {}

  INLINE T operator[](int64_t i, int line = __builtin_LINE()) const {
    return load<T>(buffer, offset + i * int64_t(sizeof(T)), line);
  }
  INLINE T operator*() const { return load<T>(buffer, offset, 0); }

  template <class P>
  INLINE P operator+(this P p, int64_t n) {
    p.offset += n * int64_t(sizeof(T));
    return p;
  }
  template <class P>
  INLINE P operator-(this P p, int64_t n) {
    return p + -n;
  }
  template <class P>
  INLINE P& operator+=(this P& p, int64_t n) {
    return p = p + n;
  }
  template <class P>
  INLINE P& operator-=(this P& p, int64_t n) {
    return p = p + -n;
  }
  template <class P>
  INLINE P& operator++(this P& p) {
    return p = p + 1;
  }
  template <class P>
  INLINE P operator++(this P& p, int) {
    P old = p;
    p = p + 1;
    return old;
  }
  INLINE int64_t operator-(const ptr& other) const {
    return (offset - other.offset) / int64_t(sizeof(T));
  }
  INLINE bool operator==(const ptr& other) const {
    return buffer == other.buffer && offset == other.offset;
  }
  INLINE bool operator<(const ptr& other) const { return offset < other.offset; }
};

// Deriving from the const pointer lets `const device T*` parameters deduce T from a `device T*`.
template <class S, class T>
struct ptr : ptr<S, const T> {
  using base = ptr<S, const T>;

  ptr() = default;
  INLINE ptr(Buffer* b, int64_t o) : base(b, o) {}
  template <class U>
  INLINE explicit ptr(const ptr<S, U>& other) : base(other.buffer, other.offset) {}

  INLINE ref<S, T> operator[](int64_t i, int line = __builtin_LINE()) const {
    return {this->buffer, this->offset + i * int64_t(sizeof(T)), line};
  }
  INLINE ref<S, T> operator*() const { return {this->buffer, this->offset, 0}; }
};

// A threadgroup array: decays to a pointer, and checks the index of each dimension.
template <class S, class T>
struct array;
template <class S, class T, size_t N>
struct array<S, T[N]> : ptr<S, T> {
  using ptr<S, T>::ptr;
  INLINE ref<S, T> operator[](int64_t i, int line = __builtin_LINE()) const {
    if (uint64_t(i) >= N) emu_index_fault(this->buffer, i, N, line);
    return ptr<S, T>::operator[](i, line);
  }
  INLINE ref<S, T> operator*() const { return (*this)[0]; }
  INLINE ptr<S, T> operator+(int64_t n) const { return ptr<S, T>(*this) + n; }
};
template <class S, class T, size_t N, size_t M>
struct array<S, T[N][M]> {
  Buffer* buffer;
  int64_t offset;

  INLINE array(Buffer* b, int64_t o) : buffer(b), offset(o) {}
  INLINE array<S, T[M]> operator[](int64_t i, int line = __builtin_LINE()) const {
    if (uint64_t(i) >= N) emu_index_fault(buffer, i, N, line);
    return {buffer, offset + i * int64_t(sizeof(T[M]))};
  }
};

template <class T>
struct scalar_of {
  using type = T;
};
template <class T, size_t N>
struct scalar_of<T[N]> : scalar_of<T> {};
template <class T, int N>
struct scalar_of<metal::vec<T, N>> : scalar_of<T> {};

template <class T>
INLINE auto threadgroup_variable(int id, const char* name, int line = __builtin_LINE()) {
  Buffer* b = emu_threadgroup(id, name, sizeof(T), sizeof(typename scalar_of<T>::type), line);
  if constexpr (__is_array(T)) {
    return array<threadgroup_space, T>(b, 0);
  } else {
    return lref<threadgroup_space, T>(b);
  }
}

template <class T>
inline constexpr bool is_pointer = false;
template <class S, class T>
inline constexpr bool is_pointer<ptr<S, T>> = true;

// `device auto*` is `emu::pointer_in<emu::device_space> auto`.
template <class S, class T>
S space_of(const ptr<S, const T>&);
template <class P, class S>
concept pointer_in = metal::is_same_v<decltype(space_of(P())), S>;

// A buffer argument, as the pointer or (0-d inputs) the value that the parameter asks for.
struct argument {
  Buffer* buffer;
  template <class P>
  INLINE operator P() const {
    if constexpr (is_pointer<P>) {
      return P(buffer, 0);
    } else {
      return load<P>(buffer, 0, 0);
    }
  }
};

// What is left of an expression's type once a `ref` has been read.
template <class T>
struct value_of {
  using type = T;
};
template <class S, class T>
struct value_of<ref<S, T>> {
  using type = T;
};
template <class S, class T>
struct value_of<lref<S, T>> {
  using type = T;
};
template <class T>
using value_t = typename value_of<T>::type;

}  // namespace emu
