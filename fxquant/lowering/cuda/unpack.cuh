// Codes to 16-bit floats, in registers.

constexpr u32 MINUS_ZERO = 0x80008000u;

// Codes are floats as they are: u below 256 in the low bits of a bfloat16 is u * 2^-133 (of a float16,
// u * 2^-24), because numbers below the second exponent are evenly spaced. One fma brings it to
// (u - middle) * 2^-7 (2^-9), exactly. What lies ``shift`` bits further up in the byte needs no shift.
__device__ __forceinline__ constexpr u32 raise(int shift) {  // 2^(15 - shift), 2^(126 - shift): twice
  return (X_HALF ? (30 - shift) << 10 : (253 - shift) << 7) * 0x10001u;
}
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
      // (for 8-bit products the second half of a block's k comes first, and codes keep their sign)
      u32& out = a[p / 2][2 * (WIDENED ? 1 - p % 2 : p % 2) + half];
      if constexpr (BITS <= 4) {
        const int at = BITS == 4 ? 4 * p : 2 * p + 8 * half, shift = SCALE_SUMS ? 0 : at % 8;
        const u32 word = w.w[BITS == 4 ? half % (BITS / 2) : 0] >> (at - shift);
        const u32 mask = (BITS == 4 ? 0x000f000fu : 0x00030003u) << shift;
        const u32 codes = (word & mask) ^ (WIDENED ? 0x00080008u << shift : 0u);
        out = SCALE_SUMS ? codes | base : fma2(fma2(codes, raise(shift), CENTER), q.scale[half], q.zero[half]);
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
        out = fma2(codes, raise(0), CENTER);
      }
    }
}
