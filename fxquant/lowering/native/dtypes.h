// Activations and results in memory: float32, bfloat16 and float16, sixteen at a time as float32.
#pragma once
#include "vec.h"

enum Dtype : int { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, INT8 = 3 };

INLINE int64_t size_of(Dtype dtype) { return dtype == FLOAT32 ? 4 : dtype == INT8 ? 1 : 2; }

// bfloat16: the upper half of a float32; to nearest, halves to even.
INLINE f32x16 from_bf16(const u16x16& v) { return bits<f32x16>(convert<u32x16>(v) << 16); }
INLINE u16x16 to_bf16(const f32x16& v) {
#ifdef FXQUANT_BF16
  return (u16x16)_mm512_cvtneps_pbh((__m512)v);
#else
  const u32x16 u = bits<u32x16>(v), nan = bits<u32x16>(v != v);
  const u32x16 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return convert<u16x16>((nan & ((u >> 16) | 0x40u)) | (~nan & rounded));
#endif
}

// float16, where there is no instruction for it: exact, or to nearest with halves to even.
inline float half_to_float(uint16_t h) {
  const uint32_t magnitude = uint32_t(h & 0x7fff) << 13, sign = uint32_t(h & 0x8000) << 16;
  float value = bits<float>(magnitude + (112u << 23));
  if ((h & 0x7c00) == 0x7c00) value = bits<float>(magnitude | 0x7f800000u);
  if ((h & 0x7c00) == 0) value = float(h & 0x3ff) * 0x1p-24f;  // subnormal
  return bits<float>(bits<uint32_t>(value) | sign);
}
inline uint16_t float_to_half(float f) {
  const uint32_t u = bits<uint32_t>(f), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 rounds to infinity
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 rounds to a multiple of 2^-24
    const float shifted = bits<float>(magnitude) + 0.5f;
    return uint16_t(sign | (bits<uint32_t>(shifted) - bits<uint32_t>(0.5f)));
  }
  return uint16_t(sign | ((magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13));
}

INLINE f32x16 from_half(const u16x16& v) {
#ifdef FXQUANT_AVX512
  return (f32x16)_mm512_cvtph_ps((__m256i)v);
#else
  uint16_t half[16];
  float value[16];
  store(half, v);
  for (int i = 0; i < 16; i++) value[i] = half_to_float(half[i]);
  return load<f32x16>(value);
#endif
}
INLINE u16x16 to_half(const f32x16& v) {
#ifdef FXQUANT_AVX512
  return (u16x16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#else
  uint16_t half[16];
  float value[16];
  store(value, v);
  for (int i = 0; i < 16; i++) half[i] = float_to_half(value[i]);
  return load<u16x16>(half);
#endif
}

INLINE f32x16 load_as_float(const void* p, Dtype dtype) {
  if (dtype == FLOAT32) return load<f32x16>(p);
  if (dtype == INT8) return convert<f32x16>(load<i8x16>(p));
  const u16x16 v = load<u16x16>(p);
  return dtype == BFLOAT16 ? from_bf16(v) : from_half(v);
}
INLINE void store_float(void* p, Dtype dtype, const f32x16& v) {
  if (dtype == FLOAT32) return void(store(p, v));
  const u16x16 half = dtype == BFLOAT16 ? to_bf16(v) : to_half(v);
  store(p, half);
}

// The first `count` only (at most 16), then zeros.
INLINE f32x16 load_some(const void* p, Dtype dtype, int64_t count) {
  if (count >= 16) return load_as_float(p, dtype);
  char buffer[64] = {};
  std::memcpy(buffer, p, size_t(count * size_of(dtype)));
  return load_as_float(buffer, dtype);
}
