// Activations on the float32 result, before it is rounded and stored.
#pragma once
#include "vec.h"

enum Activation : int { NONE = 0, RELU = 1, GELU = 2, GELU_TANH = 3, SILU = 4 };

// e^v, for v clamped to what float32 can hold; relative error 2e-7. NaN stays NaN.
INLINE f32x16 exp(f32x16 v) {
  f32x16 x = choose(v > 88.0f, splat(88.0f), choose(v < -87.0f, splat(-87.0f), v));
  f32x16 shifted = x * 1.44269504f + 0x1.8p23f;  // the integer nearest to x / ln 2, in the low bits
  f32x16 n = shifted - 0x1.8p23f;
  f32x16 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  f32x16 p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return bits<f32x16>(bits<i32x16>(p) + (bits<i32x16>(shifted) << 23));
}

INLINE f32x16 sigmoid(f32x16 v) { return 1.0f / (1.0f + exp(-v)); }

// 0.5 * v * (1 + erf(v / sqrt 2)), by Abramowitz and Stegun 7.1.26: erf within 1.5e-7.
INLINE f32x16 gelu(f32x16 v) {
  f32x16 z = v * 0.70710678f;
  f32x16 a = choose(z < 0.0f, -z, z);
  f32x16 t = 1.0f / (1.0f + 0.3275911f * a);
  f32x16 p = splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  f32x16 tail = p * t * exp(-a * a);  // 1 - erf(a)
  return 0.5f * v * choose(z < 0.0f, tail, 2.0f - tail);
}

inline __attribute__((noinline)) f32x16 activate(Activation activation, f32x16 v) {
  switch (activation) {
    case RELU:
      return choose(v < 0.0f, f32x16{}, v);
    case GELU:
      return gelu(v);
    case GELU_TANH:
      return v * sigmoid(1.59576912f * (v + 0.044715f * v * v * v));
    case SILU:
      return v * sigmoid(v);
    default:
      return v;
  }
}
