// dW = dY^T X at the active blocks, for blocks of 16 and its multiples.
//
// PANEL columns of X by a few columns of dY in registers, a sum over tokens. Both sides are copied together for a round of
// tokens, in which every block has its turn.
#pragma once

#include "arguments.h"
#include "packing.h"

namespace dsbert {

#if DSBERT_LANES == 16
constexpr int GRAD_ROWS = 16;  // of 32 registers
#elif DSBERT_LANES == 8
constexpr int GRAD_ROWS = 6;  // of 16 registers: 12 sums, 2 columns, 1 broadcast; 16 rows are 6 + 5 + 5
#else
constexpr int GRAD_ROWS = 2;
#endif
constexpr int64_t GRAD_TOKENS = 64;  // per thread and round
constexpr int64_t GRAD_STEPS = 128;  // in a row: what the first-level cache holds of two panels, and more

// dw[N, PANEL] += sum over the steps (tokens, or pairs of tokens) of dy^T x. A row of dw is `size` long.
template <class D, int N>
inline void outer(const typename D::Element* dy, const typename D::Element* x, int64_t steps, int64_t size, float* dw) {
  typedef typename D::Weights W;
  Vec sums[N][NV];
#pragma GCC unroll 16
  for (int r = 0; r < N; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sums[r][v] = load<Vec>(dw + r * size + v * LANES);
  if (steps <= 0) __builtin_unreachable();
  for (int64_t s = 0; s < steps; ++s, dy += PANEL, x += PANEL) {
    W columns[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) columns[v] = load<W>(x + v * LANES);
#pragma GCC unroll 16
    for (int r = 0; r < N; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) D::fma(sums[r][v], dy[r], columns[v]);
  }
#pragma GCC unroll 16
  for (int r = 0; r < N; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) put(dw + r * size + v * LANES, sums[r][v]);
}

// PANEL rows, by passes of nearly equal size: a short last one could not keep the machine busy.
template <class D, int ROW = 0>
__attribute__((always_inline)) inline void panel_gradient(const typename D::Element* dy, const typename D::Element* x,
                                                          int64_t steps, int64_t size, float* dw) {
  if constexpr (ROW < PANEL) {
    constexpr int PASSES = (PANEL - ROW + GRAD_ROWS - 1) / GRAD_ROWS, N = (PANEL - ROW + PASSES - 1) / PASSES;
    outer<D, N>(dy + ROW, x, steps, size, dw + ROW * size);
    panel_gradient<D, ROW + N>(dy, x, steps, size, dw);
  }
}

// One block; dy and x as [panel][room][PANEL], `steps` of the room filled.
template <class D>
void block_gradient(const typename D::Element* dy, const typename D::Element* x, int64_t steps, int64_t room, int64_t size, float* dw) {
  for (int64_t s = 0; s < steps; s += GRAD_STEPS)
    for (int64_t row = 0; row < size; row += PANEL)
      for (int64_t column = 0; column < size; column += PANEL)
        panel_gradient<D>(dy + row * room + s * PANEL, x + column * room + s * PANEL, std::min(GRAD_STEPS, steps - s),
                          size, dw + row * size + column);
}

template <class T, class D>
void gradient(const Gradient& g) {
  typedef typename T::Raw Raw;
  typedef typename D::Element Element;
  constexpr bool direct = sizeof(Raw) == sizeof(float);
  static thread_local Scratch packed, exact;
  const int64_t size = int64_t(g.B) * g.B, room = GRAD_TOKENS * g.threads, width = room * g.B / D::PAIR;
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
      for (int64_t t = 0; t < now; t += GRAD_TOKENS) {
        const int64_t n = std::min(GRAD_TOKENS, now - t), at = t / D::PAIR * PANEL;
        const Raw *x_from = static_cast<const Raw*>(g.x) + (token + t) * g.ldx,
                  *dy_from = static_cast<const Raw*>(g.dy) + (token + t) * g.lddy;
        pack_summed<T>(D(), x_from, g.ldx, g.in_groups * g.B / PANEL, n, room, x + at);
        pack_summed<T>(D(), dy_from, g.lddy, g.out_groups * g.B / PANEL, n, room, dy + at);
      }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < g.active; ++i) {
        const int32_t slot = g.slots[i];
        block_gradient<D>(dy + g.rows[slot] * width, x + g.cols[slot] * width, (now + D::PAIR - 1) / D::PAIR,
                          room / D::PAIR, g.B, dw + slot * size);
      }
    }
    if (!direct) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < g.active * size; i += LANES) T::set(static_cast<Raw*>(g.dw) + i, load<Vec>(dw + i));
    }
  }
}

}  // namespace dsbert
