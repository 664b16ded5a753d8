// out = softmax(Q K^T scaling) V of every head of every sequence, with dropout of the shares.
//
// A tile of queries goes over tiles of keys: its scores stay in the first-level cache, become shares there, and are
// multiplied into sums of V in floats. The largest score so far, and the sum of the exponentials below it, go along (online
// softmax: Milakov & Gimelshein 2018, arXiv:1805.02867; tiles: Dao et al. 2022, arXiv:2205.14135, algorithm 1).
#pragma once

#include "attention_packing.h"

namespace dsbert {

#if DSBERT_LANES == 16
constexpr int64_t FORWARD_QUERIES = 36;
#else
constexpr int64_t FORWARD_QUERIES = 24;
#endif

// Of one query: the largest score seen so far, in powers of two, and the sum of 2^(score - largest).
struct Softmax {
  float largest, sum;
};

inline float largest_of(Vec x) {
  float most = x[0];
  for (int i = 1; i < LANES; ++i) most = x[i] > most ? x[i] : most;
  return most;
}

// Scores of one query and `count` keys (a multiple of PANEL) -> 2^(score scaling - largest), of which dropout then takes some
// away. Returns what sums of before are to be multiplied by.
__attribute__((noinline)) inline float shares(float* scores, int64_t count, const Seen seen, int64_t key, float scaling, bool drops, const Draw& draw_,
                    uint64_t drawn, Softmax& so_far) {
  const Draw draw = draw_;
  const Vec unseen = splat(UNSEEN);
  Vec most = splat(so_far.largest), sum = {};
  for (int64_t k = 0; k < count; k += LANES) {
    const Vec scaled = load<Vec>(scores + k) * scaling, x = seen.at(key + k) ? scaled : unseen;
    most = larger(x, most);
    put(scores + k, x);
  }
  const float largest = largest_of(most), before = so_far.largest;
  for (int64_t k = 0; k < count; k += LANES) {
    const Vec x = load<Vec>(scores + k);
    const IVec e = bits<IVec>(power_of_two(x - largest)) & (x != unseen);  // NaN stays NaN
    sum += bits<Vec>(e);
    put(scores + k, bits<Vec>(drops ? e & draw.stays(drawn + uint64_t(k)) : e));
  }
  const float factor = largest == before ? 1.0f : power_of_two(splat(before - largest))[0];
  so_far = {largest, so_far.sum * factor + sum_of(sum)};
  return factor;
}

template <class T, class D>
struct ForwardHead {
  typedef typename T::Raw Raw;
  typedef typename D::Element Element;

  const Attention& a;
  const Head& head;
  const Layout<D> layout;
  const Draw draw;
  Element *queries, *transposed, *values;  // values: sums go over keys
  int32_t* keep;
  Element* pairs;
  alignas(64) float scores[FORWARD_QUERIES * LD];
  Softmax softmax[FORWARD_QUERIES];
  float* sums;  // [FORWARD_QUERIES][LD]

  ForwardHead(const Attention& a_, const Head& head_, Scratch& memory, Scratch& flags)
      : a(a_), head(head_), layout(a.size), draw(a.seed, a.p) {
    const int64_t room = round_up(head.length, PANEL), rows = FORWARD_QUERIES * LD;
    queries = memory.take<Element>(std::max(rows, PANEL * LD) + room / PANEL * layout.panel + room * LD + rows +
                                   FORWARD_QUERIES * LD);
    transposed = queries + std::max(rows, PANEL * LD);
    values = transposed + room / PANEL * layout.panel;
    sums = reinterpret_cast<float*>(values + room * LD);
    pairs = values + room * LD + rows;
    keep = flags.take<int32_t>(room);
    seen_keys(a, head, keep);
    const Raw *k = place<T>(a.k, head, 0), *v = place<T>(a.v, head, 0);
    for (int64_t t = 0; t < head.length; t += PANEL) {
      pack_rows<T>(D(), k + t * a.k.token, a.k.token, std::min<int64_t>(PANEL, head.length - t), PANEL, layout, queries);
      transpose_panels<D>(queries, PANEL, layout, transposed + t / PANEL * layout.panel);
    }
    pack_tokens_summed<T>(D(), v, a.v.token, head.length, room, layout, values);
  }

  void run() {
    const Parts tiles(head.length, FORWARD_QUERIES);
    for (int64_t i = 0; i < tiles.count; ++i) tile(tiles.start(i), tiles.size(i));
  }

  void tile(int64_t first, int64_t count) {
    pack_rows<T>(D(), place<T>(a.q, head, first), a.q.token, count, count, layout, queries);
    std::fill_n(softmax, count, Softmax{UNSEEN, 0.0f});
    std::memset(sums, 0, size_t(count * LD) * sizeof(float));
    const Reach reach(first, first + count, a.window, head.length);
    for (int64_t key = reach.from; key < reach.to; key += KEYS)
      keys(first, count, key, std::min(KEYS, reach.to - key));
    float* lse = a.lse + head.head * a.tokens + head.first + first;
    Raw* out = static_cast<Raw*>(a.out) + ((head.first + first) * a.heads + head.head) * a.size;
    const float kept = kept_scale(a.p);
    for (int64_t q = 0; q < count; ++q, out += a.heads * a.size) {
      const bool nothing = softmax[q].sum == 0.0f;
      lse[q] = nothing ? 0.0f : softmax[q].largest * LN_2 + std::log(softmax[q].sum);
      write_row<T>(sums + q * LD, a.size, nothing ? 0.0f : kept / softmax[q].sum, out);
      fetch<1>(out + a.size, a.size);
    }
  }

  void keys(int64_t first, int64_t count, int64_t key, int64_t keys) {
    const Parts groups(count, TOKENS);
    const int64_t room = round_up(keys, PANEL), steps = layout.summed(keys);
    for (int64_t k = 0; k < keys; k += PANEL)
      for (int64_t g = 0; g < groups.count; ++g)
        rows_product<D, false, false>(groups.size(g), queries + groups.start(g) * LD,
                                      transposed + (key + k) / PANEL * layout.panel, PANEL, layout.steps,
                                      scores + groups.start(g) * LD + k, LD);
    Seen seen(keep, a.window);
    const float scaling = float(a.scaling) * LOG2_E;
    for (int64_t q = 0; q < count; ++q) {
      seen.query = first + q;
      const uint64_t drawn = head.drawn + uint64_t((first + q) * head.length + key);
      const float factor = shares(scores + q * LD, room, seen, key, scaling, a.p > 0, draw, drawn, softmax[q]);
      if (factor == 1.0f) continue;
      for (int64_t i = 0; i < layout.padded; i += LANES) {
        float* sum = sums + q * LD + i;
        put(sum, load<Vec>(sum) * factor);
      }
    }
    const Element* factors = by_keys<T>(D(), scores, count, room, reinterpret_cast<uint32_t*>(pairs));
    for (int64_t i = 0; i < layout.padded; i += PANEL)
      for (int64_t g = 0; g < groups.count; ++g)
        rows_product<D, false, true>(groups.size(g), factors + groups.start(g) * LD,
                                     values + key / D::PAIR * LD + i, LD, steps,
                                     sums + groups.start(g) * LD + i, LD);
  }
};

template <class T, class D>
void attention_forward(const Attention& a) {
  const std::vector<Head> heads = work(a);
#pragma omp parallel num_threads(a.threads)
  {
    static thread_local Scratch memory, flags;
#pragma omp for schedule(dynamic, chunk(a))
    for (size_t i = 0; i < heads.size(); ++i) ForwardHead<T, D>(a, heads[i], memory, flags).run();
  }
}

}  // namespace dsbert
