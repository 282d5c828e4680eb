// Sixteen-lane vectors. Compiler vector extensions, so that every line here is portable: they
// become one register with AVX-512, two with AVX2, four with NEON.
#pragma once
#include <cstdint>
#include <cstring>

// FXQUANT_PORTABLE leaves out everything that needs an instruction set.
#if defined(__x86_64__) && !defined(FXQUANT_PORTABLE)
#include <immintrin.h>
#ifdef __AVX512F__
#define FXQUANT_AVX512 1
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define FXQUANT_VNNI 1
#endif
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define FXQUANT_BF16 1
#endif
#endif

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

#define INLINE inline __attribute__((always_inline))

enum Dtype : int { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, INT8 = 3 };

template <class T>
INLINE T load(const void* p) {
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

INLINE f32x16 splat(float v) { return v - f32x16{}; }
INLINE i32x16 splat(int32_t v) { return v - i32x16{}; }

INLINE f32x16 to_float(i32x16 v) { return __builtin_convertvector(v, f32x16); }
INLINE f32x16 to_float(f32x16 v) { return v; }

template <class To, class From>
INLINE To bits(From v) {
  static_assert(sizeof(To) == sizeof(From));
  return load<To>(&v);
}

// bfloat16: the upper half of a float32.
INLINE f32x16 from_bf16(u16x16 v) {
  return bits<f32x16>(__builtin_convertvector(v, u32x16) << 16);
}
INLINE u16x16 to_bf16(f32x16 v) {
#ifdef FXQUANT_BF16
  return (u16x16)_mm512_cvtneps_pbh((__m512)v);
#else
  u32x16 u = bits<u32x16>(v);
  u32x16 rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;  // to nearest, halves to even
  u32x16 nan = (u32x16)(v != v);
  return __builtin_convertvector((nan & ((u >> 16) | 0x40)) | (~nan & rounded), u16x16);
#endif
}

// float16: by bits, where there is no instruction. Both are exact or rounded to nearest even.
INLINE float half_to_float(uint16_t h) {
  uint32_t magnitude = uint32_t(h & 0x7fff) << 13, sign = uint32_t(h & 0x8000) << 16;
  float value;
  if ((h & 0x7c00) == 0x7c00) {
    value = bits<float>(magnitude | 0x7f800000);
  } else if (h & 0x7c00) {
    value = bits<float>(magnitude + (112u << 23));
  } else {  // subnormal: the integer h & 0x3ff times 2^-24
    value = float(h & 0x3ff) * 0x1p-24f;
  }
  return bits<float>(bits<uint32_t>(value) | sign);
}
INLINE uint16_t float_to_half(float f) {
  uint32_t u = bits<uint32_t>(f), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 rounds to infinity
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24
    float shifted = bits<float>(magnitude) + 0.5f;
    return uint16_t(sign | (bits<uint32_t>(shifted) - bits<uint32_t>(0.5f)));
  }
  return uint16_t(sign | ((magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13));
}

INLINE f32x16 load_as_float(const void* p, Dtype dtype) {
  if (dtype == FLOAT32) return load<f32x16>(p);
  u16x16 v = load<u16x16>(p);
  if (dtype == BFLOAT16) return from_bf16(v);
#ifdef FXQUANT_AVX512
  return (f32x16)_mm512_cvtph_ps((__m256i)v);
#else
  f32x16 f;
  for (int i = 0; i < 16; i++) f[i] = half_to_float(v[i]);
  return f;
#endif
}

INLINE void store_float(void* p, Dtype dtype, f32x16 v) {
  if (dtype == FLOAT32) return void(std::memcpy(p, &v, sizeof v));
  u16x16 h;
  if (dtype == BFLOAT16) {
    h = to_bf16(v);
  } else {
#ifdef FXQUANT_AVX512
    h = (u16x16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#else
    for (int i = 0; i < 16; i++) h[i] = float_to_half(v[i]);
#endif
  }
  std::memcpy(p, &h, sizeof h);
}

INLINE int64_t size_of(Dtype dtype) { return dtype == FLOAT32 ? 4 : dtype == INT8 ? 1 : 2; }

// The first `count` (at most 16) elements only.
INLINE f32x16 load_some(const void* p, Dtype dtype, int64_t count) {
  if (count >= 16) return load_as_float(p, dtype);
  char buffer[64] = {};
  std::memcpy(buffer, p, size_t(count * size_of(dtype)));
  return load_as_float(buffer, dtype);
}
INLINE void store_some(void* p, Dtype dtype, f32x16 v, int64_t count) {
  if (count >= 16) return store_float(p, dtype, v);
  char buffer[64];
  store_float(buffer, dtype, v);
  std::memcpy(p, buffer, size_t(count * size_of(dtype)));
}
