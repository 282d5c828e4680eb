// One row of activations, quantized per token by every block that multiplies it, as ``fxquant.quantize`` does
// (affine.py), bit for bit but for the sign of float8's zeros. A kernel ahead of this one that does it alone costs 2 to
// 4 us, a third of a small product; here weights are on their way meanwhile.

static_assert(X_TYPE == 0 || (TOKENS == 1 && !WARPGROUP && X_BITS == 8), "one row becomes codes");

constexpr int LOADED = X_TYPE == 3 ? 4 : 8;  // numbers in 16 bytes
constexpr int WARPS = THREADS / 32, EXTREMES = 3;
constexpr int ROW_SCALE = EXTREMES * 32 * 4;             // where its scale is, and its zero point
constexpr int ROW_CODES = X_TYPE ? ROW_SCALE + 128 : 0;  // and where its codes begin
constexpr float HALF_RANGE = FLOAT8 ? 448.0f : 127.5f;   // of the codes
constexpr float SMALLEST = 1.17549435e-38f, LARGEST = 3.40282347e38f;

struct Row {
  float scale, inverse;
  int zero;
};

__device__ __forceinline__ void load_numbers(const char* x, int k, float (&v)[LOADED]) {
  const uint4 w = *reinterpret_cast<const uint4*>(x + k * (16 / LOADED));
  const u32 words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
  for (int i = 0; i < LOADED; ++i)
    v[i] = X_TYPE == 3 ? __uint_as_float(words[i % 4]) : widen(static_cast<u16>(words[i / 2 % 4] >> (16 * (i % 2))), X_TYPE);
}

// Scale and zero point of x[k], the same in all threads; ``memory``: EXTREMES * 32 words
__device__ __forceinline__ Row row_of(const char* x, int k, u32* memory) {
  u32 found[EXTREMES] = {};  // |x|, x and -x, where they are above 0: their bits are in order. Those of a NaN are last
#pragma unroll 4
  for (int at = threadIdx.x * LOADED; at < k; at += THREADS * LOADED) {
    float v[LOADED];
    load_numbers(x, at, v);
#pragma unroll
    for (int i = 0; i < LOADED; ++i) {
      found[0] = max(found[0], __float_as_uint(v[i]) & 0x7fffffffu);
      if (X_ZERO) found[1] = max(found[1], __float_as_uint(fmaxf(v[i], 0.0f)));
      if (X_ZERO) found[2] = max(found[2], __float_as_uint(fmaxf(-v[i], 0.0f)));
    }
  }
#pragma unroll
  for (int e = 0; e < (X_ZERO ? EXTREMES : 1); ++e) {
    found[e] = __reduce_max_sync(~0u, found[e]);
    if (threadIdx.x % 32 == 0) memory[32 * e + threadIdx.x / 32] = found[e];
  }
  __syncthreads();
#pragma unroll
  for (int e = 0; e < (X_ZERO ? EXTREMES : 1); ++e)
    found[e] = __reduce_max_sync(~0u, memory[32 * e + threadIdx.x % WARPS]);
  const float high = __uint_as_float(found[1]), low = -__uint_as_float(found[2]);
  const float radius = X_ZERO ? __fsub_rn(0.5f * high, 0.5f * low) : __uint_as_float(found[0]);
  Row row;
  row.scale = radius == 0 ? 1.0f : fminf(fmaxf(__fmul_rn(radius, static_cast<float>(1.0 / HALF_RANGE)), SMALLEST), LARGEST);
  const bool finite = found[0] <= __float_as_uint(LARGEST);
  row.zero = X_ZERO && finite ? max(min(-128 - __float2int_rn(__fdiv_rn(low, row.scale)), 127), -128) : 0;
  row.inverse = __fdiv_rn(1.0f, row.scale);
  if (!finite) row.scale = __uint_as_float(0x7fc00000u);
  return row;
}

// The code of a number; in a row that is not finite, whose scale is NaN, any
__device__ __forceinline__ u32 code_of(float v, const Row& row) {
  if (!FLOAT8) return max(min(__float2int_rn(__fmul_rn(v, row.inverse)) + row.zero, 127), -128) & 0xff;
  // the quotient, rounded once (Markstein 1990, IBM J. Res. Dev. 34), but for subnormal ones
  const float near = __fmul_rn(v, row.inverse), quotient = fmaf(fmaf(-near, row.scale, v), row.inverse, near);
  u16 pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(quotient));
  return pair & 0xff;
}

// LOADED codes of x from k on
__device__ __forceinline__ void store_codes(const char* x, int k, const Row& row, u32 to) {
  float v[LOADED];
  load_numbers(x, k, v);
#pragma unroll
  for (int first = 0; first < LOADED; first += 4) {
    u32 codes = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) codes |= code_of(v[first + i], row) << (8 * i);
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to + first), "r"(codes) : "memory");
  }
}
