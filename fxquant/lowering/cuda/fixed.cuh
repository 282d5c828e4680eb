// One row of activations as integers: 4-bit weights times it by the int8 tensor cores. Codes become bytes in fewer
// instructions than floats, and a product takes twice as many: in all a fourth fewer.
//
// Values that share a weight's group are fixed-point numbers: integers of 23 bits with a power of two as their
// scale, in three bytes ("planes"), each a column of the right operand. A bfloat16 that is within 2^-14 of the
// group's largest is kept whole; what others lose is at most 2^-22 of that one, little more than in a float32 sum.
// (Of a group whose largest is below 2^-105 it is more, at most 2^-127.)

constexpr int PLANES = 3;
constexpr int FIXED_GROUP = 2 * sizeof(float);  // the scale of a group, and the sum of its activations
constexpr int FIXED_BYTES = STEP * PLANES + STEP / UNIT * FIXED_GROUP;  // of STEP activations

// The signed digits of four numbers below 2^22 for base 256, as one word for each digit, the highest first
__device__ __forceinline__ void digits(const int (&q)[4], u32 (&planes)[PLANES]) {
  planes[0] = planes[1] = planes[2] = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int rest = q[i];
#pragma unroll
    for (int plane = PLANES - 1; plane >= 0; --plane) {
      const int digit = static_cast<signed char>(rest);
      planes[plane] |= (static_cast<u32>(digit) & 0xff) << (8 * i);
      rest = (rest - digit) >> 8;
    }
  }
}

// Four lanes have 32 activations from ``k`` on, lane t the eight k that lane 4 g + t has of its rows' weights: the k of
// the even nibbles of a word, then of the odd ones. All lanes take part; ``kept``: whether this one stores.
__device__ __forceinline__ void fix(const u16* x, int k, u32 to, int item, bool kept) {
  const int t = item % 4, block = item / 4 % (STEP / 32);
  float v[8];
  u32 largest = 0;
  float sum = 0.0f;
#pragma unroll
  for (int column = 0; column < 4; ++column) {
    const u32 pair = *reinterpret_cast<const u32*>(x + k + 8 * column + 2 * t);
    v[2 * column] = widen(static_cast<u16>(pair), X_HALF ? 2 : 1);
    v[2 * column + 1] = widen(static_cast<u16>(pair >> 16), X_HALF ? 2 : 1);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) largest = max(largest, __float_as_uint(v[i]) & 0x7fffffffu), sum += v[i];
#pragma unroll
  for (int lanes = 1; lanes < UNIT / 8; lanes *= 2) {
    largest = max(largest, __shfl_xor_sync(~0u, largest, lanes));
    sum += __shfl_xor_sync(~0u, sum, lanes);
  }
  // the exponent, not below one whose scale and its inverse are normal numbers; of infinity and NaN the scale is NaN
  const int exponent = max(static_cast<int>(largest >> 23), 22);
  const float inverse = __uint_as_float((127 + 148 - exponent) << 23);
  const float scale = exponent == 255 ? __uint_as_float(0x7fc00000u) : __uint_as_float((127 - 148 + exponent) << 23);
  int q[2][4];
#pragma unroll
  for (int i = 0; i < 8; ++i) q[i / 2 % 2][i / 4 + 2 * (i % 2)] = __float2int_rn(v[i] * inverse);
  if (!kept) return;
  u32 even[PLANES], odd[PLANES];
  digits(q[0], even);
  digits(q[1], odd);
#pragma unroll
  for (int plane = 0; plane < PLANES; ++plane)
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to + (block * PLANES + plane) * 32 + t * 8), "r"(even[plane]),
                 "r"(odd[plane])
                 : "memory");
  if (item % (UNIT / 8) == 0)
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to + STEP * PLANES + block / (UNIT / 32) * FIXED_GROUP), "f"(scale),
                 "f"(sum)
                 : "memory");
}

// Of the planes' sums in lanes t = 0 (two) and 1 to the sum of what they stand for; codes are 16 times their value.
__device__ __forceinline__ float joined(float first, float second, int t) {
  const float sum = t == 0 ? 4096.0f * first + 16.0f * second : t == 1 ? 0.0625f * first : 0.0f;
  return sum + __shfl_xor_sync(~0u, sum, 1);
}

// signs: 0x80 in each byte, which makes unsigned nibbles in their high halves signed
__device__ __forceinline__ void multiply_fixed(u32 weights, u32 x, int lane, u32 signs, Sums& sums) {
  const u32 mine = x + lane / 4 % PLANES * 32 + lane % 4 * 8;  // columns past the third repeat them: nobody looks
  const float first = lane % 4 == 0 ? 1 / 4096.0f : 0.0f;      // the zero point's part joins the first plane's sum
#pragma unroll
  for (int chunk = 0; chunk < STEP / UNIT; ++chunk) {
    int part[ROW_TILES][4] = {};
#pragma unroll
    for (int block = 0; block < UNIT / 32; ++block) {
      const Words<2> b = load_shared<2>(mine + (chunk * (UNIT / 32) + block) * PLANES * 32);
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r) {
        const u32 at = weights + r * STEP_BYTES + chunk * UNIT_BYTES + block * BLOCK_BYTES;
        const Words<2> w = load_shared<2>(at + lane * 8);
        u32 a[4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          a[half] = (w.w[half] << 4 & 0xf0f0f0f0u) ^ signs;
          a[half + 2] = (w.w[half] & 0xf0f0f0f0u) ^ signs;
        }
        product8(part[r], a, b.w[0], b.w[1]);
      }
    }
    float scale, sum;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                 : "=f"(scale), "=f"(sum)
                 : "r"(x + STEP * PLANES + chunk * FIXED_GROUP));
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
      const Qparams q = load_qparams(weights + r * STEP_BYTES + (chunk + 1) * UNIT_BYTES - QPARAM_BYTES, lane >> 2);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Sum* to = &sums[r][0][2 * half];
        const float by = __uint_as_float(q.scale[half]) * scale;
        to[0] = fmaf(by, static_cast<float>(part[r][2 * half]), to[0]);
        to[1] = fmaf(by, static_cast<float>(part[r][2 * half + 1]), to[1]);
        if (ZERO) to[0] = fmaf(__uint_as_float(q.zero[half]), sum * first, to[0]);
      }
    }
  }
}
