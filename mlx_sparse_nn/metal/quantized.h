// Blocks in MLX's affine packing: value = scale q + bias, with one scale and one bias for each
// group of a stored row. The q lie one after the other, the lowest bits first. Eight neighbours are
// a pack of BITS bytes, which is read in the widest words that begin where packs begin.

template <int BITS>
struct Packing;
template <>
struct Packing<2> {
  typedef ushort word;
  typedef uint pack;
};
template <>
struct Packing<3> {
  typedef uchar word;
  typedef uint pack;
};
template <>
struct Packing<4> {
  typedef uint word;
  typedef uint pack;
};
template <>
struct Packing<5> {
  typedef uchar word;
  typedef ulong pack;
};
template <>
struct Packing<6> {
  typedef ushort word;
  typedef ulong pack;
};
template <>
struct Packing<8> {
  typedef uint word;
  typedef ulong pack;
};

// The pack of columns col to col + 7 of the stored row that begins at `row`.
template <int BITS>
METAL_FUNC typename Packing<BITS>::pack load_pack(const device uint* row, const int col) {
  typedef typename Packing<BITS>::word Word;
  typedef typename Packing<BITS>::pack Pack;
  constexpr int WORDS = BITS / sizeof(Word);
  const device Word* words = (const device Word*)row + col / 8 * WORDS;
  Pack pack = 0;
#pragma unroll
  for (int i = 0; i < WORDS; i++) {
    pack |= Pack(words[i]) << (i * 8 * sizeof(Word));
  }
  return pack;
}

// The integer i of a pack.
template <int BITS>
METAL_FUNC float integer(const typename Packing<BITS>::pack pack, const int i) {
  return float(uint(pack >> (i * BITS)) & ((1u << BITS) - 1));
}

// Add COUNT values of two lanes, whose numbers differ in BIT, and leave each with half of the sums:
// with the upper half where BIT is set.
template <int COUNT, int BIT>
METAL_FUNC void share_sums(thread float* values, const int lane) {
  const bool upper = lane & BIT;
#pragma unroll
  for (int i = 0; i < COUNT / 2; i++) {
    const float low = values[i];  // names, since a choice of elements would be one of addresses
    const float high = values[i + COUNT / 2];
    values[i] = (upper ? high : low) + simd_shuffle_xor(upper ? low : high, BIT);
  }
}

// An 8 x 8 matrix of which this lane gives its two elements.
template <typename T>
METAL_FUNC simdgroup_matrix<T, 8, 8> matrix_of(const T first, const T second) {
  simdgroup_matrix<T, 8, 8> matrix;
  reinterpret_cast<thread vec<T, 2>&>(matrix.thread_elements()) = vec<T, 2>(first, second);
  return matrix;
}
