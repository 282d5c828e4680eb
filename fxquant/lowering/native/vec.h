// Vectors of sixteen lanes, in plain C++ with compiler vectors: one register with AVX-512, else
// halves of halves down to the width of a register (a compiler vector wider than that is slow).
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

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

#define INLINE inline __attribute__((always_inline))

#if defined(FXQUANT_AVX512)
constexpr int LANES = 16;
#elif defined(__AVX__) && !defined(FXQUANT_PORTABLE)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

template <class Half>
struct Pair {
  Half low, high;
};

template <class T, int N>
struct Vector {
  using type = Pair<typename Vector<T, N / 2>::type>;
};
template <class T>
struct Vector<T, LANES> {
  typedef T type __attribute__((vector_size(LANES * sizeof(T))));
};

using f32x16 = Vector<float, 16>::type;
using i32x16 = Vector<int32_t, 16>::type;
using u32x16 = Vector<uint32_t, 16>::type;
using u16x16 = Vector<uint16_t, 16>::type;
using i8x16 = Vector<int8_t, 16>::type;

template <class H>
INLINE Pair<H> pair(H low, H high) {
  return {low, high};
}
#define FXQUANT_BINARY(op)                                             \
  template <class A, class B>                                          \
  INLINE auto operator op(const Pair<A>& a, const Pair<B>& b) {        \
    return pair(a.low op b.low, a.high op b.high);                     \
  }                                                                    \
  template <class A, class B, class = std::enable_if_t<std::is_arithmetic_v<B>>> \
  INLINE auto operator op(const Pair<A>& a, B b) {                     \
    return pair(a.low op b, a.high op b);                              \
  }                                                                    \
  template <class A, class B, class = std::enable_if_t<std::is_arithmetic_v<A>>> \
  INLINE auto operator op(A a, const Pair<B>& b) {                     \
    return pair(a op b.low, a op b.high);                              \
  }
FXQUANT_BINARY(+)
FXQUANT_BINARY(-)
FXQUANT_BINARY(*)
FXQUANT_BINARY(/)
FXQUANT_BINARY(&)
FXQUANT_BINARY(|)
FXQUANT_BINARY(<<)
FXQUANT_BINARY(>>)
FXQUANT_BINARY(<)
FXQUANT_BINARY(>)
FXQUANT_BINARY(==)
FXQUANT_BINARY(!=)
template <class H>
INLINE auto operator-(const Pair<H>& a) {
  return pair(-a.low, -a.high);
}
template <class H>
INLINE auto operator~(const Pair<H>& a) {
  return pair(~a.low, ~a.high);
}

template <class T>
struct Memory {
  static INLINE T load(const void* p) {
    T v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static INLINE void store(void* p, const T& v) { std::memcpy(p, &v, sizeof v); }
};
// Half by half: copied as a whole, a pair would go through the stack.
template <class H>
struct Memory<Pair<H>> {
  static INLINE Pair<H> load(const void* p) {
    return {Memory<H>::load(p), Memory<H>::load((const char*)p + sizeof(H))};
  }
  static INLINE void store(void* p, const Pair<H>& v) {
    Memory<H>::store(p, v.low);
    Memory<H>::store((char*)p + sizeof(H), v.high);
  }
};
template <class T>
INLINE T load(const void* p) {
  return Memory<T>::load(p);
}
template <class T>
INLINE void store(void* p, const T& v) {
  Memory<T>::store(p, v);
}

template <class To, class From>
INLINE To bits(const From& v) {
  static_assert(sizeof(To) == sizeof(From));
  return load<To>(&v);
}
template <class To, class H>
INLINE To bits(const Pair<H>& v) {
  using Half = decltype(To::low);
  return {bits<Half>(v.low), bits<Half>(v.high)};
}

INLINE f32x16 splat(float v) { return v - f32x16{}; }
INLINE i32x16 splat(int32_t v) { return v - i32x16{}; }

// Lane by lane to another type of number.
template <class To, class From>
INLINE To convert(const From& v) {
  return __builtin_convertvector(v, To);
}
template <class To, class H>
INLINE To convert(const Pair<H>& v) {
  using Half = decltype(To::low);
  return {convert<Half>(v.low), convert<Half>(v.high)};
}
INLINE f32x16 to_float(const i32x16& v) { return convert<f32x16>(v); }
INLINE f32x16 to_float(const f32x16& v) { return v; }

INLINE f32x16 choose(const i32x16& mask, const f32x16& yes, const f32x16& no) {
  return bits<f32x16>((mask & bits<i32x16>(yes)) | (~mask & bits<i32x16>(no)));
}
