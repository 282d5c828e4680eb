// y[m, n] = activation(x_scale[m] * w_scale[n] * sum_k x[m, k] w[n, k] + bias[n]) for few rows m: the
// weight streams once from memory into registers as the left operand of mma, 16 rows of it at a
// time, and the tokens are the 8 columns of the right operand.
//
// The weight lies in memory as the lanes of a warp want it (cuda_stream.py packs it; but see
// ROW_MAJOR): for 16 output channels ("a tile") and 32 values of k, lane 4 g + t holds of the rows g
// and g + 8 the eight k that the fragments of mma and wgmma give it. Such blocks follow each other
// along k; after each chunk come the qparams of its groups. So every copy is contiguous,
// asynchronous and 16 bytes wide, and each warp waits for its own.
//
// A block of threads is WARPS_N x WARPS_K warps: the first split the channels, the second k, which a
// cluster of SPLITS blocks splits further. Partial sums are added in a fixed order, so results are
// the same from run to run.
//
// Compile-time parameters, all integers (cuda_stream.py sets them):
//   BITS of a weight; FLOAT8: whether the 8 bits are e4m3; X_BITS of an activation (16 or 8);
//   X_HALF: 16-bit activations are float16, not bfloat16; CHUNK: k that share qparams (0: none
//   inside the stream); ZERO: the qparams have a zero point; X_ZERO: activations have one;
//   TOKENS of a block of threads (1, or a multiple of 8), ROW_TILES of a warp, WARPS_N, WARPS_K,
//   STEP (k of a pipeline stage), STAGES; WARPGROUP: four warps multiply together (wgmma);
//   BLOCKS of threads that a multiprocessor should hold; SPLITS;
//   Y_TYPE, BIAS_TYPE: 0 none, 1 bfloat16, 2 float16, 3 float32; ACTIVATION: 0 none, 1 relu,
//   2 gelu, 3 gelu_tanh, 4 silu.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

constexpr int TOKEN_TILES = (TOKENS + 7) / 8;
constexpr int COLUMNS = 8 * TOKEN_TILES;  // one token alone is read as all eight columns
constexpr int ROWS = 16 * ROW_TILES * WARPS_N;
constexpr int GROUP_THREADS = 32 * WARPS_N;  // the warps that share a part of k, and its activations
constexpr int THREADS = GROUP_THREADS * WARPS_K;
constexpr bool INTEGER = X_BITS == 8 && !FLOAT8;
constexpr bool GROUPED = CHUNK != 0;

constexpr int BLOCK_BYTES = 64 * BITS;  // 16 rows, 32 k
constexpr int QPARAM_BYTES = GROUPED ? (ZERO ? 64 : 32) : 0;
constexpr int UNIT = GROUPED ? CHUNK : 32;
constexpr int UNIT_BYTES = UNIT / 32 * BLOCK_BYTES + QPARAM_BYTES;

// Rows in shared memory start an odd multiple of 16 bytes apart, so that the eight rows of a matrix
// that ldmatrix reads meet different banks. wgmma reads rows of 128 bytes, swizzled.
constexpr int X_ROW = STEP * X_BITS / 8;
constexpr int STRIDE = X_ROW + 16;
constexpr int X_BYTES = WARPGROUP ? TOKENS * X_ROW : TOKENS * STRIDE;

// 8-bit products need no unpacking: their weight stays as it is, [n, k], which other kernels share,
// and is read as the activations are.
constexpr bool ROW_MAJOR = BITS == 8 && X_BITS == 8;
constexpr int PIECE_ROW = ROW_MAJOR ? STEP : STEP / UNIT * UNIT_BYTES;  // contiguous in memory
constexpr int PIECE_STRIDE = ROW_MAJOR ? STRIDE : PIECE_ROW;
constexpr int PIECE_ROWS = ROW_MAJOR ? 16 : 1;  // of them in a tile
constexpr int STEP_BYTES = PIECE_ROWS * PIECE_STRIDE;
constexpr int W_BYTES = ROW_TILES * STEP_BYTES;  // of a warp and a stage
constexpr int STAGE_BYTES = WARPGROUP ? (X_BYTES + WARPS_N * W_BYTES + 1023) / 1024 * 1024 : X_BYTES + WARPS_N * W_BYTES;
constexpr int AHEAD = STAGES - (WARPGROUP ? 2 : 1);  // wgmma may still read the stage before

struct Arguments {
  const char* x;  // [m, k], rows of ldx bytes
  const float* x_scale;
  const float* x_zero;
  const char* weight;
  const float* w_scale;
  const float* w_sum;
  const void* bias;
  void* y;
  int m, n, k, ldx;
  u32 base;  // BASE: a constant that the compiler knew it would load again for every use
};

__device__ __forceinline__ u32 shared_address(const void* p) {
  return static_cast<u32>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void copy_async(u32 to, const char* from, u64 policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "l"(policy)
               : "memory");
}

__device__ __forceinline__ u64 keep_policy(bool keep) {
  u64 policy;
  if (keep)
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  else
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

__device__ __forceinline__ void wait_for_oldest() {
  asm volatile("cp.async.wait_group %0;" ::"n"(AHEAD - 1) : "memory");
  if (WARPGROUP) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The previous kernel of the stream may still run until here; nothing it writes is read before.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ void group_barrier(int group) {
  if (WARPS_N == 1)
    __syncwarp();
  else
    asm volatile("bar.sync %0, %1;" ::"r"(WARPS_K == 1 ? 1 : group + 1), "n"(GROUP_THREADS) : "memory");
}

template <int WORDS>
struct Words {
  u32 w[WORDS];
};

template <int WORDS>
__device__ __forceinline__ Words<WORDS> load_shared(u32 at) {
  Words<WORDS> v;
  if constexpr (WORDS == 4)
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
                 : "r"(at));
  else if constexpr (WORDS == 2)
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.w[0]), "=r"(v.w[1]) : "r"(at));
  else
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v.w[0]) : "r"(at));
  return v;
}

template <int WORDS>
__device__ __forceinline__ Words<WORDS> load_matrices(u32 at) {
  Words<WORDS> v;
  if constexpr (WORDS == 4)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
                 : "r"(at));
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(v.w[0]), "=r"(v.w[1]) : "r"(at));
  return v;
}

__device__ __forceinline__ float widen(u16 bits, int type) {  // 1 bfloat16, 2 float16
  float f;
  if (type == 2)
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
  else
    f = __uint_as_float(static_cast<u32>(bits) << 16);
  return f;
}

__device__ __forceinline__ u16 narrow(float f, int type) {
  u16 bits;
  if (type == 2)
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(f));
  else
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(f));
  return bits;
}

// a * b + c on pairs of the activations' 16-bit type, rounded once
__device__ __forceinline__ u32 fma2(u32 a, u32 b, u32 c) {
  u32 d;
  if (X_HALF)
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  else
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

constexpr u32 MINUS_ZERO = 0x80008000u;

// Codes are floats as they are: u below 256 in the low bits of a bfloat16 is u * 2^-133 (of a float16,
// u * 2^-24), because numbers below the second exponent are evenly spaced. One fma brings it to
// (u - middle) * 2^-7 (2^-9), exactly.
constexpr u32 RAISE = X_HALF ? 0x78007800u : 0x7e807e80u;  // 2^15, 2^126
constexpr u32 CENTER = X_HALF ? (BITS == 8 ? 0xb400b400u : BITS == 4 ? 0xa400a400u : 0x9c009c00u)
                              : (BITS == 8 ? 0xbf80bf80u : BITS == 4 ? 0xbd80bd80u : 0xbc80bc80u);
constexpr u32 LOWER = X_HALF ? 0x60006000u : 0x43004300u;  // 2^9, 2^7

// For few tokens it is cheaper to scale sums than weights: codes enter the product as they come, with
// BASE (128 or 1024) added by writing them into its mantissa, and a product with ones gives the
// sums of activations that take it away again, with the zero point.
constexpr bool SCALE_SUMS = GROUPED && X_BITS == 16 && !WARPGROUP && TOKENS <= 8;
constexpr u32 ONES = X_HALF ? 0x3c003c00u : 0x3f803f80u;
constexpr float OFFSET = (X_HALF ? 1024.0f : 128.0f) + (1 << (BITS - 1));

struct Qparams {
  u32 scale[2], zero[2];  // of rows g and g + 8: twice in a word, or (SCALE_SUMS) as float32
};

__device__ __forceinline__ Qparams load_qparams(u32 at, int g) {
  Qparams q;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    u32 pair;
    q.zero[half] = SCALE_SUMS ? 0 : MINUS_ZERO;
    if (ZERO) {
      asm volatile("ld.shared.b32 %0, [%1];" : "=r"(pair) : "r"(at + 4 * (g + 8 * half)));
    } else {
      u16 scale;
      asm volatile("ld.shared.b16 %0, [%1];" : "=h"(scale) : "r"(at + 2 * (g + 8 * half)));
      pair = scale;
    }
    if (SCALE_SUMS) {
      q.scale[half] = pair << 16;
      if (ZERO) q.zero[half] = pair & 0xffff0000u;
    } else if (X_HALF) {  // qparams are bfloat16
      u32 s = narrow(__uint_as_float(pair << 16), 2), z = narrow(__uint_as_float(pair & 0xffff0000u), 2);
      q.scale[half] = fma2(s | s << 16, LOWER, MINUS_ZERO);
      if (ZERO) q.zero[half] = z | z << 16;
    } else {
      q.scale[half] = fma2(__byte_perm(pair, 0, 0x1010), LOWER, MINUS_ZERO);
      if (ZERO) q.zero[half] = __byte_perm(pair, 0, 0x3232);
    }
  }
  return q;
}

constexpr float SUM_FACTOR = BITS == 8 && !FLOAT8 && X_BITS == 16 ? (X_HALF ? 512.0f : 128.0f) : 1.0f;

// The lane's 16 weights of a block as the left operands of two k16 products: a[s][0..3].
__device__ __forceinline__ void widen_weights(const Words<BITS / 2>& w, const Qparams& q, u32 base, u32 (&a)[2][4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int p = 0; p < 4; ++p) {  // two neighbours in k
      u32& out = a[p / 2][2 * (p % 2) + half];
      if constexpr (BITS <= 4) {
        const u32 word = BITS == 4 ? w.w[half % (BITS / 2)] >> (4 * p) : w.w[0] >> (2 * p + 8 * half);
        const u32 codes = word & (BITS == 4 ? 0x000f000fu : 0x00030003u);
        out = SCALE_SUMS ? codes | base : fma2(fma2(codes, RAISE, CENTER), q.scale[half], q.zero[half]);
      } else if constexpr (FLOAT8) {
        // e4m3's exponent and mantissa fit below either type's sign; its bias is repaired by a
        // product with a power of two, which is exact (subnormals included).
        constexpr int SHIFT = X_HALF ? 1 : 4;
        constexpr u32 MANTISSA = X_HALF ? 0x3f803f80u : 0x07f007f0u;
        constexpr u32 REBIAS = X_HALF ? 0x5c005c00u : 0x7b807b80u;  // 2^8, 2^120
        const u32 word = w.w[2 * half + p / 2] << (p % 2 ? 0 : 8);
        out = fma2((word & MINUS_ZERO) | ((word >> SHIFT) & MANTISSA), REBIAS, MINUS_ZERO);
      } else {  // SUM_FACTOR follows
        const u32 codes = __byte_perm(w.w[2 * half + p / 2], 0, p % 2 ? 0x4341 : 0x4240);
        out = fma2(codes, RAISE, CENTER);
      }
    }
}

__device__ __forceinline__ void product16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  if (X_HALF)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void product8(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void product8(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <bool YES, class A, class B>
struct If {
  typedef A type;
};
template <class A, class B>
struct If<false, A, B> {
  typedef B type;
};
typedef If<INTEGER && !GROUPED, int, float>::type Sum;
typedef Sum Sums[ROW_TILES][TOKEN_TILES][4];

// The address for ldmatrix of 8 tokens (or, in whole tiles, 16 channels) by 16-byte columns.
__device__ __forceinline__ u32 token_address(int lane) {
  return (TOKENS == 1 ? 0 : lane % 8 * STRIDE) + lane / 8 * 16;
}

#if WARPGROUP

// Rows of 128 bytes in groups of eight, 1024 bytes apart; the 16-byte columns of a row are swapped by
// its number modulo 8 (the "128-byte swizzle").
__device__ __forceinline__ u64 descriptor(u32 x) {
  return (x & 0x3ffff) >> 4 | u64(1) << 16 | u64(1024 >> 4) << 32 | u64(1) << 62;
}

// 32 bytes of k number ``index``, for every token: added to a descriptor
__device__ __forceinline__ constexpr u64 slice(int index) {
  return (index / 4 * TOKENS * 128 + index % 4 * 32) >> 4;
}

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void end_products() {
  asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

#endif

#if X_BITS == 16

// multiply, where sums are scaled
__device__ __forceinline__ void multiply_codes(u32 weights, u32 x, int lane, u32 base, Sums& sums) {
  const u32 ones[4] = {ONES, ONES, ONES, ONES};
#pragma unroll
  for (int chunk = 0; chunk < STEP / UNIT; ++chunk) {
    float part[ROW_TILES][TOKEN_TILES][4] = {}, x_sum[TOKEN_TILES][4] = {};
#pragma unroll
    for (int block = 0; block < UNIT / 32; ++block) {
      u32 a[ROW_TILES][2][4];
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r) {
        const u32 at = weights + r * STEP_BYTES + chunk * UNIT_BYTES + block * BLOCK_BYTES;
        widen_weights(load_shared<BITS / 2>(at + lane * (BLOCK_BYTES / 32)), Qparams(), base, a[r]);
      }
#pragma unroll
      for (int j = 0; j < TOKEN_TILES; ++j) {
        const u32 from = x + token_address(lane) + j * 8 * STRIDE + (chunk * (UNIT / 32) + block) * 64;
        const Words<4> b = load_matrices<4>(from);
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          product16(x_sum[j], ones, b.w[2 * s], b.w[2 * s + 1]);
#pragma unroll
          for (int r = 0; r < ROW_TILES; ++r) product16(part[r][j], a[r][s], b.w[2 * s], b.w[2 * s + 1]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
      const Qparams q = load_qparams(weights + r * STEP_BYTES + (chunk + 1) * UNIT_BYTES - QPARAM_BYTES, lane >> 2);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float scale = __uint_as_float(q.scale[half]);
        const float shift = fmaf(-OFFSET, scale, __uint_as_float(q.zero[half]));
#pragma unroll
        for (int j = 0; j < TOKEN_TILES; ++j)
#pragma unroll
          for (int i = 0; i < (TOKENS == 1 ? 1 : 2); ++i) {
            float& sum = sums[r][j][2 * half + i];
            sum = fmaf(scale, part[r][j][2 * half + i], fmaf(shift, x_sum[j][i], sum));
          }
      }
    }
  }
}

__device__ __forceinline__ void multiply(u32 weights, u32 x, int lane, u32 base, Sums& sums) {
  if (SCALE_SUMS) return multiply_codes(weights, x, lane, base, sums);
  Qparams q[ROW_TILES];
#pragma unroll
  for (int block = 0; block < STEP / 32; ++block) {
    const u32 unit = weights + block / (UNIT / 32) * UNIT_BYTES;
    u32 a[ROW_TILES][2][4];
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
      const u32 at = unit + r * STEP_BYTES;
      if (GROUPED && block % (UNIT / 32) == 0) q[r] = load_qparams(at + UNIT_BYTES - QPARAM_BYTES, lane >> 2);
      const u32 mine = at + block % (UNIT / 32) * BLOCK_BYTES + lane * (BLOCK_BYTES / 32);
      widen_weights(load_shared<BITS / 2>(mine), q[r], 0, a[r]);
    }
#if WARPGROUP
    begin_products();
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
      for (int s = 0; s < 2; ++s) product64(sums[r], a[r][s], descriptor(x) + slice(2 * block + s), 1);
    end_products<1>();
#else
#pragma unroll
    for (int j = 0; j < TOKEN_TILES; ++j) {
      const Words<4> b = load_matrices<4>(x + token_address(lane) + j * 8 * STRIDE + block * 64);
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r) {
        product16(sums[r][j], a[r][0], b.w[0], b.w[1]);
        product16(sums[r][j], a[r][1], b.w[2], b.w[3]);
      }
    }
#endif
  }
}

#else  // X_BITS == 8

// The block of a tile at ``at`` as the left operand of a k32 product
__device__ __forceinline__ void load_weights(u32 at, int lane, u32 (&a)[4]) {
#if BITS == 8  // 16 rows, two columns: the matrices are a0, a1 (rows 8 on), a2 (column 1), a3
  const Words<4> w = load_matrices<4>(at + lane % 16 * STRIDE + lane / 16 * 16);
  a[0] = w.w[0], a[1] = w.w[1], a[2] = w.w[2], a[3] = w.w[3];
#else  // a nibble in the high half of a byte is 16 times its value: no sign to extend
  const Words<2> w = load_shared<2>(at + lane * 8);
  a[0] = w.w[0] & 0xf0f0f0f0u, a[2] = (w.w[0] << 4) & 0xf0f0f0f0u;
  a[1] = w.w[1] & 0xf0f0f0f0u, a[3] = (w.w[1] << 4) & 0xf0f0f0f0u;
#endif
}

#if CHUNK == 0

__device__ __forceinline__ void multiply(u32 weights, u32 x, int lane, u32 base, Sums& sums) {
#pragma unroll
  for (int block = 0; block < STEP / 32; ++block) {
    u32 a[ROW_TILES][4];
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) load_weights(weights + r * STEP_BYTES + block * 32, lane, a[r]);
#if WARPGROUP
    begin_products();
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) product64(sums[r], a[r], descriptor(x) + slice(block), 1);
    end_products<1>();
#else
#pragma unroll
    for (int j = 0; j < TOKEN_TILES; ++j) {
      const Words<2> b = load_matrices<2>(x + token_address(lane % 16) + j * 8 * STRIDE + block * 32);
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r) product8(sums[r][j], a[r], b.w[0], b.w[1]);
    }
#endif
  }
}

#else  // integers in groups

// An integer below 2^22 added to 1.5 * 2^23 is the float of that sum, bit for bit: the accumulator
// starts there, and leaves as a float by one subtraction.
constexpr int MAGIC = 0x4b400000;

__device__ __forceinline__ void multiply(u32 weights, u32 x, int lane, u32 base, Sums& sums) {
  constexpr int DEPTH = UNIT / 32;
#pragma unroll
  for (int chunk = 0; chunk < STEP / UNIT; ++chunk) {
    u32 a[ROW_TILES][DEPTH][4];
    float scale[ROW_TILES][2];
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
      const u32 at = weights + r * STEP_BYTES + chunk * UNIT_BYTES;
#pragma unroll
      for (int block = 0; block < DEPTH; ++block) load_weights(at + block * BLOCK_BYTES, lane, a[r][block]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        u16 s;
        const u32 row = (lane >> 2) + 8 * half;
        asm volatile("ld.shared.b16 %0, [%1];" : "=h"(s) : "r"(at + UNIT_BYTES - QPARAM_BYTES + 2 * row));
        scale[r][half] = widen(s, 1) * 0.0625f;
      }
    }
#if WARPGROUP
    int part[ROW_TILES][TOKEN_TILES][4];
    begin_products();
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
      for (int block = 0; block < DEPTH; ++block)
        product64(part[r], a[r][block], descriptor(x) + slice(chunk * DEPTH + block), block != 0);
    end_products<0>();
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
      for (int j = 0; j < TOKEN_TILES; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[r][j][i] += scale[r][i / 2] * static_cast<float>(part[r][j][i]);
#else
#pragma unroll
    for (int j = 0; j < TOKEN_TILES; ++j) {
      Words<2> b[DEPTH];
#pragma unroll
      for (int block = 0; block < DEPTH; ++block)
        b[block] = load_matrices<2>(x + token_address(lane % 16) + j * 8 * STRIDE + (chunk * DEPTH + block) * 32);
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r) {
        int part[4] = {MAGIC, MAGIC, MAGIC, MAGIC};
#pragma unroll
        for (int block = 0; block < DEPTH; ++block) product8(part, a[r][block], b[block].w[0], b[block].w[1]);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          sums[r][j][i] += scale[r][i / 2] * (__int_as_float(part[i]) - __int_as_float(MAGIC));
      }
    }
#endif
  }
}

#endif
#endif  // X_BITS

__device__ __forceinline__ float activate(float y) {
  if (ACTIVATION == 1) return y < 0 ? 0.0f : y;
  if (ACTIVATION == 2) return 0.5f * y * (1.0f + erff(y * 0.7071067811865476f));
  if (ACTIVATION == 3) return y / (1.0f + expf(-1.5957691216057308f * (y + 0.044715f * y * y * y)));
  if (ACTIVATION == 4) return y / (1.0f + expf(-y));
  return y;
}

// What another block of the cluster has at the same place in its shared memory
__device__ __forceinline__ u32 load_remote(u32 at, int block) {
  u32 there, value;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(block));
  asm volatile("ld.shared::cluster.b32 %0, [%1];" : "=r"(value) : "r"(there) : "memory");
  return value;
}

__device__ __forceinline__ void cluster_barrier() {
  if (SPLITS == 1)
    __syncthreads();
  else
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ Sum as_sum(u32 bits, Sum*) {
  if constexpr (INTEGER && !GROUPED)
    return static_cast<int>(bits);
  else
    return __uint_as_float(bits);
}

extern "C" __global__ void __cluster_dims__(1, 1, SPLITS) __launch_bounds__(THREADS, BLOCKS) stream_linear(const Arguments p) {
  extern __shared__ __align__(1024) char memory[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int in_group = threadIdx.x % GROUP_THREADS;
  const int warp_n = warp % WARPS_N, group = warp / WARPS_N;
  const int steps = p.k / STEP;
  const int first_tile = (blockIdx.x * WARPS_N + warp_n) * ROW_TILES;
  const int first_token = blockIdx.y * TOKENS;
  constexpr int PARTS_K = SPLITS * WARPS_K;
  const int part_k = blockIdx.z * WARPS_K + group;
  const int my_steps = max(0, (steps - part_k + PARTS_K - 1) / PARTS_K);
  const u32 ring = shared_address(memory) + group * (STAGES * STAGE_BYTES);
  const u64 once = keep_policy(false), again = keep_policy(true);

  // A warp fetches its own weights. Rows past the last are the last again: computed, never stored.
  constexpr int PIECES = ROW_TILES * PIECE_ROWS * PIECE_ROW / 16;  // 16 bytes each
  constexpr int ROUNDS = (PIECES + 31) / 32;
  const u32 row_bytes = ROW_MAJOR ? p.k : p.k / UNIT * UNIT_BYTES;
  const int last = ROW_MAJOR ? p.n - 1 : (p.n + 15) / 16 - 1;
  u32 from[ROUNDS], to[ROUNDS];
#pragma unroll
  for (int i = 0; i < ROUNDS; ++i) {
    const int at = (i * 32 + lane) * 16, row = at / PIECE_ROW, part = at % PIECE_ROW;
    from[i] = min(first_tile * PIECE_ROWS + row, last) * row_bytes + part;
    to[i] = row * PIECE_STRIDE + part;
  }
  auto fetch_weights = [&](int i) {
    const u32 stage = ring + i % STAGES * STAGE_BYTES + X_BYTES + warp_n * W_BYTES;
    const char* base = p.weight + static_cast<u64>(part_k + i * PARTS_K) * PIECE_ROW;
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round)
      if (round * 32 + lane < PIECES) copy_async(stage + to[round], base + from[round], once);
  };
  // Tokens past the last are left as they are: each stays in its own column, which is not stored.
  const int tokens = min(TOKENS, p.m - first_token);
  auto fetch_x = [&](int i, bool async) {
    constexpr int PER_ROW = X_ROW / 16;
    const u32 to = ring + i % STAGES * STAGE_BYTES;
    const char* base = p.x + static_cast<u64>(first_token) * p.ldx + (part_k + i * PARTS_K) * X_ROW;
#pragma unroll
    for (int piece = 0; piece < (TOKENS * PER_ROW + GROUP_THREADS - 1) / GROUP_THREADS; ++piece) {
      const int at = piece * GROUP_THREADS + in_group, token = at / PER_ROW, part = at % PER_ROW * 16;
      if (token >= tokens) continue;
      const char* source = base + static_cast<u64>(token) * p.ldx + part;
      const u32 target = to + (WARPGROUP ? part / 128 * TOKENS * 128 + token * 128 + (part % 128 ^ token % 8 * 16)
                                         : token * STRIDE + part);
      if (async) {
        copy_async(target, source, again);
      } else {
        const uint4 v = *reinterpret_cast<const uint4*>(source);
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(target), "r"(v.x), "r"(v.y),
                     "r"(v.z), "r"(v.w));
      }
    }
  };

  // The weight is nobody's output: its first stages are on their way before x exists.
#pragma unroll
  for (int i = 0; i < AHEAD; ++i) {
    if (i < my_steps) fetch_weights(i);
    commit();
  }
  wait_for_previous_kernel();
#pragma unroll
  for (int i = 0; i < AHEAD; ++i)
    if (i < my_steps) fetch_x(i, false);

  Sums sums = {};
  for (int i = 0; i < my_steps; ++i) {
    wait_for_oldest();
    group_barrier(group);  // and everybody is done with the stage that is filled next
    if (i + AHEAD < my_steps) {
      fetch_weights(i + AHEAD);
      fetch_x(i + AHEAD, true);
    }
    commit();
    const u32 stage = ring + i % STAGES * STAGE_BYTES;
    multiply(stage + X_BYTES + warp_n * W_BYTES, stage, lane, p.base, sums);
  }

#if WARPGROUP
  end_products<0>();
#endif

  // Partial sums meet in shared memory as [group][token][row].
  constexpr int PITCH = ROWS + 4;
  Sum* parts = reinterpret_cast<Sum*>(memory);
  __syncthreads();
#pragma unroll
  for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
    for (int j = 0; j < TOKEN_TILES; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = 8 * j + 2 * (lane % 4) + i % 2;
        const int row = (warp_n * ROW_TILES + r) * 16 + lane / 4 + 8 * (i / 2);
        parts[(group * COLUMNS + token) * PITCH + row] = sums[r][j][i];
      }
  cluster_barrier();
  for (int at = blockIdx.z * THREADS + threadIdx.x; at < tokens * ROWS; at += SPLITS * THREADS) {
    const int token = at / ROWS, row = at % ROWS, n = blockIdx.x * ROWS + row, m = first_token + token;
    if (n >= p.n) continue;
    Sum sum = 0;
#pragma unroll
    for (int part = 0; part < PARTS_K; ++part) {
      Sum* from = &parts[(part % WARPS_K * COLUMNS + token) * PITCH + row];
      sum += SPLITS == 1 ? *from : as_sum(load_remote(shared_address(from), part / WARPS_K), from);
    }
    float y = static_cast<float>(sum);
    if (X_ZERO) y -= p.x_zero[m] * p.w_sum[n];
    if (X_BITS == 8) y *= p.x_scale[m];
    if (!GROUPED || X_BITS == 16) y *= p.w_scale[n] * SUM_FACTOR;
    if (BIAS_TYPE == 3) y += static_cast<const float*>(p.bias)[n];
    if (BIAS_TYPE == 1 || BIAS_TYPE == 2) y += widen(static_cast<const u16*>(p.bias)[n], BIAS_TYPE);
    y = activate(y);
    const u64 to = static_cast<u64>(m) * p.n + n;
    if (Y_TYPE == 3)
      static_cast<float*>(p.y)[to] = y;
    else
      static_cast<u16*>(p.y)[to] = narrow(y, Y_TYPE);
  }
  if (SPLITS > 1) cluster_barrier();  // its sums may still be read
}

// The weight itself, [rows, k] in the activations' type, for products that are worth a library's
// kernel: channels first_tile * 16 onwards, one warp for each tile and UNIT of k.

struct Unpacked {
  const char* weight;
  const float* w_scale;
  u16* out;
  int n, k, first_tile, tiles;
};

__device__ __forceinline__ float weight_at(const Words<BITS / 2>& w, int half, int kk) {
#if BITS == 8
  const int byte = kk % 4 == 1 ? 2 : kk % 4 == 2 ? 1 : kk % 4;  // (k, k + 1) are (bytes 0 and 2), (1 and 3)
  const u32 code = w.w[2 * half + kk / 4] >> (8 * byte) & 0xff;
#if FLOAT8
  u32 pair;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(static_cast<u16>(code)));
  return widen(static_cast<u16>(pair), 2);
#else
  return static_cast<float>(static_cast<int>(code) - 128);
#endif
#elif BITS == 4
  const int nibble = X_BITS == 16 ? kk % 2 * 4 + kk / 2 : kk < 4 ? 2 * kk + 1 : 2 * (kk - 4);
  const int code = w.w[half] >> (4 * nibble) & 0xf;
  return static_cast<float>(X_BITS == 16 ? code - 8 : (code ^ 8) - 8);
#else
  return static_cast<float>(static_cast<int>(w.w[0] >> (2 * (half * 4 + kk / 2 + kk % 2 * 8)) & 3) - 2);
#endif
}

extern "C" __global__ void __launch_bounds__(256) stream_dequantize(const Unpacked p) {
  const int lane = threadIdx.x % 32, units = p.k / UNIT;
  const int job = blockIdx.x * 8 + threadIdx.x / 32;
  if (job >= p.tiles * units) return;
  const int tile = job / units, unit = job % units;
  const char* from = p.weight + (static_cast<u64>(p.first_tile + tile) * units + unit) * UNIT_BYTES;
  float scale[2], zero[2] = {0, 0};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
    const u16* qparams = reinterpret_cast<const u16*>(from + UNIT_BYTES - QPARAM_BYTES);
    const float power = X_BITS == 16 ? p.w_scale[min((p.first_tile + tile) * 16 + row, p.n - 1)] : 1.0f;
    scale[half] = power * (GROUPED ? widen(qparams[ZERO ? 2 * row : row], 1) : 1.0f);
    if (ZERO) zero[half] = power * widen(qparams[2 * row + 1], 1);
  }
#pragma unroll
  for (int block = 0; block < UNIT / 32; ++block) {
    Words<BITS / 2> w;
    const u32* words = reinterpret_cast<const u32*>(from + block * BLOCK_BYTES) + lane * (BITS / 2);
#pragma unroll
    for (int i = 0; i < BITS / 2; ++i) w.w[i] = __ldg(words + i);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = tile * 16 + lane / 4 + 8 * half;
      u16* to = p.out + static_cast<u64>(row) * p.k + unit * UNIT + block * 32;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const u32 low = narrow(weight_at(w, half, 2 * i) * scale[half] + zero[half], Y_TYPE);
        const u32 high = narrow(weight_at(w, half, 2 * i + 1) * scale[half] + zero[half], Y_TYPE);
        const int first = X_BITS == 16 ? i * 8 + lane % 4 * 2 : i / 2 * 16 + lane % 4 * 4 + i % 2 * 2;
        if (p.first_tile * 16 + row < p.n) *reinterpret_cast<u32*>(to + first) = low | high << 16;
      }
    }
  }
}
