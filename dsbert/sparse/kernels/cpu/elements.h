// Products of blocks below 16, down to single weights: one weight at a time, by SPAN tokens side by side.
#pragma once

#include "arguments.h"
#include "gelu.h"
#include "packing.h"

namespace dsbert {

constexpr int SUMS = LANES == 8 ? 12 : 8;  // vectors of tokens that stay in registers
constexpr int SPAN = SUMS * LANES;

// Up to SPAN tokens as [feature][SPAN] floats, zeros where there are fewer.
template <class T>
void pack_features(const typename T::Raw* x, int64_t ldx, int64_t features, int64_t count, float* to) {
  if (count < SPAN) std::memset(to, 0, size_t(features) * SPAN * sizeof(float));
  for (int64_t t = 0; t < count; ++t, x += ldx)
    for (int64_t f = 0; f < features; f += LANES) {
      const int n = int(std::min<int64_t>(LANES, features - f));
      typename T::Raw raw[LANES] = {};
      std::memcpy(raw, x + f, size_t(n) * sizeof raw[0]);
      const Vec values = T::get(raw);
      for (int i = 0; i < n; ++i) to[(f + i) * SPAN + t] = values[i];
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

template <class T>
void store_outputs(const Product& p, const float* y, int64_t column, int outputs, int64_t token, int64_t count) {
  typedef typename T::Raw Raw;
  const int64_t out = p.out_groups * p.B;
  Raw raw[LANES], activated[LANES];
  for (int64_t t = 0; t < count; ++t) {
    Vec values = {};
    for (int o = 0; o < outputs; ++o) values[o] = y[o * SPAN + t];
    T::set(raw, values);
    const int64_t at = (token + t) * out + column;
    std::copy(raw, raw + outputs, static_cast<Raw*>(p.y) + at);
    if (!p.activated) continue;
    T::set(activated, gelu(T::get(raw)));
    std::copy(activated, activated + outputs, static_cast<Raw*>(p.activated) + at);
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

// dw[B, B] += the sums over SPAN tokens.
inline void small_block_gradient(const float* dy, const float* x, int B, float* dw) {
  for (int i = 0; i < B; ++i, dy += SPAN)
    for (int k = 0; k < B; ++k) {
      Vec sum = {};
#pragma GCC unroll 16
      for (int v = 0; v < SUMS; ++v) sum += load<Vec>(dy + v * LANES) * load<Vec>(x + k * SPAN + v * LANES);
      float total = 0;
      for (int lane = 0; lane < LANES; ++lane) total += sum[lane];
      dw[i * B + k] += total;
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
#pragma omp for schedule(static)
      for (int64_t i = 0; i < g.active; ++i) {
        const int32_t slot = g.slots[i];
        for (int64_t part = 0; part < parts; ++part) {
          const float *x = spans + part * width, *dy = x + in * SPAN;
          small_block_gradient(dy + int64_t(g.rows[slot]) * g.B * SPAN, x + int64_t(g.cols[slot]) * g.B * SPAN, g.B,
                               dw + slot * size);
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < g.active * size; ++i) set_one<T>(static_cast<Raw*>(g.dw) + i, dw[i]);
  }
}

}  // namespace dsbert
