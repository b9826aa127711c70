// Blocks of one size as those of another: cut at the right and below, or with zeros there. M blocks
// of H_IN x W_IN elements become M of H_OUT x W_OUT.
//
// Input
//   blocks   M H_IN W_IN elements of T, of any shape
// Output
//   out      M H_OUT W_OUT elements of T, of any shape
// Launch
//   (elements of out / 8, rounded up to groups, 1, 1) threads in groups of (256, 1, 1). One thread
//   owns 8 neighbouring elements.
// Template
//   T half, bfloat16 or float; H_IN, W_IN, H_OUT and W_OUT.

constexpr int HELD = 8;
const size_t begin = ((size_t)blockIdx.x * 256 + threadIdx.x) * HELD;
size_t size = 1;
for (int axis = 0; axis < blocks_ndim; axis++) {
  size *= blocks_shape[axis];
}
size = size / (H_IN * W_IN) * (H_OUT * W_OUT);
if (begin >= size) {
  return;
}
size_t m = begin / (H_OUT * W_OUT);
int row = begin % (H_OUT * W_OUT) / W_OUT;
int col = begin % W_OUT;
const T* src = blocks + (m * H_IN + row) * W_IN;
__align__(16) T held[HELD];
#pragma unroll
for (int i = 0; i < HELD; i++) {
  const bool inside = row < H_IN && col < W_IN && begin + i < size;
  held[i] = inside ? src[col] : T(0.0f);
  if (++col == W_OUT) {
    col = 0;
    src += W_IN;
    if (++row == H_OUT) {
      row = 0;
      src = blocks + ++m * (H_IN * W_IN);
    }
  }
}
if (begin + HELD <= size) {
#pragma unroll
  for (int i = 0; i < HELD * (int)sizeof(T) / 16; i++) {
    reinterpret_cast<uint4*>(out + begin)[i] = reinterpret_cast<const uint4*>(held)[i];
  }
} else {
  for (int i = 0; begin + i < size; i++) {
    out[begin + i] = held[i];
  }
}
