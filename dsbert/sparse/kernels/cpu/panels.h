// Products of blocks of 16 and its multiples.
//
// product: one row of blocks at a time. PANEL outputs by a few tokens stay in registers, activations are broadcast,
// weights are vectors. dgrad is the same with the roles of rows and columns exchanged: only the packing of the weights
// differs.
// gradient: a block's dW is a sum over tokens of dY^T X: PANEL columns by a few rows in registers.
#pragma once

#include "arguments.h"
#include "gelu.h"
#include "packing.h"

namespace dsbert {

#if DSBERT_LANES == 16
constexpr int TOKENS = 12, GRAD_ROWS = 16;  // of 32 registers
#elif DSBERT_LANES == 8
constexpr int TOKENS = 6, GRAD_ROWS = 6;  // of 16 registers: 12 sums, 2 weights, 1 broadcast
#else
constexpr int TOKENS = 2, GRAD_ROWS = 2;
#endif
constexpr int64_t TILE_FLOATS = 48 * 1024;  // of the activations that a tile of tokens keeps in the second-level cache
constexpr int64_t GRAD_TOKENS = 64;         // per thread and round of a gradient

// Sums of N tokens by one panel over the blocks of one row; a token has `steps` elements in each group.
template <class D, int N>
inline void multiply(const typename D::Element* x, int steps, int64_t group_stride, const int32_t* slots,
                     const int32_t* groups, int blocks, const typename D::Element* w, int64_t block_stride,
                     Vec (&sums)[N][NV]) {
  typedef typename D::Weights W;
  for (int j = 0; j < blocks; ++j, w += block_stride) {
    const typename D::Element* xj = x + int64_t(groups[slots[j]]) * group_stride;
    const typename D::Element* wk = w;
#pragma GCC unroll 4
    for (int k = 0; k < steps; ++k, wk += PANEL) {
      W weights[NV];
      for (int v = 0; v < NV; ++v) weights[v] = load<W>(wk + v * LANES);
#pragma GCC unroll 16
      for (int t = 0; t < N; ++t)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sums[t][v] = D::fma(sums[t][v], xj[t * steps + k], weights[v]);
    }
  }
}

template <class T, class D, int N>
void panel(const Product& p, int64_t row, int offset, const typename D::Element* x, int64_t room,
           const typename D::Element* w, int64_t token) {
  const int64_t out = p.out_groups * p.B, column = row * p.B + offset;
  const int32_t first = p.ptr[row];
  Vec sums[N][NV];
  for (int v = 0; v < NV; ++v) {
    Vec start = p.bias ? T::get(static_cast<const typename T::Raw*>(p.bias) + column + v * LANES) : Vec{};
    for (int t = 0; t < N; ++t) sums[t][v] = start;
  }
  const int steps = p.B / D::PAIR;
  multiply<D, N>(x, steps, room * steps, p.slots + first, p.groups, p.ptr[row + 1] - first, w, int64_t(p.B) * steps,
                 sums);
  typename T::Raw* y = static_cast<typename T::Raw*>(p.y) + token * out + column;
  for (int t = 0; t < N; ++t)
    for (int v = 0; v < NV; ++v) T::set(y + t * out + v * LANES, sums[t][v]);
  if (p.activated) {
    typename T::Raw* activated = static_cast<typename T::Raw*>(p.activated) + token * out + column;
    for (int t = 0; t < N; ++t)  // of what was stored: backward sees the same numbers
      for (int v = 0; v < NV; ++v) T::set(activated + t * out + v * LANES, gelu(T::get(y + t * out + v * LANES)));
  }
}

template <class T, class D>
void panels(const Product& p, int64_t row, int offset, const typename D::Element* x, int64_t count,
            const typename D::Element* w, int64_t token) {
  const int steps = p.B / D::PAIR;
  int64_t t = 0;
  for (; t + TOKENS <= count; t += TOKENS) panel<T, D, TOKENS>(p, row, offset, x + t * steps, count, w, token + t);
  for (; t < count; ++t) panel<T, D, 1>(p, row, offset, x + t * steps, count, w, token + t);
}

int64_t tile_tokens(int64_t tokens, int64_t features, int threads) {
  int64_t most = std::max<int64_t>(TOKENS, TILE_FLOATS / features / TOKENS * TOKENS);
  int64_t tiles = ((tokens + most - 1) / most + threads - 1) / threads * threads;
  if (!tiles) return TOKENS;  // no tokens at all
  int64_t tile = (tokens + tiles - 1) / tiles;
  return (tile + TOKENS - 1) / TOKENS * TOKENS;
}

template <class T, class D>
void product(const Product& p) {
  typedef typename T::Raw Raw;
  typedef typename D::Element Element;
  static thread_local Scratch packed;
  const int64_t size = int64_t(p.B) * p.B / D::PAIR, features = p.in_groups * p.B;
  const int64_t count = p.ptr[p.out_groups], tile = tile_tokens(p.tokens, features, p.threads);
  Element* w = packed.take<Element>(count * size);
#pragma omp parallel num_threads(p.threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; ++i)
      pack_block<T>(D(), static_cast<const Raw*>(p.blocks) + p.slots[i] * int64_t(p.B) * p.B, p.transpose, p.B, w + i * size);
    static thread_local Scratch mine;
    Element* near = mine.take<Element>(tile * features / D::PAIR);
#pragma omp for schedule(static)
    for (int64_t token = 0; token < p.tokens; token += tile) {
      const int64_t n = std::min(tile, p.tokens - token);
      pack_tokens<T>(D(), static_cast<const Raw*>(p.x) + token * p.ldx, p.ldx, p.in_groups, p.B, n, n, near);
      for (int64_t row = 0; row < p.out_groups; ++row)
        for (int offset = 0; offset < p.B; offset += PANEL)
          panels<T, D>(p, row, offset, near, n, w + p.ptr[row] * size + offset * (p.B / D::PAIR), token);
    }
  }
}

// dw[0 .. N, 0 .. PANEL] += sum over the steps (tokens, or pairs of tokens) of dy^T x.
template <class D, int N>
inline void outer(const typename D::Element* dy, const typename D::Element* x, int64_t steps, int B, float* dw) {
  typedef typename D::Weights W;
  Vec sums[N][NV];
  for (int r = 0; r < N; ++r)
    for (int v = 0; v < NV; ++v) sums[r][v] = load<Vec>(dw + r * B + v * LANES);
#pragma GCC unroll 2
  for (int64_t s = 0; s < steps; ++s, dy += B, x += B) {
    W columns[NV];
    for (int v = 0; v < NV; ++v) columns[v] = load<W>(x + v * LANES);
#pragma GCC unroll 16
    for (int r = 0; r < N; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sums[r][v] = D::fma(sums[r][v], dy[r], columns[v]);
  }
  for (int r = 0; r < N; ++r)
    for (int v = 0; v < NV; ++v) put(dw + r * B + v * LANES, sums[r][v]);
}

template <class D>
void block_gradient(const typename D::Element* dy, const typename D::Element* x, int64_t steps, int B, float* dw) {
  for (int column = 0; column < B; column += PANEL) {
    int row = 0;
    for (; row + GRAD_ROWS <= B; row += GRAD_ROWS) outer<D, GRAD_ROWS>(dy + row, x + column, steps, B, dw + row * B + column);
    for (; row + 4 <= B; row += 4) outer<D, 4>(dy + row, x + column, steps, B, dw + row * B + column);
    for (; row < B; row += 2) outer<D, 2>(dy + row, x + column, steps, B, dw + row * B + column);
  }
}

template <class T, class D>
void gradient(const Gradient& g) {
  typedef typename T::Raw Raw;
  typedef typename D::Element Element;
  constexpr bool direct = sizeof(Raw) == sizeof(float);
  static thread_local Scratch packed, exact;
  const int64_t size = int64_t(g.B) * g.B, room = GRAD_TOKENS * g.threads;
  const int64_t width = room * g.B / D::PAIR;
  Element* x = packed.take<Element>((g.in_groups + g.out_groups) * width);
  Element* dy = x + g.in_groups * width;
  float* dw = direct ? static_cast<float*>(g.dw) : exact.take<float>(g.active * size);
#pragma omp parallel num_threads(g.threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < g.active; ++i) std::memset(dw + i * size, 0, size_t(size) * sizeof(float));
    for (int64_t token = 0; token < g.tokens; token += room) {
      const int64_t now = std::min(room, g.tokens - token);
#pragma omp for schedule(static)
      for (int64_t part = 0; part < g.threads; ++part) {
        const int64_t first = part * GRAD_TOKENS, n = std::min(GRAD_TOKENS, now - first);
        if (n <= 0) continue;
        const Raw *x_from = static_cast<const Raw*>(g.x) + (token + first) * g.ldx,
                  *dy_from = static_cast<const Raw*>(g.dy) + (token + first) * g.lddy;
        pack_summed<T>(D(), x_from, g.ldx, g.in_groups, g.B, n, room, x + first * g.B / D::PAIR);
        pack_summed<T>(D(), dy_from, g.lddy, g.out_groups, g.B, n, room, dy + first * g.B / D::PAIR);
      }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < g.active; ++i) {
        const int32_t slot = g.slots[i];
        block_gradient<D>(dy + g.rows[slot] * width, x + g.cols[slot] * width, (now + D::PAIR - 1) / D::PAIR, g.B, dw + slot * size);
      }
    }
    if (!direct) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < g.active * size; i += LANES) T::set(static_cast<Raw*>(g.dw) + i, load<Vec>(dw + i));
    }
  }
}

}  // namespace dsbert

