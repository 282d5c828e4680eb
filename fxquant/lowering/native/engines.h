// How a packed weight meets an activation: one struct for each (instruction, format).
//
// A packed vector is 16 lanes of 32 bits, one lane for each of 16 output channels, STEP = 32 / bits
// codes in a lane. An engine turns it into WORDS operands of DEPTH codes each, and multiplies every
// operand with a word of DEPTH activations that it broadcasts to all lanes. An
// operand exceeds the value that its code stands for by OFFSET, which the start of the accumulator,
// -OFFSET * sum(x), makes good.
#pragma once
#include "dtypes.h"

enum Format : int { U8 = 0, E4M3 = 1, U4 = 2, U2 = 3, U4_BYTES = 4 };

constexpr int bits_of(Format f) { return f == U8 || f == E4M3 ? 8 : f == U2 ? 2 : 4; }
constexpr bool grouped(Format f) { return bits_of(f) < 8; }

// The bit at which code k of a lane starts. U4_BYTES, for integer products, has four codes in the
// low nibbles of its bytes and the next four in the high ones. U4 and U2, for float products, have
// a code in each half of the lane, so that a shift of the halves yields the next pair.
constexpr int place(Format f, int k) {
  if (f == U8 || f == E4M3) return 8 * k;
  if (f == U4_BYTES) return 8 * (k % 4) + 4 * (k / 4);
  return 16 * (k % 2) + bits_of(f) * (k / 2);
}

INLINE int32_t sum_of(const int8_t* x, int64_t count) {
  int32_t sum = 0;
  int64_t k = 0;
#ifdef FXQUANT_VNNI
  __m512i lanes = _mm512_setzero_si512();
  for (; k + 64 <= count; k += 64) {
    lanes = _mm512_dpbusd_epi32(lanes, _mm512_set1_epi8(1), _mm512_loadu_si512(x + k));
  }
  sum = _mm512_reduce_add_epi32(lanes);
#endif
  for (; k < count; k++) sum += x[k];
  return sum;
}
template <class X>
INLINE float sum_of(const X* x, int64_t count) {
  f32x16 lanes = {};
  constexpr Dtype dtype = sizeof(X) == 4 ? FLOAT32 : BFLOAT16;
  for (int64_t k = 0; k < count; k += 16) lanes = lanes + load_some(x + k, dtype, count - k);
  float lane[16], sum = 0;
  store(lane, lanes);
  for (float value : lane) sum += value;
  return sum;
}

#ifdef FXQUANT_VNNI
template <Format F>
struct Vnni {
  using X = int8_t;
  using Sum = int32_t;
  using Acc = i32x16;
  using Word = u32x16;
  static constexpr Format FORMAT = F;
  static constexpr bool PREFETCH = false;
  static constexpr int STEP = 32 / bits_of(F), DEPTH = 4, WORDS = STEP / DEPTH;
  static constexpr int OFFSET = 1 << (bits_of(F) - 1);
  static constexpr bool CONVERTS = false;
  static INLINE Word broadcast(const X* x) { return load<uint32_t>(x) - Word{}; }
  static INLINE Acc dot(const Acc& acc, const Word& x, const Word& w) {  // w unsigned, x signed, no saturation
    return (Acc)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
  }
  static INLINE Word operand(const u32x16& packed, int j) {
    return F == U8 ? packed : (packed >> (4 * j)) & 0x0f0f0f0fu;
  }
};
#endif

#ifdef FXQUANT_BF16

// Every code as a bfloat16, split in two tables of bytes (8-bit formats), or one of words.
struct Bf16Tables {
  alignas(64) uint8_t low[2][128], high[2][128];  // U8, E4M3
  alignas(64) uint16_t word[2][32];               // U4, U2
  // Loaded, not a constant: of that, GCC makes an instruction that waits for an unrelated register.
  uint32_t ones = ~0u;
  Bf16Tables() {
    for (int i = 0; i < 128; i++) {
      int subnormal = i < 8;
      float e4m3 = i == 127 ? __builtin_nanf("")
                            : bits<float>(uint32_t(i << 20) + (uint32_t(120 + subnormal) << 23)) -
                                  (subnormal ? 0x1p-6f : 0.0f);
      float value[2] = {float(i) + 0.5f, e4m3};
      for (int f = 0; f < 2; f++) {
        low[f][i] = uint8_t(bits<uint32_t>(value[f]) >> 16);
        high[f][i] = uint8_t(bits<uint32_t>(value[f]) >> 24);
      }
    }
    for (int i = 0; i < 32; i++) {  // only the code's own bits count: the rest belongs to others
      word[0][i] = uint16_t(bits<uint32_t>(float(i % 16 - 8)) >> 16);
      word[1][i] = uint16_t(bits<uint32_t>(float(i % 4 - 2)) >> 16);
    }
  }
};
static Bf16Tables tables;

template <Format F>
struct Bf16 {
  using X = uint16_t;
  using Sum = float;
  using Acc = f32x16;
  using Word = u32x16;
  static constexpr Format FORMAT = F;
  static constexpr bool PREFETCH = false;
  static constexpr int STEP = 32 / bits_of(F), DEPTH = 2, WORDS = STEP / DEPTH;
  static constexpr float OFFSET = F == U8 ? 0.5f : 0.0f;
  static constexpr bool CONVERTS = false;
  static INLINE Word broadcast(const X* x) { return load<uint32_t>(x) - Word{}; }
  static INLINE Acc dot(const Acc& acc, const Word& x, const Word& w) {
    return (Acc)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)x);
  }
  static INLINE Word operand(const u32x16& packed, int j) {
    if constexpr (grouped(F)) {
      __m512i at = _mm512_srli_epi16((__m512i)packed, unsigned(bits_of(F) * j));
      return (Word)_mm512_permutexvar_epi16(at, _mm512_load_si512(tables.word[F == U2]));
    } else {
      // Bytes from (channel, k) to (pair of k, channel, k) order, so that unpacking ends in lanes.
      const __m512i pairs = _mm512_broadcast_i32x4(
          _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
      __m512i code = _mm512_shuffle_epi8((__m512i)packed, pairs), sign = code;
      if constexpr (F == U8) {  // w + 1/2 is odd about 0: of code and ~code, look up the larger
        sign = _mm512_xor_si512(code, _mm512_set1_epi32(int(tables.ones)));
        code = _mm512_max_epu8(code, sign);
      }
      const uint8_t *l = tables.low[F == E4M3], *h = tables.high[F == E4M3];
      __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(l), code, _mm512_load_si512(l + 64));
      __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(h), code, _mm512_load_si512(h + 64));
      const int OR_AND = 0xf8;  // a | (b & c)
      high = _mm512_ternarylogic_epi32(high, sign, _mm512_set1_epi8(char(0x80)), OR_AND);
      return (Word)(j ? _mm512_unpackhi_epi8(low, high) : _mm512_unpacklo_epi8(low, high));
    }
  }
};
#endif

template <Format F>
struct Float32 {
  using X = float;
  using Sum = float;
  using Acc = f32x16;
  using Word = f32x16;
  static constexpr Format FORMAT = F;
  static constexpr bool PREFETCH = false;
  static constexpr int STEP = 32 / bits_of(F), DEPTH = 1, WORDS = STEP;
  static constexpr int OFFSET = 0;
  static constexpr bool CONVERTS = true;
  static INLINE Word broadcast(const X* x) { return splat(*x); }
  static INLINE Acc dot(const Acc& acc, const Word& x, const Word& w) { return acc + x * w; }
  static INLINE Word operand(const u32x16& packed, int j) {
#ifdef FXQUANT_BF16
    if constexpr (F != U8 && F != U4_BYTES) {  // a bfloat16 is the upper half of a float32
      u32x16 pair = Bf16<F>::operand(packed, j / 2);
      return bits<f32x16>(j % 2 ? pair & 0xffff0000u : pair << 16);
    }
#endif
    u32x16 code = (packed >> place(F, j)) & ((1u << bits_of(F)) - 1);
    if constexpr (F == E4M3) {
      u32x16 magnitude = code & 0x7f, sign = (code & 0x80) << 24;
      // Rebias the exponent; a subnormal is 2^-6 too large when read as a normal number.
      f32x16 normal = bits<f32x16>((magnitude << 20) + (120u << 23));
      f32x16 subnormal = bits<f32x16>((magnitude << 20) + (121u << 23)) - 0x1p-6f;
      u32x16 nan = bits<u32x16>(magnitude == 0x7fu);
      f32x16 value = choose(bits<i32x16>(magnitude < 8u), subnormal, normal);
      return bits<f32x16>(bits<u32x16>(value) | sign | (nan & 0x7fc00000u));
    } else {
      // In the last bits of a float at 2^23 an integer stands for itself.
      return bits<f32x16>(code | 0x4b000000u) - (0x1p23f + float(1 << (bits_of(F) - 1)));
    }
  }
};

// Operands that have been decoded into memory: one word to a step.
template <class E>
struct Decoded : E {
  static constexpr int STEP = E::DEPTH, WORDS = 1;
  static constexpr bool PREFETCH = true;
  static INLINE typename E::Word operand(const u32x16& packed, int) {
    return bits<typename E::Word>(packed);
  }
};
