// A model of what the kernels use of CUDA, on one OS thread: each CUDA thread is a fiber that runs
// until it has to wait. Warps go on in random order, and some stand still for a while, so that they
// drift as far apart as barriers let them. Asynchronous copies land late, at random moments;
// products of a warpgroup read shared memory when they are begun, or only when they are waited for.
//
// Functions of the kernels' headers that are written in PTX have their models here.
#include <stddef.h>

#include "switch.h"

extern "C" int snprintf(char*, size_t, const char*, ...);
extern "C" void* calloc(size_t, size_t);
extern "C" void* memcpy(void*, const void*, size_t);
extern "C" void* memset(void*, int, size_t);

using __half = _Float16;
// Rounds to the nearest, or the even one of two.
struct __nv_bfloat16 {
  unsigned short bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float x) {
    const unsigned u = __builtin_bit_cast(unsigned, x);
    bits = (u & 0x7fffffff) > 0x7f800000 ? u >> 16 | 0x40 : (u + 0x7fff + (u >> 16 & 1)) >> 16;
  }
  operator float() const { return __builtin_bit_cast(float, unsigned(bits) << 16); }
};
struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
struct int4 {
  int x, y, z, w;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
};
struct __half2 {
  __half x, y;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
#define __device__
#define __forceinline__
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))
#define make_uint2(...) (uint2{__VA_ARGS__})
#define make_uint4(...) (uint4{__VA_ARGS__})
#define make_float2(...) (float2{__VA_ARGS__})
#define make_float4(...) (float4{__VA_ARGS__})
#define __floats2bfloat162_rn(a, b) (__nv_bfloat162{__nv_bfloat16(a), __nv_bfloat16(b)})
#define __floats2half2_rn(a, b) (__half2{__half(a), __half(b)})
#define __popc __builtin_popcount
#define __ffs __builtin_ffs
#define fmaf __builtin_fmaf
#define sqrtf __builtin_sqrtf
template <typename T>
T min(T a, T b) {
  return a < b ? a : b;
}
template <typename T>
T max(T a, T b) {
  return a > b ? a : b;
}
template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcs(const T* p) {
  return *p;
}
template <typename T>
void __stcs(T* p, T value) {
  *p = value;
}
template <typename T>
T __ldcg(const T* p) {
  return *p;
}

constexpr int kMaxThreads = 1024;
constexpr int kStack = 64 * 1024;
constexpr unsigned kBase =
    48;  // address of the first byte of dynamic shared memory: no round number
constexpr int kShared = 227 * 1024;
constexpr int kCopies = 4096;
constexpr long kPatience = 200000;  // rounds of the scheduler for a thread block
alignas(1024) static char shared[kShared];

struct Buffer {
  const char* begin;
  const char* end;
};
struct Launch {
  dim3 grid;  // of thread blocks
  int threads;
  int shared_memory;
  unsigned seed;
  int n_buffers;
  Buffer buffers[8];
  long conflicts;  // of banks, in ldmatrix
  char fault[256];
};

static Launch* launch;
static dim3 threadIdx, blockIdx, gridDim, blockDim;

static unsigned long long random_state;
static unsigned random_number() {
  random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
  return unsigned(random_state >> 33);
}

struct Copy {
  char* dst;
  const char* src;
  int bytes;                    // of size; the others become 0
  int size;                     // 16, 8 or 4
  unsigned long long* arrival;  // or no copy: a barrier to arrive at
  int group;
  const int* map;  // or a box of a matrix
  int row, col;
};
struct Product {
  void (*run)(float*, unsigned long long, unsigned long long);
  float* sums;
  unsigned long long a, b;
  int group;
};
struct Fiber {
  void* sp;
  bool done;
  bool late;  // its copies take longer
  Copy copies[kCopies];
  int copied, begun, group;  // copies [copied, begun) are under way
  Product products[64];
  int n_products, product_group;
  float factors[64][2][16];  // of products, that lay in registers
  int n_factors;
};
// A fiber goes on when this word changes: until then no switch to it is needed to ask.
struct Wait {
  const int* word;
  int mask, value;
  bool goes_on() const { return !word || (*word & mask) != value; }
};
static Wait waits[kMaxThreads];
static Fiber* fibers;
static char* stacks;
static void* scheduler;
static Fiber* self;      // that runs, or has last run
static bool scheduling;  // not in a fiber

static void yield() {
  if (!scheduling) emu_switch(&self->sp, scheduler);
}
static bool failed() { return launch->fault[0]; }
static void wait_while(const int* word, int mask, int value) {
  Wait& wait = waits[self - fibers];
  wait = {word, mask, value};
  while (!wait.goes_on()) yield();
  wait.word = nullptr;
}
// Say what is wrong, the first time, and do not come back.
static void fail(const char* what) {
  if (!failed()) {
    snprintf(launch->fault, sizeof launch->fault, "%s (block %u %u %u, thread %u)", what,
             blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x);
  }
  yield();
}

// Barriers of the thread block and of warps.
static int block_arrived, block_generation;
static int warp_arrived[32], warp_generation[32];
static void __syncthreads() {
  const int generation = block_generation;
  if (++block_arrived == int(blockDim.x)) {
    block_arrived = 0;
    block_generation++;
  }
  wait_while(&block_generation, ~0, generation);
}
static void __syncwarp() {
  const int warp = threadIdx.x / 32;
  const int generation = warp_generation[warp];
  if (++warp_arrived[warp] == 32) {
    warp_arrived[warp] = 0;
    warp_generation[warp]++;
  }
  wait_while(&warp_generation[warp], ~0, generation);
}

// What the lanes of a warp show one another.
static unsigned shown[32][32];
template <typename T>
T exchange(T value, int lane) {
  const int warp = threadIdx.x / 32;
  memcpy(&shown[warp][threadIdx.x % 32], &value, 4);
  __syncwarp();
  T result;
  memcpy(&result, &shown[warp][lane], 4);
  __syncwarp();
  return result;
}
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return exchange(value, lane & 31);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int bits) {
  return exchange(value, threadIdx.x % 32 ^ bits);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int distance) {
  const int lane = int(threadIdx.x % 32) - distance;
  return exchange(value, lane < 0 ? threadIdx.x % 32 : lane);
}
static unsigned __ballot_sync(unsigned, bool value) {
  const int warp = threadIdx.x / 32;
  shown[warp][threadIdx.x % 32] = value;
  __syncwarp();
  unsigned bits = 0;
  for (int i = 0; i < 32; i++) bits |= shown[warp][i] << i;
  __syncwarp();
  return bits;
}
static void atomicOr(unsigned* p, unsigned bits) { *p |= bits; }

// Addresses of shared memory. Variables that are not in the dynamic part need none of their own.
static unsigned __cvta_generic_to_shared(const void* p) {
  return unsigned((const char*)p - shared) + kBase;
}
static char* at_shared(unsigned address, int bytes) {
  const unsigned offset = address - kBase;
  if (offset + bytes > unsigned(launch->shared_memory))
    fail("shared memory beyond what the launch asks for");
  return shared + offset;
}

// copies.h
void land_box(const Copy&);
static void step_copy(Fiber& f) {
  const Copy& c = f.copies[f.copied++ % kCopies];
  if (c.map) return land_box(c);
  if (!c.arrival) {
    memcpy(c.dst, c.src, c.bytes);
    memset(c.dst + c.bytes, 0, c.size - c.bytes);
    return;
  }
  extern void arrive(unsigned long long*);
  arrive(c.arrival);
}
static void check_source(const void* src, int bytes) {
  const char* p = (const char*)src;
  for (int i = 0; i < launch->n_buffers; i++) {
    if (p >= launch->buffers[i].begin && p + bytes <= launch->buffers[i].end) return;
  }
  fail("a copy reads outside of the inputs");
}
static void begin_copy(void* dst, const void* src, int bytes, int size = 16) {
  if (self->begun - self->copied == kCopies) fail("too many copies under way");
  if ((size_t)src % size && bytes) fail("an asynchronous copy from no multiple of its size");
  if (__cvta_generic_to_shared(dst) % size) fail("a copy to no multiple of its size");
  if (bytes) check_source(src, bytes);
  self->copies[self->begun++ % kCopies] = {(char*)dst, (const char*)src, bytes,
                                           size,       nullptr,          self->group};
}
template <bool ALIGNED, typename T>
void copy_first(T* dst, const T* src, int count) {
  const int taken = max(0, min(16 / int(sizeof(T)), count));
  at_shared(__cvta_generic_to_shared(dst), 16);
  if (ALIGNED) return begin_copy(dst, src, taken * sizeof(T));
  if (taken) check_source(src, taken * sizeof(T));
  for (int i = 0; i < 16 / int(sizeof(T)); i++) dst[i] = i < taken ? src[i] : T(0.0f);
}
template <bool ALIGNED, typename T>
void copy16(T* dst, const T* src, bool valid) {
  copy_first<ALIGNED>(dst, src, valid ? 16 / int(sizeof(T)) : 0);
}
template <typename T>
void copy_some(T* dst, const T* src, int i, int count, bool aligned) {
  const int n = min(16 / int(sizeof(T)), count - i);
  if (n <= 0) return;
  check_source(src + i, n * sizeof(T));
  if (aligned) return begin_copy(dst + i, src + i, n * sizeof(T));
  for (int k = i; k < i + n; k++) dst[k] = src[k];
}
// pieces.h
template <int BYTES>
void copy_bytes(void* dst, const void* src, int taken) {
  at_shared(__cvta_generic_to_shared(dst), BYTES);
  begin_copy(dst, src, taken, BYTES);
}
static void commit_copies() { self->group++; }
template <int COUNT>
void wait_copies() {
  while (self->copied < self->begun &&
         self->copies[self->copied % kCopies].group < self->group - COUNT)
    step_copy(*self);
}
static int in_register(int value) { return value; }

// barriers.h: count in bits 48 to 63, arrivals still missing in 32 to 47, the phase below.
// Bytes of boxes that a barrier waits for; they may land before it knows of them.
static int& bytes_of(unsigned long long* barrier) {
  static unsigned long long* barriers[64];
  static int bytes[64];
  int i = 0;
  while (barriers[i] && barriers[i] != barrier) i++;
  barriers[i] = barrier;
  return bytes[i];
}
static void init_barrier(unsigned long long* barrier, int count) {
  *barrier = (unsigned long long)count << 48 | (unsigned long long)count << 32;
  bytes_of(barrier) = 0;
}
static void end_phase(unsigned long long* barrier) {
  const unsigned long long count = *barrier >> 48, missing = *barrier >> 32 & 0xffff;
  if (!missing && !bytes_of(barrier)) *barrier = count << 48 | count << 32 | unsigned(*barrier + 1);
}
void arrive(unsigned long long* barrier) {
  if (!(*barrier >> 32 & 0xffff)) fail("an arrival too many at a barrier");
  *barrier -= 1ull << 32;
  end_phase(barrier);
}
static void arrive_copied(unsigned long long* barrier) {
  if (self->begun - self->copied == kCopies) fail("too many copies under way");
  self->copies[self->begun++ % kCopies] = {nullptr, nullptr, 0, 0, barrier, self->group};
}
static void wait_barrier(unsigned long long* barrier, int parity) {
  wait_while((const int*)barrier, 1, parity);  // its low half
}
template <int COUNT>
void give_registers() {
  static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256);
}
template <int COUNT>
void take_registers() {
  static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256);
}

// boxes.h
struct Map {
  const char* matrix;
  int rows, cols, box_rows;
};
template <typename T>
void make_map(int* map, int*, const T* matrix, int rows, int cols, int box_rows) {
  static_assert(sizeof(T) == 2);
  if ((size_t)matrix % 16 || cols % 8) fail("rows of boxes from no multiple of 16 bytes");
  if (box_rows > 256) fail("a box of more than 256 rows");
  check_source(matrix, 16);
  check_source(matrix + (size_t)rows * cols - 8, 16);
  const Map made = {(const char*)matrix, rows, cols, box_rows};
  memcpy(map, &made, sizeof made);
  __syncwarp();
}
static void arrive_before(unsigned long long* barrier, int bytes) {
  bytes_of(barrier) += bytes;
  arrive(barrier);
}
template <typename T>
void copy_box(T* dst, const int* map, int row, int col, unsigned long long* barrier) {
  const int bytes = ((const Map*)map)->box_rows * 128;
  if (__cvta_generic_to_shared(dst) % 1024) fail("a box to no multiple of 1024 bytes");
  at_shared(__cvta_generic_to_shared(dst), bytes);
  self->copies[self->begun++ % kCopies] = {(char*)dst,  nullptr, bytes, 0,  barrier,
                                           self->group, map,     row,   col};
}
void land_box(const Copy& c) {
  Map of;
  memcpy(&of, c.map, sizeof of);
  for (int i = 0; i < of.box_rows * 8; i++) {
    const int row = c.row + i / 8, col = c.col + i % 8 * 8;
    char* dst = c.dst + (i ^ i / 8 % 8) * 16;
    const bool there = row >= 0 && row < of.rows && col >= 0 && col < of.cols;
    if (there) memcpy(dst, of.matrix + (size_t(row) * of.cols + col) * 2, 16);
    if (!there) memset(dst, 0, 16);
  }
  bytes_of(c.arrival) -= c.bytes;
  end_phase(c.arrival);
}
static void show_barriers() {}

// mma.h
template <typename T>
float element(unsigned pair, int i) {
  const unsigned short bits = i ? pair >> 16 : pair;
  return float(__builtin_bit_cast(T, bits));
}
static const char* rows_of[32][32];
template <bool TRANS, int COUNT, typename T>
void load_matrices(unsigned (&r)[COUNT], const T* p) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const unsigned address = __cvta_generic_to_shared(p);
  if (lane < 8 * COUNT && address % 16) fail("ldmatrix from no multiple of 16 bytes");
  rows_of[warp][lane] = lane < 8 * COUNT ? at_shared(address, 16) : nullptr;
  __syncwarp();
  for (int m = 0; m < COUNT; m++) {
    const char** rows = rows_of[warp] + 8 * m;
    unsigned banks = 0;
    for (int i = 0; i < 8; i++) banks |= 1u << __cvta_generic_to_shared(rows[i]) / 16 % 8;
    launch->conflicts += lane == 0 ? 8 - __popc(banks) : 0;
    unsigned short e[2];
    for (int i = 0; i < 2; i++) {
      const int row = TRANS ? lane % 4 * 2 + i : lane / 4,
                col = TRANS ? lane / 4 : lane % 4 * 2 + i;
      memcpy(&e[i], rows[row] + 2 * col, 2);
    }
    r[m] = e[0] | unsigned(e[1]) << 16;
  }
  __syncwarp();
}
template <bool TRANS, typename T>
void load_matrix4(unsigned (&r)[4], const T* p) {
  load_matrices<TRANS>(r, p);
}
template <bool TRANS, typename T>
void load_matrix2(unsigned (&r)[2], const T* p) {
  load_matrices<TRANS>(r, p);
}
static unsigned transpose_tile(unsigned pair) {
  unsigned transposed = 0;
  for (int i = 0; i < 2; i++) {  // element (lane / 4, lane % 4 * 2 + i) comes from its mirror image
    const int row = threadIdx.x % 4 * 2 + i, col = threadIdx.x % 32 / 4;
    const unsigned mirror = exchange(pair, row * 4 + col / 2);
    transposed |= (mirror >> col % 2 * 16 & 0xffff) << i * 16;
  }
  return transposed;
}
unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
float __uint_as_float(unsigned u) { return __builtin_bit_cast(float, u); }
// Cuts off what tensor cores do not read.
float as_tf32(unsigned u) { return __uint_as_float(u & ~0x1fffu); }
static unsigned fragments[32][32][6];
template <typename T>
void multiply(float (&acc)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
              unsigned b1) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const unsigned own[6] = {a0, a1, a2, a3, b0, b1};
  memcpy(fragments[warp][lane], own, sizeof own);
  __syncwarp();
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
    // A word holds one element of k, or two neighbours.
    constexpr int HELD = 4 / sizeof(T);
    for (int word = 0; word < 8; word++) {
      const unsigned a = fragments[warp][row % 8 * 4 + word % 4][row / 8 + word / 4 * 2];
      const unsigned b = fragments[warp][col * 4 + word % 4][4 + word / 4];
      for (int e = 0; e < HELD; e++) {
        if constexpr (HELD == 2) {
          acc[i] += element<T>(a, e) * element<T>(b, e);
        } else {
          acc[i] += as_tf32(a) * as_tf32(b);
        }
      }
    }
  }
  __syncwarp();
}

// quantized.h
unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const unsigned long long bytes = a | (unsigned long long)b << 32;
  unsigned picked = 0;
  for (int i = 0; i < 4; i++)
    picked |= unsigned(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return picked;
}
void store16(void* to, uint4 words) { memcpy(to, &words, 16); }
template <unsigned MASK, unsigned SET>
unsigned mask_and_set(unsigned word) {
  return word & MASK | SET;
}
template <typename T>
unsigned fma2(T, unsigned a, unsigned b, unsigned c) {
  unsigned sums = 0;
  for (int i = 0; i < 2; i++) {
    const T sum(fmaf(element<T>(a, i), element<T>(b, i), element<T>(c, i)));
    sums |= unsigned(__builtin_bit_cast(unsigned short, sum)) << 16 * i;
  }
  return sums;
}
// The same of 8 columns of a, as if zeros followed.
template <typename T>
void multiply_half(float (&acc)[4], unsigned a0, unsigned a1, unsigned b0) {
  multiply<T>(acc, a0, a1, 0, 0, b0, 0);
}

// wgmma.h: element (i, k) of an operand, by its descriptor.
template <typename T>
float operand(unsigned long long descriptor, bool across, int i, int k) {
  const unsigned begin = (descriptor & 0x3fff) << 4, lead = (descriptor >> 16 & 0x3fff) << 4;
  const unsigned groups = (descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1) fail("a descriptor of another swizzle than 128 bytes");
  if (across && sizeof(T) == 4) fail("a product of floats contracts along the rows of its tiles");
  const unsigned at = across ? begin + i / 64 * lead + k / 8 * groups + k % 8 * 128 + i % 64 * 2
                             : begin + i / 8 * groups + i % 8 * 128 + k * sizeof(T);
  T value;
  memcpy(&value, at_shared(at ^ (at >> 3 & 0x70), sizeof(T)), sizeof(T));
  if constexpr (sizeof(T) == 4) return as_tf32(__float_as_uint(value));
  return float(value);
}
template <typename T, int COLS, int A_ACROSS, int B_ACROSS>
struct Warpgroup {
  static void run(float* acc, unsigned long long a, unsigned long long b) {
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 % 4 * 16 + lane / 4;
    float rows[2][16], column[16];
    for (int i = 0; i < 2; i++)
      for (int k = 0; k < 16; k++) rows[i][k] = operand<T>(a, A_ACROSS, first + i * 8, k);
    for (int j = 0; j < COLS / 4; j++) {
      const int col = j / 2 * 8 + lane % 4 * 2 + j % 2;
      for (int k = 0; k < 16; k++) column[k] = operand<T>(b, B_ACROSS, col, k);
      for (int i = 0; i < 2; i++)
        for (int k = 0; k < 16; k++) acc[j / 2 * 4 + i * 2 + j % 2] += rows[i][k] * column[k];
    }
  }
  static void multiply(float (&acc)[COLS / 2], unsigned long long a, unsigned long long b) {
    if (self->n_products == 0 && random_number() % 2) return run(acc, a, b);
    if (self->n_products == 64) fail("too many products under way");
    self->products[self->n_products++] = {run, acc, a, b, self->product_group};
  }
};
// fragments.h: the factor in registers is taken when the product is begun.
template <typename T, int COLS, int ACROSS>
struct FragmentProduct {
  static constexpr int K = 32 / sizeof(T);
  static void run(float* acc, unsigned long long a, unsigned long long b) {
    const float (*rows)[16] = (const float (*)[16])a;
    for (int j = 0; j < COLS / 4; j++) {
      const int col = j / 2 * 8 + threadIdx.x % 4 * 2 + j % 2;
      for (int k = 0; k < K; k++) {
        const float value = operand<T>(b, ACROSS, col, k);
        for (int i = 0; i < 2; i++) acc[j / 2 * 4 + i * 2 + j % 2] += rows[i][k] * value;
      }
    }
  }
  static void multiply(float (&acc)[COLS / 2], const unsigned (&a)[4], unsigned long long b) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    memcpy(fragments[warp][lane], a, sizeof a);
    __syncwarp();
    float (*rows)[16] = self->factors[self->n_factors++ % 64];
    for (int i = 0; i < 2; i++) {
      for (int k = 0; k < K; k++) {
        const int word = k * sizeof(T) / 4;
        const unsigned value = fragments[warp][lane / 4 * 4 + word % 4][i + word / 4 * 2];
        if constexpr (sizeof(T) == 4) {
          rows[i][k] = as_tf32(value);
        } else {
          rows[i][k] = element<T>(value, k % 2);
        }
      }
    }
    __syncwarp();
    const unsigned long long held = (unsigned long long)rows;
    if (self->n_products == 0 && random_number() % 2) return run(acc, held, b);
    if (self->n_products == 64) fail("too many products under way");
    self->products[self->n_products++] = {run, acc, held, b, self->product_group};
  }
};
template <int COUNT>
void hold_sums(float (&)[COUNT]) {}
static void begin_products() {}
static void commit_products() { self->product_group++; }
template <int COUNT>
void wait_products() {
  int kept = 0;
  for (int i = 0; i < self->n_products; i++) {
    const Product p = self->products[i];
    if (p.group < self->product_group - COUNT) {
      p.run(p.sums, p.a, p.b);
    } else {
      self->products[kept++] = p;
    }
  }
  self->n_products = kept;
}
static void show_copies() {}

static void body();
static void entry() {
  body();
  if (self->n_products) fail("products under way at the end");
  self->done = true;
  yield();
  __builtin_unreachable();
}

static void run_block() {
  memset(shared, 0xff, kShared);  // NaN
  block_arrived = 0;
  memset(warp_arrived, 0, sizeof warp_arrived);
  const int threads = blockDim.x, warps = threads / 32;
  for (int t = 0; t < threads; t++) {
    Fiber& f = fibers[t];
    f.done = false;
    f.late = random_number() % 2;
    f.copied = f.begun = f.group = f.n_products = f.product_group = 0;
    waits[t].word = nullptr;
    f.sp = fiber_stack(stacks + (t + 1) * kStack - t % 31 * 192, entry);
  }
  unsigned running = ~0u;
  long idle = 0;
  for (int left = threads; left && !failed(); idle++) {
    if (idle > kPatience) return fail("threads wait for one another for ever");
    if (random_number() % 16 == 0)
      running = random_number() % 3 ? ~0u : random_number() | 1u << random_number() % warps;
    const int first = random_number() % warps;
    for (int i = 0; i < warps && !failed(); i++) {
      const int w = (first + i) % warps;
      if (!(running >> w & 1)) continue;
      for (int t = 32 * w; t < 32 * w + 32 && !failed(); t++) {
        if (!waits[t].goes_on()) continue;
        self = fibers + t;
        if (self->done) continue;
        threadIdx.x = t;
        scheduling = false;
        emu_switch(&scheduler, self->sp);
        scheduling = true;
        left -= self->done;
      }
    }
    for (int i = 0; i < threads / 4; i++) {
      Fiber& f = fibers[random_number() % threads];
      if (f.late && random_number() % 64) continue;
      for (int n = random_number() % 4; n && f.copied < f.begun; n--) step_copy(f);
    }
  }
  for (int t = 0; t < threads && !failed(); t++) {
    threadIdx.x = t;
    if (fibers[t].copied < fibers[t].begun) fail("copies under way at the end");
  }
}

extern "C" __attribute__((visibility("default"))) void run(Launch* of) {
  launch = of;
  scheduling = true;
  if (!fibers) {
    fibers = (Fiber*)calloc(kMaxThreads, sizeof(Fiber));
    stacks = (char*)calloc(kMaxThreads, kStack);
  }
  random_state = launch->seed;
  gridDim = launch->grid;
  blockDim = {unsigned(launch->threads), 1, 1};
  for (unsigned z = 0; z < gridDim.z; z++) {
    for (unsigned y = 0; y < gridDim.y; y++) {
      for (unsigned x = 0; x < gridDim.x && !failed(); x++) {
        blockIdx = {x, y, z};
        run_block();
      }
    }
  }
}
