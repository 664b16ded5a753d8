// Attention within sequences of any length, one behind the other: what is asked for, and what forward and backward share.
//
// T tokens, h heads, d head size; of one head of one sequence: L tokens. Tiles of queries by keys; the unit of keys, and of
// the head's dimensions, is a PANEL of 16. Work is shared out by (sequence, head): none writes where another one does, so
// the bits are the same for any number of threads.
#pragma once

#include <cmath>
#include <utility>
#include <vector>

#include "dropout.h"
#include "packing.h"
#include "product.h"

namespace dsbert {

// Mirrored by `_Call` in attention.py. Element (t, h, i) of an operand stands at data + t * token + h * head + i.
struct Operand {
  const void* data;
  int64_t token, head;
};

struct Attention {
  Operand q, k, v, dout;  // dout: backward alone
  void* out;              // [T, h, d], as all that is written
  float* lse;             // [h, T]: log of the sum of exp(scores), 0 where nothing is seen
  void *dq, *dk, *dv;
  const int64_t* starts;   // [sequences + 1]
  const uint8_t* visible;  // [T], which keys are seen; or null
  int64_t sequences, heads, size, tokens;
  int64_t window;  // tokens to each side that are seen; negative: all
  uint64_t seed;
  double p, scaling;
  int64_t dtype, threads;
};

constexpr int64_t KEYS = 128;  // of a tile
// How far rows of tiles and of operands stand apart: as many as there can be keys in a tile, or dimensions, and a few more,
// so that a column does not fall into one set of the cache. Known early: 12 rows by one address.
constexpr int64_t LD = 128 + PANEL;
constexpr float UNSEEN = -3e38f;

inline float sum_of(Vec x) {
  float sum = 0;
  for (int i = 0; i < LANES; ++i) sum += x[i];
  return sum;
}

// 2^x for x <= 0, or a little more; below the smallest normal number about 0; NaN of NaN. An integer power times a polynomial
// on half an octave to each side (minimax, relative error 1e-7; 1 at 0).
inline Vec power_of_two(Vec x) {
  x = larger(splat(-126.0f), x);
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = x + magic, f = x - (shifted - magic);
  Vec p = f * 0.00132647273f + 0.00967151299f;
  p = p * f + 0.0555073358f;
  p = p * f + 0.240222424f;
  p = p * f + 0.693147004f;
  p = p * f + 1.0f;
  return bits<Vec>(bits<IVec>(p) + (bits<IVec>(shifted) << 23));
}

constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// n things in parts of nearly equal size, of `most` at most, each of which begins at a multiple of `unit`.
struct Parts {
  int64_t n, unit, units, count;
  Parts(int64_t n_, int64_t most, int64_t unit_ = 1)
      : n(n_), unit(unit_), units((n + unit - 1) / unit), count(std::max<int64_t>(1, (units + most / unit - 1) / (most / unit))) {}
  int64_t start(int64_t part) const { return std::min(n, units * part / count * unit); }
  int64_t size(int64_t part) const { return start(part + 1) - start(part); }
};

// One head of one sequence.
struct Head {
  int64_t first, length, head;
  uint64_t drawn;  // numbers of dropout that go to others: the place of the first of these shares among all
};

// The longest first, so that no thread begins with one when the others are done.
inline std::vector<Head> work(const Attention& a) {
  std::vector<Head> found;
  found.reserve(size_t(a.sequences * a.heads));
  uint64_t drawn = 0;
  for (int64_t s = 0; s < a.sequences; ++s) {
    const int64_t first = a.starts[s], length = a.starts[s + 1] - first;
    for (int64_t h = 0; h < a.heads && length > 0; ++h, drawn += uint64_t(length * length))
      found.push_back({first, length, h, drawn});
  }
  std::stable_sort(found.begin(), found.end(), [](const Head& x, const Head& y) { return x.length > y.length; });
  return found;
}

// Heads that a thread takes at once: neighbours, as far as that leaves enough to share out.
inline int chunk(const Attention& a) {
  return int(std::max<int64_t>(1, std::min(a.heads, a.sequences * a.heads / (8 * a.threads))));
}

// What of a sequence's keys may be seen, as bits by key: padding of the last panel may not.
inline void seen_keys(const Attention& a, const Head& head, int32_t* keep) {
  const uint8_t* visible = a.visible ? a.visible + head.first : nullptr;
  for (int64_t k = 0; k < head.length; ++k) keep[k] = !visible || visible[k] ? -1 : 0;
  std::fill(keep + head.length, keep + round_up(head.length, PANEL), 0);
}

// The same for one query: also what lies within the window.
struct Seen {
  const int32_t* keep;
  int64_t window, query;
  IVec lanes;
  Seen(const int32_t* keep_, int64_t window_) : keep(keep_), window(window_), query(0) {
    for (int i = 0; i < LANES; ++i) lanes[i] = i;
  }
  IVec at(int64_t key) const {
    IVec seen = load<IVec>(keep + key);
    if (window >= 0) {
      const IVec away = lanes + int32_t(key - query), most = int32_t(std::min<int64_t>(window, INT32_MAX)) - IVec{};
      seen &= (away <= most) & (-away <= most);
    }
    return seen;
  }
};

// The keys that queries [from, to) may see, or the other way round: whole panels.
struct Reach {
  int64_t from, to;
  Reach(int64_t first, int64_t end, int64_t window, int64_t length) : from(0), to(length) {
    if (window < 0 || window >= length) return;
    from = std::max<int64_t>(0, first - window) / PANEL * PANEL;
    to = std::min(length, round_up(end + window, PANEL));
  }
};

// c[N][PANEL] += a b, a sum over `steps`: a[n * LD + s], or with BY_STEP a[s * LD + n]; b[s * ldb]. A function of its own,
// without branches, as `multiply` is.
template <class D, int N, bool BY_STEP, bool ADD>
__attribute__((noinline)) void tile_product(const typename D::Element* a, const typename D::Element* b, int64_t ldb, int64_t steps,
                                            float* c, int64_t ldc) {
  typedef typename D::Weights W;
  Vec sums[N][NV];
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sums[n][v] = ADD ? load<Vec>(c + n * ldc + v * LANES) : Vec{};
  if (steps <= 0) __builtin_unreachable();
  for (int64_t s = 0; s < steps; ++s, b += ldb) {
    W vectors[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) vectors[v] = load<W>(b + v * LANES);
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) D::fma(sums[n][v], BY_STEP ? a[n] : a[n * LD], vectors[v]);
    a += BY_STEP ? LD : 1;
  }
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) put(c + n * ldc + v * LANES, sums[n][v]);
}

// The same for a number of rows that is known late, TOKENS at most: by a table, of which there is one for each kind of
// product, so that the compiler is done soon.
template <class D, bool BY_STEP, bool ADD>
struct TileProducts {
  typedef void (*Function)(const typename D::Element*, const typename D::Element*, int64_t, int64_t, float*, int64_t);
  Function of[TOKENS + 1] = {};
  constexpr TileProducts() { fill<TOKENS>(); }
  template <int N>
  constexpr void fill() {
    of[N] = tile_product<D, N, BY_STEP, ADD>;
    if constexpr (N > 1) fill<N - 1>();
  }
};

template <class D, bool BY_STEP, bool ADD>
inline void rows_product(int64_t rows, const typename D::Element* a, const typename D::Element* b, int64_t ldb, int64_t steps,
                         float* c, int64_t ldc) {
  static constexpr TileProducts<D, BY_STEP, ADD> products;
  products.of[rows](a, b, ldb, steps, c, ldc);
}

}  // namespace dsbert
