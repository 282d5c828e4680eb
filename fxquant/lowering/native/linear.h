// y[m, n] = act(x_scale[m] * (sum_g scale[n, g] * sum_k x[m, k] * q[n, k] + corrections) + bias[n])
//
// The weight lies in panels of 64 output channels. A tile holds R rows times V vectors of 16
// channels of a panel in registers, and walks along the whole of K; every element of y is thus
// summed in one order, whatever the number of rows or threads.
#pragma once
#include <omp.h>

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

// A stretch of K, in steps. All of K in one, but float sums without groups, which go on in `totals`
// from span to span: it bounds both their error and what is decoded at once.
struct Span {
  int64_t begin, end;
  bool first, last;
  float* totals;        // [rows, PANEL]; of only a tile's rows where the span is all of K
  const uint8_t* next;  // weight to fetch meanwhile
};

constexpr int64_t SPAN = 512;       // codes
constexpr int64_t MOST_ROWS = 528;  // in `totals`

template <class E>
int64_t steps_of(const Linear& t) {  // of a group
  return (t.k / t.groups + E::STEP - 1) / E::STEP;
}

// `count` (at most PANEL) values as float32, then zeros.
inline void load_row(f32x16 (&row)[4], const void* from, Dtype dtype, int64_t count) {
  if (count == 0) {
    for (int v = 0; v < 4; v++) row[v] = f32x16{};
    return;
  }
  char buffer[PANEL * 4];
  if (count < PANEL) {
    std::memset(buffer, 0, sizeof buffer);
    from = std::memcpy(buffer, from, size_t(count * size_of(dtype)));
  }
  for (int v = 0; v < 4; v++) {
    row[v] = load_as_float((const char*)from + 16 * v * size_of(dtype), dtype);
  }
}

// The end of `rows` rows of a panel: from their sums in `totals` to y. `scale` [PANEL] or null.
template <Dtype Y, bool HAS_ZERO, bool ACTIVATES>
void finish_as(
    const Linear& t, int64_t row, int64_t rows, int64_t column, const float* scale,
    const float* totals) {
  const int64_t width = t.n - column < PANEL ? t.n - column : PANEL;
  f32x16 factor[4], shift[4], weight_sum[4];
  load_row(factor, scale, FLOAT32, scale ? PANEL : 0);
  load_row(shift, (const char*)t.bias + column * size_of(t.bias_dtype), t.bias_dtype,
           t.bias ? width : 0);
  if (HAS_ZERO) load_row(weight_sum, t.weight_sum + column, FLOAT32, width);
  for (int64_t r = row; r < row + rows; r++, totals += PANEL) {
    const float x_scale = t.x_scale ? t.x_scale[r] : 1.0f;
    char* y = t.y + (r * t.n + column) * size_of(Y);
    char buffer[PANEL * 4];
    char* to = width == PANEL ? y : buffer;
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) {
      f32x16 value = load<f32x16>(totals + 16 * v);
      if (scale) value = value * factor[v];
      if (HAS_ZERO) value = value - weight_sum[v] * float(t.x_zero[r]);
      value = value * x_scale + shift[v];
      if (ACTIVATES) value = activate(t.activation, value);
      store_float(to + 16 * v * size_of(Y), Y, value);
    }
    if (width < PANEL) std::memcpy(y, buffer, size_t(width * size_of(Y)));
  }
}

template <Dtype Y>
auto finisher(const Linear& t) {
  if (t.activation == NONE) return t.x_zero ? finish_as<Y, true, false> : finish_as<Y, false, false>;
  return t.x_zero ? finish_as<Y, true, true> : finish_as<Y, false, true>;
}

inline void finish(
    const Linear& t, int64_t row, int64_t rows, int64_t column, const float* scale,
    const float* totals) {
  auto as = t.y_dtype == FLOAT32    ? finisher<FLOAT32>(t)
            : t.y_dtype == BFLOAT16 ? finisher<BFLOAT16>(t)
                                    : finisher<FLOAT16>(t);
  as(t, row, rows, column, scale, totals);
}

template <class E, int R, int V>
__attribute__((noinline)) void tile(
    const Linear& t, const Prepared<E>& p, const Panel& panel, const Span& span, int64_t row,
    int64_t begin, int first) {
  constexpr bool GROUPED = grouped(E::FORMAT);
  const int64_t groups = GROUPED ? t.groups : 1;
  const int64_t steps = GROUPED ? steps_of<E>(t) : span.end - span.begin;
  const uint8_t* w = panel.weight + (span.begin * 4 + first) * 64;
  const typename E::X* x = p.x + row * p.stride + span.begin * E::STEP;
  const auto* sums = p.sums + row * t.groups;
  const int64_t row_of_totals = span.first && span.last ? 0 : row - begin;
  float* totals = span.totals + row_of_totals * PANEL + first * 16;
  // One line with each step of the first tiles, until all of the next span is on its way.
  const int64_t fetched = (row - begin) / R * steps * 64;
  const uint8_t* next = span.next + fetched;
  const int64_t line = fetched < SPAN * PANEL ? 64 : 0;
  f32x16 total[R][V] = {};

  for (int64_t g = 0; g < groups; g++) {
    typename E::Acc acc[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        acc[r][v] = typename E::Acc{};
        if (E::OFFSET != 0 && (GROUPED || span.first)) {
          acc[r][v] = splat(-E::OFFSET * sums[r * t.groups + g]);
        }
      }
    }
    for (int64_t s = 0; s < steps; s++) {
      u32x16 packed[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) packed[v] = load<u32x16>(w + 64 * v);
#pragma GCC unroll 16
      for (int j = 0; j < E::WORDS; j++) {
        typename E::Word operand[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) operand[v] = E::operand(packed[v], j);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          auto word = E::broadcast(x + r * p.stride + j * E::DEPTH);
#pragma GCC unroll 4
          for (int v = 0; v < V; v++) acc[r][v] = E::dot(acc[r][v], word, operand[v]);
        }
      }
      if (R == 6 && E::PREFETCH) __builtin_prefetch(next += line);
      w += 4 * 64;
      x += E::STEP;
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      const int64_t at = g * PANEL + (first + v) * 16;
      f32x16 scale = splat(1.0f), zero = {};
      if constexpr (GROUPED) {
        scale = from_bf16(load<u16x16>((const uint16_t*)panel.scale + at));
        if (t.zero) zero = from_bf16(load<u16x16>(panel.zero + at));
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        if constexpr (GROUPED) {
          total[r][v] = total[r][v] + to_float(acc[r][v]) * scale;
          if (t.zero) total[r][v] = total[r][v] + zero * float(sums[r * t.groups + g]);
        } else {
          total[r][v] = to_float(acc[r][v]);
        }
      }
    }
  }
  const bool first_span = span.first;
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      float* at = totals + r * PANEL + 16 * v;
      if (!first_span) total[r][v] = total[r][v] + load<f32x16>(at);
      store(at, total[r][v]);
    }
  }
}

template <class E, int R, int V>
INLINE int64_t rows(
    const Linear& t, const Prepared<E>& p, const Panel& panel, const Span& span, int64_t begin,
    int64_t row, int64_t end) {
  const float* scale = grouped(E::FORMAT) ? nullptr : (const float*)panel.scale;
  for (; row + R <= end; row += R) {
    const int64_t row_of_totals = span.first && span.last ? 0 : row - begin;
    for (int v = 0; v < 4; v += V) tile<E, R, V>(t, p, panel, span, row, begin, v);
    if (!span.last) continue;
    finish(t, row, R, panel.column, scale, span.totals + row_of_totals * PANEL);
  }
  return row;
}

// All rows from `begin` to `end` of a panel. The tile's shape is what the registers hold: an
// accumulator for each of its vectors, a second one where there are groups, and the decoder's
// constants.
template <class E>
void all_rows(
    const Linear& t, const Prepared<E>& p, const Panel& panel, const Span& span, int64_t begin,
    int64_t end) {
  int64_t row = begin;
#ifdef FXQUANT_AVX512
  if constexpr (grouped(E::FORMAT)) {
    row = rows<E, 6, 2>(t, p, panel, span, begin, row, end);
    row = rows<E, 4, 2>(t, p, panel, span, begin, row, end);
  } else if constexpr (E::WORDS > 1) {
    row = rows<E, 8, 2>(t, p, panel, span, begin, row, end);
    row = rows<E, 4, 4>(t, p, panel, span, begin, row, end);
  } else {
    row = rows<E, 6, 4>(t, p, panel, span, begin, row, end);
    row = rows<E, 4, 4>(t, p, panel, span, begin, row, end);
  }
  row = rows<E, 2, 4>(t, p, panel, span, begin, row, end);
  rows<E, 1, 4>(t, p, panel, span, begin, row, end);
#else
  row = rows<E, 6, 1>(t, p, panel, span, begin, row, end);
  row = rows<E, 2, 2>(t, p, panel, span, begin, row, end);
  rows<E, 1, 4>(t, p, panel, span, begin, row, end);
#endif
}

// Rows from which a span is decoded once, into memory, instead of once for every tile.
constexpr int64_t DECODE_ROWS = 24;

template <class E>
void panel_rows(
    const Linear& t, const Prepared<E>& p, const Panel& panel, int64_t begin, int64_t end,
    float* totals, uint8_t* decoded) {
  const int64_t all = t.groups * steps_of<E>(t);
  if constexpr (grouped(E::FORMAT) || E::DEPTH == 4) {
    all_rows(t, p, panel, {0, all, true, true, totals, nullptr}, begin, end);
  } else {
    constexpr int64_t LENGTH = SPAN / E::STEP;
    for (int64_t s = 0; s < all; s += LENGTH) {
      const int64_t e = s + LENGTH < all ? s + LENGTH : all;
      Span span{s, e, s == 0, e == all, totals, panel.weight + e * 4 * 64};
      if (end - begin < DECODE_ROWS) {
        all_rows(t, p, panel, span, begin, end);
        continue;
      }
      uint8_t* to = decoded;
      for (int64_t i = s; i < e; i++, to += E::WORDS * 4 * 64) {
        for (int v = 0; v < 4; v++) {
          u32x16 packed = load<u32x16>(panel.weight + (i * 4 + v) * 64);
#pragma GCC unroll 4
          for (int j = 0; j < E::WORDS; j++) {
            auto operand = E::operand(packed, j);
            store(to + (j * 4 + v) * 64, operand);
          }
        }
      }
      using D = Decoded<E>;
      const Prepared<D> q{p.x + s * E::STEP, p.stride, p.sums};
      span.begin = 0;
      span.end = (e - s) * E::WORDS;
      all_rows<D>(t, q, {panel.column, decoded, panel.scale, nullptr}, span, begin, end);
    }
  }
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
Panel panel_of(const Linear& t, int64_t index) {
  const int64_t column = index * PANEL, size = grouped(E::FORMAT) ? 2 : 4;
  return {column, t.weight + column * t.groups * steps_of<E>(t) * 4,
          (const char*)t.scale + column * t.groups * size,
          t.zero ? t.zero + column * t.groups : nullptr};
}

// The last panel, widened from n % 64 channels to 64.
template <class E>
Panel pad_tail(const Linear& t, Scratch<char>& memory) {
  const int64_t width = t.n % PANEL, size = grouped(E::FORMAT) ? 2 : 4;
  const int64_t steps = t.groups * steps_of<E>(t);
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
  const int64_t wanted = (8 * t.threads + panels - 1) / panels;
  const int64_t possible = (t.m + least - 1) / least, needed = (t.m + MOST_ROWS - 1) / MOST_ROWS;
  int64_t chunks = wanted < possible ? wanted : possible;
  if (chunks < needed) chunks = needed;
  const int64_t height = ((t.m + chunks - 1) / chunks + 23) / 24 * 24;
  chunks = (t.m + height - 1) / height;
  Scratch<char> memory;
  const bool decodes = !grouped(E::FORMAT) && E::DEPTH < 4 && t.m >= DECODE_ROWS;
  const int64_t size = PANEL * 4 * (height + (decodes ? SPAN : 0));
  if (!memory.allocate(t.threads * size)) return 1;
#pragma omp parallel for num_threads(t.threads) schedule(dynamic)
  for (int64_t item = 0; item < panels * chunks; item++) {
    const int64_t row = item % chunks * height, end = row + height, index = item / chunks;
    char* mine = memory.memory.get() + omp_get_thread_num() * size;
    panel_rows<E>(
        t, p, index < t.n / PANEL ? panel_of<E>(t, index) : tail, row, end < t.m ? end : t.m,
        (float*)mine, (uint8_t*)mine + PANEL * 4 * height);
  }
  return 0;
}
