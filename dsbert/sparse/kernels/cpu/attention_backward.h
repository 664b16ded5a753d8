// dQ, dK and dV of attention, from what forward has kept: the result, and a number per query and head.
//
// Scores and shares are computed once more, tile by tile (Dao et al. 2022, arXiv:2205.14135, algorithm 4). Of a tile of keys
// dK and dV wait in floats while tiles of queries go by; dQ waits for all keys. With P the shares, M what dropout keeps of
// them, 1 / (1 - p) or 0, and delta = rowsum(dout * out):
//
//   dV = (M P)^T dout     dS = P (M dout V^T - delta)     dQ = scaling dS K     dK = scaling dS^T Q
#pragma once

#include "attention_packing.h"

namespace dsbert {

constexpr int64_t BACKWARD_QUERIES = 64;

// How scores become shares: `drawn` is the place of the first one among all, `length` from query to query.
struct Share {
  float scaling, kept;
  bool drops;
  Draw draw;
  uint64_t drawn;
  int64_t length;
};

// P M and dS (see above) of `rows` queries and a panel of keys, from Q K^T and dout V^T; both LD apart from query to query.
__attribute__((noinline)) inline void share_gradients(const float* scores, const float* incoming, int64_t rows, const float* lse,
                                                      const float* delta, Seen seen, int64_t key, const Share& how,
                                                      float* dropped, float* gradient) {
  const Share share = how;  // a copy: what is stored could lie where the original does, for all that the compiler knows
  uint64_t drawn = share.drawn;
  for (int64_t r = 0; r < rows; ++r, ++seen.query, drawn += uint64_t(share.length), dropped += LD, gradient += LD) {
    const float least = lse[r] * LOG2_E, less = delta[r];
#pragma GCC unroll 4
    for (int v = 0; v < PANEL; v += LANES) {
      const Vec x = load<Vec>(scores + r * PANEL + v) * share.scaling - least;
      const IVec whole = bits<IVec>(power_of_two(x)) & seen.at(key + v);
      IVec part = whole, coming = bits<IVec>(load<Vec>(incoming + r * PANEL + v) * share.kept);
      if (share.drops) {
        const IVec stays = share.draw.stays(drawn + uint64_t(v));
        part &= stays, coming &= stays;
      }
      put(dropped + v, bits<Vec>(part));
      put(gradient + v, bits<Vec>(whole) * (bits<Vec>(coming) - less));
    }
  }
}

template <class T, class D>
struct BackwardHead {
  typedef typename T::Raw Raw;
  typedef typename D::Element Element;
  static constexpr int64_t TILE = BACKWARD_QUERIES * LD;

  const Attention& a;
  const Head& head;
  const Layout<D> layout;
  const Draw draw;
  const float kept;
  // Of the sequence: queries and dout with sums to go over dimensions, and over tokens; delta.
  Element *queries, *douts, *queries_summed, *douts_summed;
  float *dq, *delta;
  int32_t* keep;
  // Of a tile of keys: K with sums to go over keys, K^T and V^T.
  Element *keys_summed, *transposed_keys, *transposed_values;
  float *dk, *dv;
  // Of a tile: P M and dS.
  float *dropped, *gradient;
  uint32_t* pairs;

  BackwardHead(const Attention& a_, const Head& head_, Scratch& memory)
      : a(a_), head(head_), layout(a.size), draw(a.seed, a.p), kept(kept_scale(a.p)) {
    const int64_t room = round_up(head.length, PANEL), rows = room * LD, near = KEYS * LD;
    const int64_t panels = KEYS / PANEL * layout.panel;
    const int64_t apart = D::PAIR == 1 ? 0 : rows;  // plain floats lie alike for both kinds of sums
    float* at = memory.take<float>(3 * rows + 2 * apart + 2 * room + 3 * near + 2 * panels + 2 * TILE + (D::PAIR == 1 ? 0 : TILE));
    const auto floats = [&](int64_t count) { return std::exchange(at, at + count); };
    const auto elements = [&](int64_t count) { return reinterpret_cast<Element*>(floats(count)); };
    queries = elements(rows), douts = elements(rows), dq = floats(rows);
    queries_summed = apart ? elements(rows) : queries, douts_summed = apart ? elements(rows) : douts;
    delta = floats(room), keep = reinterpret_cast<int32_t*>(floats(room));
    keys_summed = elements(near), dk = floats(near), dv = floats(near);
    transposed_keys = elements(panels), transposed_values = elements(panels);
    dropped = floats(TILE), gradient = floats(TILE);
    pairs = reinterpret_cast<uint32_t*>(at);
    seen_keys(a, head, keep);
  }

  void run() {
    pack_queries();
    const Parts tiles(head.length, KEYS, PANEL);
    for (int64_t i = 0; i < tiles.count; ++i) keys(tiles.start(i), tiles.size(i));
    for (int64_t t = 0; t < head.length; ++t) {
      write_row<T>(dq + t * LD, a.size, float(a.scaling), result(a.dq, t));
      fetch<1>(result(a.dq, t) + a.size, a.size);
    }
  }

  Raw* result(void* of, int64_t token) const {
    return static_cast<Raw*>(of) + ((head.first + token) * a.heads + head.head) * a.size;
  }

  void pack_queries() {
    const int64_t n = head.length, room = round_up(n, 2);
    const Raw *q = place<T>(a.q, head, 0), *dout = place<T>(a.dout, head, 0);
    pack_rows<T>(D(), q, a.q.token, n, room, layout, queries);
    pack_rows<T>(D(), dout, a.dout.token, n, room, layout, douts);
    if (D::PAIR > 1) {
      pack_tokens_summed<T>(D(), q, a.q.token, n, room, layout, queries_summed);
      pack_tokens_summed<T>(D(), dout, a.dout.token, n, room, layout, douts_summed);
    }
    alignas(64) float x[128 + LANES], y[128 + LANES];
    for (int64_t t = 0; t < n; ++t) {
      read_row<T>(dout + t * a.dout.token, a.size, layout.padded, x);
      read_row<T>(result(a.out, t), a.size, layout.padded, y);
      fetch(result(a.out, t) + a.size, a.size);
      Vec sum = {};
      for (int64_t i = 0; i < layout.padded; i += LANES) sum += load<Vec>(x + i) * load<Vec>(y + i);
      delta[t] = sum_of(sum);
    }
    std::memset(dq, 0, size_t(n * LD) * sizeof(float));
  }

  // A tile of keys: all queries that may see them.
  void keys(int64_t key, int64_t count) {
    const int64_t room = round_up(count, PANEL);
    const Raw *k = place<T>(a.k, head, key), *v = place<T>(a.v, head, key);
    pack_rows<T>(D(), v, a.v.token, count, room, layout, keys_summed);
    transpose_panels<D>(keys_summed, room, layout, transposed_values);
    pack_rows<T>(D(), k, a.k.token, count, room, layout, keys_summed);
    transpose_panels<D>(keys_summed, room, layout, transposed_keys);
    if (D::PAIR > 1) pack_tokens_summed<T>(D(), k, a.k.token, count, room, layout, keys_summed);
    std::memset(dk, 0, size_t(count * LD) * sizeof(float));
    std::memset(dv, 0, size_t(count * LD) * sizeof(float));
    const Reach reach(key, key + count, a.window, head.length);
    const Parts tiles(reach.to - reach.from, BACKWARD_QUERIES, 2);
    for (int64_t i = 0; i < tiles.count; ++i) tile(reach.from + tiles.start(i), tiles.size(i), key, count);
    for (int64_t t = 0; t < count; ++t) {
      write_row<T>(dk + t * LD, a.size, float(a.scaling), result(a.dk, key + t));
      write_row<T>(dv + t * LD, a.size, kept, result(a.dv, key + t));
      fetch<1>(result(a.dk, key + t) + a.size, a.size);
      fetch<1>(result(a.dv, key + t) + a.size, a.size);
    }
  }

  // Queries [first, first + count) by keys [key, key + keys).
  void tile(int64_t first, int64_t count, int64_t key, int64_t keys) {
    if (a.window >= 0) {  // what is left out below has shares of zero
      std::memset(dropped, 0, size_t(count * LD) * sizeof(float));
      std::memset(gradient, 0, size_t(count * LD) * sizeof(float));
    }
    const Parts groups(count, TOKENS);
    for (int64_t k = 0; k < keys; k += PANEL)
      for (int64_t g = 0; g < groups.count; ++g) {
        const int64_t query = first + groups.start(g), rows = groups.size(g);
        const Reach reach(query, query + rows, a.window, head.length);
        if (key + k >= reach.from && key + k < reach.to) shares(query, rows, first, key, k);
      }
    const int64_t room = round_up(keys, PANEL), start = first / D::PAIR * LD;
    sum_queries(by_queries<T>(D(), dropped, count, room, pairs), douts_summed + start, first, count, key, keys, dv);
    sum_queries(by_queries<T>(D(), gradient, count, room, pairs), queries_summed + start, first, count, key, keys, dk);
    sum_keys(by_keys<T>(D(), gradient, count, room, pairs), first, count, key, keys);
  }

  // Shares and their gradients of a few queries and a panel of keys.
  void shares(int64_t query, int64_t rows, int64_t first, int64_t key, int64_t within) {
    alignas(64) float scores[TOKENS * PANEL], incoming[TOKENS * PANEL];
    const int64_t panel = within / PANEL * layout.panel;
    rows_product<D, false, false>(rows, queries + query * LD, transposed_keys + panel, PANEL, layout.steps,
                                  scores, PANEL);
    rows_product<D, false, false>(rows, douts + query * LD, transposed_values + panel, PANEL, layout.steps,
                                  incoming, PANEL);
    Seen seen(keep, a.window);
    seen.query = query;
    const Share share{float(a.scaling) * LOG2_E, kept, a.p > 0, draw, head.drawn + uint64_t(query * head.length + key + within),
                      head.length};
    const int64_t at = (query - first) * LD + within;
    share_gradients(scores, incoming, rows, a.lse + head.head * a.tokens + head.first + query, delta + query, seen, key + within,
                    share, dropped + at, gradient + at);
  }

  // to[keys] += tile^T rows, the rows from `first` on.
  void sum_queries(const Element* tile, const Element* rows, int64_t first, int64_t count, int64_t key, int64_t keys, float* to) {
    for (int64_t k = 0; k < keys; k += PANEL) {
      const int64_t panel = std::min<int64_t>(PANEL, keys - k);
      const Reach reach(key + k, key + k + panel, a.window, head.length);
      const int64_t from = std::max<int64_t>(0, reach.from - first) / D::PAIR, end = layout.summed(std::min(count, reach.to - first));
      if (from >= end) continue;
      const Parts groups(panel, TOKENS);
      for (int64_t g = 0; g < groups.count; ++g)
        for (int64_t i = 0; i < layout.padded; i += PANEL)
          rows_product<D, true, true>(groups.size(g), tile + from * LD + k + groups.start(g),
                                      rows + from * LD + i, LD, end - from,
                                      to + (k + groups.start(g)) * LD + i, LD);
    }
  }

  // dq[queries] += tile K.
  void sum_keys(const Element* tile, int64_t first, int64_t count, int64_t key, int64_t keys) {
    const Parts groups(count, TOKENS);
    for (int64_t i = 0; i < layout.padded; i += PANEL)
      for (int64_t g = 0; g < groups.count; ++g) {
        const int64_t row = groups.start(g);
        const Reach reach(first + row, first + row + groups.size(g), a.window, head.length);
        const int64_t from = std::max<int64_t>(0, reach.from - key) / D::PAIR, end = layout.summed(std::min(keys, reach.to - key));
        if (from >= end) continue;
        rows_product<D, false, true>(groups.size(g), tile + row * LD + from, keys_summed + from * LD + i,
                                     LD, end - from, dq + (first + row) * LD + i, LD);
      }
  }
};

template <class T, class D>
void attention_backward(const Attention& a) {
  const std::vector<Head> heads = work(a);
#pragma omp parallel num_threads(a.threads)
  {
    static thread_local Scratch memory;
#pragma omp for schedule(dynamic, chunk(a))
    for (size_t i = 0; i < heads.size(); ++i) BackwardHead<T, D>(a, heads[i], memory).run();
  }
}

}  // namespace dsbert
