// Products of blocks below 16, down to single weights: one weight at a time, by SPAN tokens side by side.
#pragma once

#include "arguments.h"
#include "gelu.h"
#include "packing.h"
#include "transposing.h"

namespace dsbert {

constexpr int SUMS = LANES == 8 ? 12 : 8;  // vectors of tokens that stay in registers
constexpr int SPAN = SUMS * LANES;

// LANES elements, of which the first n are there; zeros behind them.
template <class T>
inline Vec get_some(const typename T::Raw* p, int n) {
  if (n == LANES) return T::get(p);
  typename T::Raw raw[LANES] = {};
  std::copy(p, p + n, raw);
  return T::get(raw);
}

template <class T>
inline void set_some(typename T::Raw* p, Vec v, int n) {
  if (n == LANES) return T::set(p, v);
  typename T::Raw raw[LANES];
  T::set(raw, v);
  std::copy(raw, raw + n, p);
}

// Up to SPAN tokens as [feature][SPAN] floats, zeros where there are fewer.
template <class T>
void pack_features(const typename T::Raw* x, int64_t ldx, int64_t features, int64_t count, float* to) {
  for (int64_t t = 0; t < SPAN; t += LANES, x += LANES * ldx)
    for (int64_t f = 0; f < features; f += LANES) {
      const int n = int(std::min<int64_t>(LANES, features - f));
      UVec square[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i)
        square[i] = t + i < count ? bits<UVec>(get_some<T>(x + i * ldx + f, n)) : UVec{};
      transpose(square);
      for (int i = 0; i < n; ++i) put(to + (f + i) * SPAN + t, square[i]);
    }
}

// One output of SPAN tokens, a sum over the blocks of its row; `line` of each block belongs to it.
inline void one_output(const float* x, const float* w, const int32_t* slots, const int32_t* groups, int blocks, int B,
                       int line, bool transpose, float start, float* y) {
  Vec sums[SUMS];
  for (int v = 0; v < SUMS; ++v) sums[v] = splat(start);
  const int64_t along = transpose ? 1 : B, first = transpose ? int64_t(line) * B : line;
  for (int j = 0; j < blocks; ++j, w += int64_t(B) * B) {
    const float* xk = x + int64_t(groups[slots[j]]) * B * SPAN;
    for (int k = 0; k < B; ++k, xk += SPAN) {
      const float weight = w[first + k * along];
#pragma GCC unroll 16
      for (int v = 0; v < SUMS; ++v) sums[v] += weight * load<Vec>(xk + v * LANES);
    }
  }
  for (int v = 0; v < SUMS; ++v) put(y + v * LANES, sums[v]);
}

// Outputs [LANES][SPAN], of which the first `outputs` are there, as rows of Y from `token` and `column` on.
template <class T>
void store_outputs(const Product& p, const float* y, int64_t column, int outputs, int64_t token, int64_t count) {
  typedef typename T::Raw Raw;
  const int64_t out = p.out_groups * p.B;
  for (int64_t t = 0; t < count; t += LANES) {
    UVec square[LANES];
#pragma GCC unroll 16
    for (int o = 0; o < LANES; ++o) square[o] = load<UVec>(y + o * SPAN + t);
    transpose(square);
    for (int64_t i = 0; i < std::min<int64_t>(LANES, count - t); ++i) {
      Raw raw[LANES];
      T::set(raw, bits<Vec>(square[i]));
      const int64_t at = (token + t + i) * out + column;
      set_some<T>(static_cast<Raw*>(p.y) + at, bits<Vec>(square[i]), outputs);
      if (p.activated) set_some<T>(static_cast<Raw*>(p.activated) + at, gelu(T::get(raw)), outputs);  // of Y as stored
    }
  }
}

template <class T>
void small_product(const Product& p) {
  typedef typename T::Raw Raw;
  static thread_local Scratch packed;
  const int64_t size = int64_t(p.B) * p.B, features = p.in_groups * p.B, out = p.out_groups * p.B;
  const int64_t count = p.ptr[p.out_groups];
  const Raw* blocks = static_cast<const Raw*>(p.blocks);
  float* w = packed.take<float>(count * size);
#pragma omp parallel num_threads(p.threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; ++i)
      for (int64_t k = 0; k < size; ++k) w[i * size + k] = get_one<T>(blocks + p.slots[i] * size + k);
    static thread_local Scratch mine;
    float* x = mine.take<float>((features + LANES) * SPAN);
    float* y = x + features * SPAN;
#pragma omp for schedule(static)
    for (int64_t token = 0; token < p.tokens; token += SPAN) {
      const int64_t n = std::min<int64_t>(SPAN, p.tokens - token);
      pack_features<T>(static_cast<const Raw*>(p.x) + token * p.ldx, p.ldx, features, n, x);
      for (int64_t column = 0; column < out; column += LANES) {
        const int outputs = int(std::min<int64_t>(LANES, out - column));
        for (int o = 0; o < outputs; ++o) {
          const int64_t row = (column + o) / p.B, first = p.ptr[row];
          const float start = p.bias ? get_one<T>(static_cast<const Raw*>(p.bias) + column + o) : 0.0f;
          one_output(x, w + first * size, p.slots + first, p.groups, p.ptr[row + 1] - p.ptr[row], p.B,
                     int((column + o) % p.B), p.transpose, start, y + o * SPAN);
        }
        store_outputs<T>(p, y, column, outputs, token, n);
      }
    }
  }
}

// Adds up the lanes of sums, LANES of them at a time, and adds each result to where it belongs; in the order in which they
// came.
class LaneSums {
 public:
  void add(Vec sum, float* to) {
    sums_[count_] = bits<UVec>(sum);
    to_[count_] = to;
    if (++count_ == LANES) flush();
  }
  void flush() {
    transpose(sums_);
    Vec total = {};
#pragma GCC unroll 16
    for (int lane = 0; lane < LANES; ++lane) total += bits<Vec>(sums_[lane]);
    for (int i = 0; i < count_; ++i) *to_[i] += total[i];
    count_ = 0;
  }

 private:
  UVec sums_[LANES] = {};
  float* to_[LANES];
  int count_ = 0;
};

// dw[B, B] += the sums over SPAN tokens.
inline void small_block_gradient(const float* dy, const float* x, int B, float* dw, LaneSums& sums) {
  for (int i = 0; i < B; ++i, dy += SPAN)
    for (int k = 0; k < B; ++k) {
      Vec sum = {};
#pragma GCC unroll 16
      for (int v = 0; v < SUMS; ++v) sum += load<Vec>(dy + v * LANES) * load<Vec>(x + k * SPAN + v * LANES);
      sums.add(sum, dw + i * B + k);
    }
}

template <class T>
void small_gradient(const Gradient& g) {
  typedef typename T::Raw Raw;
  static thread_local Scratch packed, exact;
  const int64_t size = int64_t(g.B) * g.B, in = g.in_groups * g.B, out = g.out_groups * g.B;
  const int64_t width = (in + out) * SPAN, room = int64_t(SPAN) * g.threads;
  float* spans = packed.take<float>(width * g.threads);  // of each span the features of X, then those of dY
  float* dw = exact.take<float>(g.active * size);
#pragma omp parallel num_threads(g.threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < g.active * size; ++i) dw[i] = 0;
    for (int64_t token = 0; token < g.tokens; token += room) {
      const int64_t parts = (std::min(room, g.tokens - token) + SPAN - 1) / SPAN;
#pragma omp for schedule(static)
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t first = token + part * SPAN, n = std::min<int64_t>(SPAN, g.tokens - first);
        float* to = spans + part * width;
        pack_features<T>(static_cast<const Raw*>(g.x) + first * g.ldx, g.ldx, in, n, to);
        pack_features<T>(static_cast<const Raw*>(g.dy) + first * g.lddy, g.lddy, out, n, to + in * SPAN);
      }
      LaneSums sums;
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < g.active; ++i) {
        const int32_t slot = g.slots[i];
        for (int64_t part = 0; part < parts; ++part) {
          const float *x = spans + part * width, *dy = x + in * SPAN;
          small_block_gradient(dy + int64_t(g.rows[slot]) * g.B * SPAN, x + int64_t(g.cols[slot]) * g.B * SPAN, g.B,
                               dw + slot * size, sums);
        }
      }
      sums.flush();
#pragma omp barrier
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < g.active * size; ++i) set_one<T>(static_cast<Raw*>(g.dw) + i, dw[i]);
  }
}

}  // namespace dsbert
