// Dropout, residual and LayerNorm in one pass over the rows each way: y = LayerNorm(dropout(x) + residual), or
// y = dropout(LayerNorm(x)) where dropout comes after. Which elements fall: as dropout.h has it, for the same seed.
//
// Rows of `width` elements. Sums are fp32, and run in an order that neither threads nor their number change: within a row
// by vectors of LANES, over rows (dgamma, dbeta) by groups of rows that depend on the number of rows alone.
#pragma once

#include <cmath>

#include "dropout.h"
#include "packing.h"

namespace dsbert {

struct Norm {
  const void *x, *residual;   // residual: or null
  const void *gamma, *beta;   // beta: or null
  void *sum, *y;              // sum: what is normalized, for backward; null where that is x itself
  float *mean, *scale;        // of every row; scale: 1 / sqrt(variance + eps)
  int64_t rows, width;
  double eps;
  uint64_t seed;
  double p;                   // 0: nothing falls
  bool after;                 // dropout follows the norm
  int threads;
};

struct NormGradient {
  const void *dy, *sum, *gamma;
  const float *mean, *scale;
  void *dx, *dresidual;       // dresidual: or null
  void *dgamma, *dbeta;       // dbeta: or null
  int64_t rows, width;
  uint64_t seed;
  double p;
  bool after;
  int threads;
};

// The vector of elements that begins at p, of which `n` belong to the row; zeros in place of others.
template <class T>
inline Vec get_part(const void* base, int64_t at, int n) {
  const typename T::Raw* p = static_cast<const typename T::Raw*>(base) + at;
  if (n == LANES) return T::get(p);
  typename T::Raw raw[LANES] = {};
  std::copy(p, p + n, raw);
  return T::get(raw);
}

template <class T>
inline void set_part(void* base, int64_t at, int n, Vec v) {
  typename T::Raw* p = static_cast<typename T::Raw*>(base) + at;
  if (n == LANES) return T::set(p, v);
  typename T::Raw raw[LANES];
  T::set(raw, v);
  std::copy(raw, raw + n, p);
}

// Calls step(column, how many elements, accumulator) along a row. Four accumulators take turns: one would have each
// addition wait for the one before.
template <class Step>
inline void along_row(int64_t width, Step step) {
  int64_t c = 0;
  for (; c + 4 * LANES <= width; c += 4 * LANES) {
    step(c, LANES, 0);
    step(c + LANES, LANES, 1);
    step(c + 2 * LANES, LANES, 2);
    step(c + 3 * LANES, LANES, 3);
  }
  for (; c + LANES <= width; c += LANES) step(c, LANES, 0);
  if (c < width) step(c, int(width - c), 1);
}

struct Sums {
  Vec of[4] = {};
  float total() const {
    const Vec sum = (of[0] + of[1]) + (of[2] + of[3]);
    float all = 0;
    for (int i = 0; i < LANES; ++i) all += sum[i];
    return all;
  }
};

// One row; `row`: room for it.
template <class T, bool FALLS, bool RESIDUAL>
inline void norm_row(const Norm n, const Drawn& drawn, int64_t r, float* row) {
  const int64_t offset = r * n.width;
  const float share = 1.0f / float(n.width);
  Sums sums, squares;
  along_row(n.width, [&](int64_t c, int count, int i) {
    Vec v = get_part<T>(n.x, offset + c, count);
    if (FALLS && !n.after) v = drawn(v, offset + c);
    if (RESIDUAL) v += get_part<T>(n.residual, offset + c, count);
    if (n.sum) {
      // Rounded, as backward will read it.
      typename T::Raw raw[LANES];
      T::set(raw, v);
      v = T::get(raw);
      std::memcpy(static_cast<typename T::Raw*>(n.sum) + offset + c, raw, size_t(count) * sizeof raw[0]);
    }
    put(row + c, v);
    sums.of[i] += v;
  });
  const float mean = sums.total() * share;
  along_row(n.width, [&](int64_t c, int count, int i) {
    Vec v = load<Vec>(row + c) - mean;
    for (int lane = count; lane < LANES; ++lane) v[lane] = 0;
    squares.of[i] += v * v;
  });
  const float scale = float(1.0 / std::sqrt(double(squares.total() * share) + n.eps));
  n.mean[r] = mean;
  n.scale[r] = scale;
  along_row(n.width, [&](int64_t c, int count, int) {
    Vec v = (load<Vec>(row + c) - mean) * scale * get_part<T>(n.gamma, c, count);
    if (n.beta) v += get_part<T>(n.beta, c, count);
    if (FALLS && n.after) v = drawn(v, offset + c);
    set_part<T>(n.y, offset + c, count, v);
  });
}

template <class T, bool FALLS, bool RESIDUAL>
void norm_rows(const Norm& n) {
  const Drawn drawn(n.seed, n.p);
#pragma omp parallel num_threads(n.threads)
  {
    static thread_local Scratch mine;
    float* row = mine.take<float>(n.width + LANES);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < n.rows; ++r) norm_row<T, FALLS, RESIDUAL>(n, drawn, r, row);
  }
}

template <class T>
void norm(const Norm& n) {
  if (n.p > 0) return n.residual ? norm_rows<T, true, true>(n) : norm_rows<T, true, false>(n);
  n.residual ? norm_rows<T, false, true>(n) : norm_rows<T, false, false>(n);
}

// One row: dx and dresidual, and what it adds to dgamma and dbeta. dy, normal: room for a row.
template <class T, bool FALLS>
inline void norm_gradient_row(const NormGradient n, const Drawn& drawn, int64_t r, float* dy, float* normal,
                              float* dgamma, float* dbeta) {
  const int64_t offset = r * n.width;
  const float mean = n.mean[r], scale = n.scale[r], share = 1.0f / float(n.width);
  Sums plain, along;
  along_row(n.width, [&](int64_t c, int count, int i) {
    Vec d = get_part<T>(n.dy, offset + c, count);
    if (FALLS && n.after) d = drawn(d, offset + c);
    const Vec x = (get_part<T>(n.sum, offset + c, count) - mean) * scale;
    put(dgamma + c, load<Vec>(dgamma + c) + d * x);
    put(dbeta + c, load<Vec>(dbeta + c) + d);
    d *= get_part<T>(n.gamma, c, count);
    put(dy + c, d);
    put(normal + c, x);
    plain.of[i] += d;
    along.of[i] += d * x;
  });
  const float a = plain.total() * share, b = along.total() * share;
  along_row(n.width, [&](int64_t c, int count, int) {
    Vec d = (load<Vec>(dy + c) - a - load<Vec>(normal + c) * b) * scale;
    if (n.dresidual) set_part<T>(n.dresidual, offset + c, count, d);
    if (FALLS && !n.after) d = drawn(d, offset + c);
    set_part<T>(n.dx, offset + c, count, d);
  });
}

template <class T, bool FALLS>
void norm_gradient_rows(const NormGradient& n) {
  static thread_local Scratch sums;
  const Drawn drawn(n.seed, n.p);
  const int64_t wide = (n.width + LANES - 1) / LANES * LANES;
  const int64_t per_group = std::max<int64_t>(32, (n.rows + 63) / 64), groups = (n.rows + per_group - 1) / per_group;
  float* parts = sums.take<float>(2 * wide * groups + 1);  // of each group dgamma, then dbeta
#pragma omp parallel num_threads(n.threads)
  {
    static thread_local Scratch mine;
    float* room = mine.take<float>(2 * wide);
#pragma omp for schedule(static)
    for (int64_t group = 0; group < groups; ++group) {
      float *dgamma = parts + 2 * wide * group, *dbeta = dgamma + wide;
      std::fill(dgamma, dgamma + 2 * wide, 0.0f);
      const int64_t end = std::min(n.rows, (group + 1) * per_group);
      for (int64_t r = group * per_group; r < end; ++r)
        norm_gradient_row<T, FALLS>(n, drawn, r, room, room + wide, dgamma, dbeta);
    }
#pragma omp for schedule(static)
    for (int64_t c = 0; c < n.width; c += LANES) {
      Vec dgamma = {}, dbeta = {};
      for (int64_t group = 0; group < groups; ++group) {
        dgamma += load<Vec>(parts + 2 * wide * group + c);
        dbeta += load<Vec>(parts + 2 * wide * group + wide + c);
      }
      const int count = int(std::min<int64_t>(LANES, n.width - c));
      set_part<T>(n.dgamma, c, count, dgamma);
      if (n.dbeta) set_part<T>(n.dbeta, c, count, dbeta);
    }
  }
}

template <class T>
void norm_gradient(const NormGradient& n) {
  n.p > 0 ? norm_gradient_rows<T, true>(n) : norm_gradient_rows<T, false>(n);
}

}  // namespace dsbert
