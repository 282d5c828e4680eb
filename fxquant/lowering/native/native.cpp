// The C interface, called through ctypes: fxquant/lowering/native.py says what it is given.
#include "linear.h"

template <Format F>
static int run_float(const Linear& t) {
#ifdef FXQUANT_BF16
  if (t.x_dtype == BFLOAT16) return run<Bf16<F>>(t);
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
      return t.x_dtype == INT8 ? run<Integer<U8>>(t) : run_float<U8>(t);
    case U4:
      return t.x_dtype == INT8 ? run<Integer<U4>>(t) : run_float<U4>(t);
    case U2:
      return t.x_dtype == INT8 ? 2 : run_float<U2>(t);
    case E4M3:
      return t.x_dtype == INT8 ? 2 : run_float<E4M3>(t);
  }
  return 2;
}
