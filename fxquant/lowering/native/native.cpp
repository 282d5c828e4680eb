// The C interface, called through ctypes: fxquant/lowering/native.py says what it is given.
#include "linear.h"

// Sums of float products are in float32; of integer ones in int32 where there is an instruction for
// it, else in float32, in which they are exact up to 2^24: the whole of a group, or of a span.
template <Format F>
static int run_as(const Linear& t) {
#ifdef FXQUANT_VNNI
  if constexpr (F == U8 || F == U4_BYTES) {
    if (t.x_dtype == INT8) return run<Vnni<F>>(t);
  }
#endif
#ifdef FXQUANT_BF16
  if constexpr (F != U4_BYTES) {
    if (t.x_dtype == BFLOAT16) return run<Bf16<F>>(t);
  }
#endif
  return run<Float32<F>>(t);
}

extern "C" int fxquant_linear(
    int64_t m, int64_t n, int64_t k, int64_t groups, int format, int activation, int threads,
    const void* x, int x_dtype, const float* x_scale, const int32_t* x_zero, const uint8_t* weight,
    const void* scale, const uint16_t* zero, const float* weight_sum, const void* bias,
    int bias_dtype, void* y, int y_dtype) {
  const Linear t{m,       n,       k,      groups, Dtype(x_dtype), Dtype(y_dtype),
                 Dtype(bias_dtype), Activation(activation), threads, x, x_scale, x_zero,
                 weight,  scale,   zero,   weight_sum, bias, (char*)y};
  switch (Format(format)) {
    case U8:
      return run_as<U8>(t);
    case E4M3:
      return run_as<E4M3>(t);
    case U4:
      return run_as<U4>(t);
    case U2:
      return run_as<U2>(t);
    case U4_BYTES:
      return run_as<U4_BYTES>(t);
  }
  return 2;
}
