// y[m, n] = act(x_scale[m] * (sum_g scale[n, g] * sum_k x[m, k] * q[n, k] + corrections) + bias[n])
//
// The weight lies in panels of 64 output channels. A tile holds R rows times V vectors of 16
// channels of a panel in registers, and walks along the whole of K; every element of y is thus
// summed in one order, whatever the number of rows or threads.
#pragma once
#include <cstdlib>
#include <memory>

#include "activations.h"
#include "engines.h"

struct Linear {
  int64_t m, n, k, groups;  // k codes of a row make `groups` groups of equal size
  Dtype x_dtype, y_dtype, bias_dtype;
  Activation activation;
  int threads;
  const void* x;             // [m, k]
  const float* x_scale;      // [m], integer products only
  const int32_t* x_zero;     // [m] or null: the code of 0
  const uint8_t* weight;     // in each panel of channels [steps, channels] words of 32 bits
  const void* scale;         // float32 [n], or bfloat16: in each panel [groups, channels]
  const uint16_t* zero;      // like a grouped scale, or null
  const float* weight_sum;   // [n]: sum_k of the dequantized weight; with x_zero
  const void* bias;          // [n] or null
  char* y;                   // [m, n]
};

constexpr int64_t PANEL = 64;

// Where a panel's weight and qparams begin. The last one may have been padded to 64 channels.
struct Panel {
  int64_t column;
  const uint8_t* weight;
  const void* scale;
  const uint16_t* zero;
};

// x as the engine reads it: rows of a whole number of steps, and their sums.
template <class E>
struct Prepared {
  const typename E::X* x;
  int64_t stride;
  const typename E::Sum* sums;  // [m, groups] of x, or null
};

template <class E, int R, int V>
INLINE void finish(const Linear& t, int64_t row, int64_t column, f32x16 (&value)[R][V]) {
  for (int v = 0; v < V; v++) {
    int64_t n = column + 16 * v, count = t.n - n;
    if (count <= 0) return;
    f32x16 shift = {}, weight_sum = {};
    if (t.x_zero) weight_sum = load_some(t.weight_sum + n, FLOAT32, count);
    if (t.bias) {
      shift = load_some((const char*)t.bias + n * size_of(t.bias_dtype), t.bias_dtype, count);
    }
    for (int r = 0; r < R; r++) {
      f32x16 y = value[r][v];
      if (t.x_zero) y -= weight_sum * float(t.x_zero[row + r]);
      if (t.x_scale) y *= t.x_scale[row + r];
      y = activate(t.activation, y + shift);
      store_some(t.y + ((row + r) * t.n + n) * size_of(t.y_dtype), t.y_dtype, y, count);
    }
  }
}

template <class E, int R, int V>
__attribute__((noinline)) void tile(
    const Linear& t, const Prepared<E>& p, const Panel& panel, int64_t row, int first) {
  constexpr bool GROUPED = grouped(E::FORMAT);
  using Acc = typename E::Acc;
  const int64_t steps = (t.k / t.groups + E::STEP - 1) / E::STEP;  // of a group
  const uint8_t* w = panel.weight + first * 64;
  const typename E::X* x = p.x + row * p.stride;
  const auto* sums = p.sums + row * t.groups;
  f32x16 total[R][V] = {};

  for (int64_t g = 0; g < t.groups; g++) {
    Acc acc[R][V];
    for (int r = 0; r < R; r++) {
      for (int v = 0; v < V; v++) {
        acc[r][v] = Acc{};
        if constexpr (E::OFFSET != 0) acc[r][v] = splat(-E::OFFSET * sums[r * t.groups + g]);
      }
    }
    for (int64_t s = 0; s < steps; s++) {
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        u32x16 packed = load<u32x16>(w + 64 * v);
        if constexpr (R <= 2) __builtin_prefetch(w + 64 * v + 4096);
#pragma GCC unroll 16
        for (int j = 0; j < E::WORDS; j++) {
          auto operand = E::operand(packed, j);
#pragma GCC unroll 8
          for (int r = 0; r < R; r++) {
            auto word = E::broadcast(x + r * p.stride + j * E::DEPTH);
            acc[r][v] = E::dot(acc[r][v], word, operand);
          }
        }
      }
      w += 4 * 64;
      x += E::STEP;
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      if constexpr (GROUPED) {
        int64_t at = g * PANEL + (first + v) * 16;
        f32x16 scale = from_bf16(load<u16x16>((const uint16_t*)panel.scale + at)), zero = {};
        if (t.zero) zero = from_bf16(load<u16x16>(panel.zero + at));
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          total[r][v] += to_float(acc[r][v]) * scale;
          if (t.zero) total[r][v] += zero * float(sums[r * t.groups + g]);
        }
      } else {
        f32x16 scale = load<f32x16>((const float*)panel.scale + (first + v) * 16);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) total[r][v] = to_float(acc[r][v]) * scale;
      }
    }
  }
  finish<E>(t, row, panel.column + first * 16, total);
}

template <class E, int R, int V>
INLINE int64_t rows(
    const Linear& t, const Prepared<E>& p, const Panel& panel, int64_t row, int64_t end) {
  for (; row + R <= end; row += R) {
    for (int first = 0; first < 4; first += V) tile<E, R, V>(t, p, panel, row, first);
  }
  return row;
}

// All rows from `row` to `end` of a panel. The tile's shape is what the registers hold: an
// accumulator for each of its vectors, a second one where there are groups, and the decoder's
// constants.
template <class E>
void rows_of_panel(
    const Linear& t, const Prepared<E>& p, const Panel& panel, int64_t row, int64_t end) {
#ifdef __AVX512F__
  if constexpr (grouped(E::FORMAT)) {
    row = rows<E, 6, 2>(t, p, panel, row, end);
    row = rows<E, 4, 2>(t, p, panel, row, end);
  } else if constexpr (E::DEPTH == 2) {
    row = rows<E, 8, 2>(t, p, panel, row, end);
    row = rows<E, 4, 4>(t, p, panel, row, end);
  } else {
    row = rows<E, 6, 4>(t, p, panel, row, end);
    row = rows<E, 4, 4>(t, p, panel, row, end);
  }
  row = rows<E, 2, 4>(t, p, panel, row, end);
  rows<E, 1, 4>(t, p, panel, row, end);
#else
  row = rows<E, 4, 1>(t, p, panel, row, end);
  rows<E, 1, 2>(t, p, panel, row, end);
#endif
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

template <class T>
struct Scratch {
  std::unique_ptr<T, Free> memory;
  T* allocate(int64_t count) {
    memory.reset((T*)std::malloc(size_t(count) * sizeof(T) + 64));
    return memory.get();
  }
};

// Converts row `m` of x to the engine's type, pads it with zeros to `stride`, adds up its groups.
template <class E>
void prepare_row(
    const Linear& t, int64_t m, typename E::X* copy, int64_t stride, typename E::Sum* sums) {
  using X = typename E::X;
  const char* source = (const char*)t.x + m * t.k * size_of(t.x_dtype);
  const X* x = (const X*)source;
  if (copy) {
    X* row = copy + m * stride;
    if constexpr (E::CONVERTS) {
      for (int64_t k = 0; k < t.k; k += 16) {
        f32x16 v = load_some(source + k * size_of(t.x_dtype), t.x_dtype, t.k - k);
        std::memcpy(row + k, &v, size_t(4 * (t.k - k < 16 ? t.k - k : 16)));
      }
    } else {
      std::memcpy(row, x, size_t(t.k) * sizeof(X));
    }
    for (int64_t k = t.k; k < stride; k++) row[k] = 0;
    x = row;
  }
  if (!sums) return;
  int64_t size = t.k / t.groups;
  for (int64_t g = 0; g < t.groups; g++) sums[m * t.groups + g] = sum_of(x + g * size, size);
}

template <class E>
int64_t steps_of(const Linear& t) {  // of the whole of k
  return t.groups * ((t.k / t.groups + E::STEP - 1) / E::STEP);
}

template <class E>
Panel panel_of(const Linear& t, int64_t index) {
  const int64_t column = index * PANEL, size = grouped(E::FORMAT) ? 2 : 4;
  return {column, t.weight + column * steps_of<E>(t) * 4,
          (const char*)t.scale + column * t.groups * size,
          t.zero ? t.zero + column * t.groups : nullptr};
}

// The last panel, widened from n % 64 channels to 64.
template <class E>
Panel pad_tail(const Linear& t, Scratch<char>& memory) {
  const int64_t width = t.n % PANEL, steps = steps_of<E>(t), size = grouped(E::FORMAT) ? 2 : 4;
  Panel panel = panel_of<E>(t, t.n / PANEL);
  char* to = memory.allocate((steps * 4 + t.groups * (size + 2)) * PANEL);
  if (!to) return {};
  std::memset(to, 0, size_t((steps * 4 + t.groups * (size + 2)) * PANEL));
  auto widen = [&](const void* from, int64_t count, int64_t bytes) {
    char* begin = to;
    for (int64_t i = 0; i < count; i++, to += PANEL * bytes) {
      std::memcpy(to, (const char*)from + i * width * bytes, size_t(width * bytes));
    }
    return begin;
  };
  panel.weight = (const uint8_t*)widen(panel.weight, steps, 4);
  panel.scale = widen(panel.scale, t.groups, size);
  if (t.zero) panel.zero = (const uint16_t*)widen(panel.zero, t.groups, 2);
  return panel;
}

template <class E>
int run(const Linear& t) {
  using X = typename E::X;
  const bool wants_sums = E::OFFSET != 0 || t.zero;
  const int64_t stride = (t.k + E::STEP - 1) / E::STEP * E::STEP;
  const bool copies = stride != t.k || (E::CONVERTS && t.x_dtype != FLOAT32);
  Scratch<X> copy_memory;
  Scratch<typename E::Sum> sum_memory;
  X* copy = copies ? copy_memory.allocate(t.m * stride) : nullptr;
  auto* sums = wants_sums ? sum_memory.allocate(t.m * t.groups) : nullptr;
  if ((copies && !copy) || (wants_sums && !sums)) return 1;
  if (copies || wants_sums) {
    // A parallel region costs microseconds; a few rows are done before one has started.
#pragma omp parallel for num_threads(t.threads) schedule(static) if (t.m * t.k > 1 << 16)
    for (int64_t m = 0; m < t.m; m++) prepare_row<E>(t, m, copy, stride, sums);
  }
  const Prepared<E> p{copies ? copy : (const X*)t.x, stride, sums};

  // Panels, cut into chunks of rows where there are few panels for many threads. A chunk keeps
  // enough rows to pay for reading the panel again.
  const int64_t panels = (t.n + PANEL - 1) / PANEL, least = 48;
  Scratch<char> tail_memory;
  Panel tail{};
  if (t.n % PANEL && !(tail = pad_tail<E>(t, tail_memory)).weight) return 1;
  int64_t chunks = (8 * t.threads + panels - 1) / panels;
  if (chunks > (t.m + least - 1) / least) chunks = (t.m + least - 1) / least;
  const int64_t height = ((t.m + chunks - 1) / chunks + 23) / 24 * 24;
  chunks = (t.m + height - 1) / height;
#pragma omp parallel for num_threads(t.threads) schedule(dynamic)
  for (int64_t item = 0; item < panels * chunks; item++) {
    int64_t row = item % chunks * height, end = row + height;
    int64_t panel = item / chunks;
    rows_of_panel<E>(
        t, p, panel < t.n / PANEL ? panel_of<E>(t, panel) : tail, row, end < t.m ? end : t.m);
  }
  return 0;
}
