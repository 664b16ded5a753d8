// Y = X W^T + bias, and dX = dY W, for blocks of 16 and its multiples.
//
// A slice is a few tokens; of a chunk of its features, as much as the first-level cache holds. Over a slice goes every
// row of blocks in turn, PANEL outputs at a time: sums in registers, activations broadcast, weights as vectors, in the
// order in which they lie. Chunk by chunk, over a tile of slices, so that sums that wait for the next chunk stay near.
// dgrad is the same with the roles of rows and columns exchanged: only the packing of the weights differs.
#pragma once

#include "arguments.h"
#include "gelu.h"
#include "packing.h"
#include "segments.h"

namespace dsbert {

#if DSBERT_LANES == 16
constexpr int TOKENS = 12;  // of 32 registers
constexpr int64_t SLICE_BYTES = 36 * 1024;
#elif DSBERT_LANES == 8
constexpr int TOKENS = 6;  // of 16 registers: 12 sums, 2 weights, 1 broadcast
constexpr int64_t SLICE_BYTES = 24 * 1024;
#else
constexpr int TOKENS = 2;
constexpr int64_t SLICE_BYTES = 16 * 1024;
#endif
constexpr int64_t TILE = 96;  // tokens, at most; a multiple of TOKENS

// Tokens of a tile, so that all threads have as many tiles.
inline int64_t tile_tokens(int64_t tokens, int64_t threads) {
  const int64_t tiles = std::max<int64_t>(1, ((tokens + TILE - 1) / TILE + threads - 1) / threads * threads);
  return std::max<int64_t>(1, ((tokens + tiles - 1) / tiles + TOKENS - 1) / TOKENS) * TOKENS;
}

// PANEL outputs of a slice, `stride` apart from token to token: what the sums start with, and the products of `blocks`
// blocks. A function of its own, without branches: amid other code the compiler finds no register for the last sum.
template <class Out, class D>
__attribute__((noinline)) void multiply(const typename D::Element* slice, const int32_t* groups, int64_t blocks, int64_t panels,
                                        const typename D::Element* w, const float* start, int64_t start_stride,
                                        typename Out::Raw* y, int64_t stride) {
  typedef typename D::Weights W;
  constexpr int STEPS = PANEL / D::PAIR;
  Vec sums[TOKENS][NV];
#pragma GCC unroll 16
  for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sums[t][v] = load<Vec>(start + t * start_stride + v * LANES);
  if (blocks <= 0 || panels <= 0) __builtin_unreachable();
  for (int64_t j = 0; j < blocks; ++j) {
    const typename D::Element* x = slice + groups[j] * panels * TOKENS * STEPS;
    for (int64_t panel = 0; panel < panels; ++panel, x += TOKENS * STEPS, w += STEPS * PANEL)
#pragma GCC unroll 16
      for (int k = 0; k < STEPS; ++k) {
        W vectors[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) vectors[v] = load<W>(w + k * PANEL + v * LANES);
#pragma GCC unroll 16
        for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) D::fma(sums[t][v], x[t * STEPS + k], vectors[v]);
      }
  }
#pragma GCC unroll 16
  for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) Out::set(y + t * stride + v * LANES, sums[t][v]);
}

template <class T, class D>
struct SliceProduct {
  typedef typename T::Raw Raw;
  typedef typename D::Element Element;
  static constexpr int STEPS = PANEL / D::PAIR;  // of one panel of the summed side
  static constexpr int64_t SLICE_PANEL = TOKENS * STEPS;

  const Product& p;
  const Segments& segments;
  const Element* weights;  // by segment, panel of outputs, block, k
  float* partial;          // [TILE][out]: sums that wait for the next chunk, where y cannot hold them
  Element* slice;          // [panel][TOKENS][STEPS]

  int64_t out() const { return p.out_groups * p.B; }

  // A tile of tokens, from `token` on.
  void tile(int64_t token, int64_t count) const {
    for (int64_t chunk = 0; chunk < segments.chunks; ++chunk)
      for (int64_t t = 0; t < count; t += TOKENS) rows(chunk, token + t, t, std::min<int64_t>(TOKENS, count - t));
  }

  // All outputs of `count` tokens, as far as one chunk goes.
  void rows(int64_t chunk, int64_t token, int64_t within, int64_t count) const {
    const int64_t groups = segments.groups_in(chunk), panels = p.B / PANEL;
    const Raw* x = static_cast<const Raw*>(p.x) + token * p.ldx + chunk * segments.per_chunk * p.B;
    // Where there are fewer tokens than a slice has, what lay there before is multiplied too, and not stored.
    pack_tokens<T>(D(), x, p.ldx, groups * panels, count, TOKENS, slice);
    int64_t due = 0, ahead = 0;
    for (int64_t row = 0; row < p.out_groups; ++row) {
      // What the next slice reads comes from memory meanwhile, a little with every row.
      for (due += groups; due >= p.out_groups; due -= p.out_groups) fetch(x + TOKENS * p.ldx + p.B * ahead++);
      const int64_t segment = chunk * p.out_groups + row, first = segments.start[segment];
      const int64_t blocks = segments.start[segment + 1] - first;
      if (blocks == 0 && chunk > 0 && chunk + 1 < segments.chunks) continue;
      const Element* w = weights + first * (int64_t(p.B) * p.B / D::PAIR);
      for (int64_t panel = 0; panel < panels; ++panel, w += blocks * panels * STEPS * PANEL)
        outputs(chunk, row * p.B + panel * PANEL, segments.group.data() + first, blocks, w, token, within, count);
    }
  }

  void fetch(const Raw* x) const {
    for (int t = 0; t < TOKENS; ++t, x += p.ldx)
      for (int i = 0; i < p.B; i += 64 / int(sizeof(Raw))) __builtin_prefetch(x + i, 0, 2);
  }

  // PANEL outputs of `count` tokens, as far as one segment goes.
  void outputs(int64_t chunk, int64_t column, const int32_t* groups, int64_t blocks, const Element* w, int64_t token,
               int64_t within, int64_t count) const {
    constexpr bool direct = sizeof(Raw) == sizeof(float);
    const bool first = chunk == 0, last = chunk + 1 == segments.chunks;
    Raw* y = static_cast<Raw*>(p.y) + token * out() + column;
    float* kept = direct ? reinterpret_cast<float*>(y) : partial + within * out() + column;
    alignas(64) float start[PANEL];
    for (int v = 0; v < PANEL; v += LANES)
      put(start + v, p.bias ? T::get(static_cast<const Raw*>(p.bias) + column + v) : Vec{});
    // The next outputs' place in memory: a store that misses would hold up all that come after it.
    for (int t = 0; t < TOKENS; ++t) __builtin_prefetch(y + t * out() + PANEL, 1);
    if (count == TOKENS && blocks > 0) {
      const float* from = first ? start : kept;
      const int64_t stride = first ? 0 : out();
      if (last) multiply<T, D>(slice, groups, blocks, p.B / PANEL, w, from, stride, y, out());
      else multiply<F32, D>(slice, groups, blocks, p.B / PANEL, w, from, stride, kept, out());
    } else {  // by way of a place that has room for a whole slice
      float sums[TOKENS * PANEL] = {};
      for (int64_t t = 0; t < count; ++t) std::copy_n(first ? start : kept + t * out(), PANEL, sums + t * PANEL);
      if (blocks > 0) multiply<F32, D>(slice, groups, blocks, p.B / PANEL, w, sums, PANEL, sums, PANEL);
      for (int64_t t = 0; t < count; ++t)
        for (int v = 0; v < PANEL; v += LANES) {
          const Vec sum = load<Vec>(sums + t * PANEL + v);
          last ? T::set(y + t * out() + v, sum) : put(kept + t * out() + v, sum);
        }
    }
    if (!last || !p.activated) return;
    Raw* activated = static_cast<Raw*>(p.activated) + (y - static_cast<Raw*>(p.y));
    for (int64_t t = 0; t < count; ++t)  // of what was stored: backward sees the same numbers
      for (int v = 0; v < PANEL; v += LANES) T::set(activated + t * out() + v, gelu(T::get(y + t * out() + v)));
  }
};

template <class T, class D>
void product(const Product& p) {
  typedef SliceProduct<T, D> Slices;
  typedef typename D::Element Element;
  static thread_local Scratch packed;
  const int64_t size = int64_t(p.B) * p.B / D::PAIR, panels = p.B / PANEL;
  const int64_t group_bytes = panels * Slices::SLICE_PANEL * int64_t(sizeof(Element));
  const Segments segments(p.ptr, p.slots, p.groups, p.out_groups, p.in_groups, std::max<int64_t>(1, SLICE_BYTES / group_bytes));
  Element* weights = packed.take<Element>(p.ptr[p.out_groups] * size);
#pragma omp parallel num_threads(p.threads)
  {
#pragma omp for schedule(static)
    for (int64_t s = 0; s < segments.chunks * p.out_groups; ++s) {
      Element* to = weights + segments.start[s] * size;
      for (int64_t panel = 0; panel < panels; ++panel)
        for (int64_t i = segments.start[s]; i < segments.start[s + 1]; ++i, to += size / panels)
          pack_weights<T>(D(), static_cast<const typename T::Raw*>(p.blocks) + segments.slots[i] * int64_t(p.B) * p.B,
                          p.transpose, p.B, int(panel) * PANEL, to);
    }
    static thread_local Scratch near, sums;
    const bool waits = segments.chunks > 1 && sizeof(typename T::Raw) < sizeof(float);
    const Slices slices{p, segments, weights, waits ? sums.take<float>(TILE * p.out_groups * p.B) : nullptr,
                 near.take<Element>(segments.per_chunk * panels * Slices::SLICE_PANEL)};
    const int64_t tile = tile_tokens(p.tokens, p.threads);
#pragma omp for schedule(static)
    for (int64_t token = 0; token < p.tokens; token += tile) slices.tile(token, std::min(tile, p.tokens - token));
  }
}

}  // namespace dsbert
