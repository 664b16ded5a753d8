// How the operands of attention are laid out before they are multiplied: of one head, tokens by dimensions.
//
// steps: what a sum over the head's dimensions, or over tokens, has: elements, or pairs of bf16. Padding is zeros.
#pragma once

#include "attention.h"
#include "transposing.h"

namespace dsbert {

// Sizes of a head of `size` dimensions.
template <class D>
struct Layout {
  int64_t size, padded, steps, panel;
  explicit Layout(int64_t d)
      : size(d), padded(round_up(d, PANEL)), steps((d + D::PAIR - 1) / D::PAIR),
        panel(round_up(padded / D::PAIR, LANES) * PANEL) {}
  static int64_t summed(int64_t tokens) { return (tokens + D::PAIR - 1) / D::PAIR; }
};

// Has what stands there come from memory meanwhile: of the next head, whose rows lie beside those of this one, each in a page
// of its own, where the machine does not foresee it.
template <int WRITE = 0, class E>
inline void fetch(const E* x, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(E))) __builtin_prefetch(x + i, WRITE, 2);
}

// A token of one head, to floats and back.
template <class T>
inline void read_row(const typename T::Raw* x, int64_t size, int64_t padded, float* to) {
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) put(to + i, T::get(x + i));
  for (; i < padded; i += LANES) {
    typename T::Raw raw[LANES] = {};
    for (int64_t k = i; k < size; ++k) raw[k - i] = x[k];
    put(to + i, T::get(raw));
  }
}

template <class T>
__attribute__((noinline)) void write_row(const float* x, int64_t size, float scale, typename T::Raw* to) {
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) T::set(to + i, load<Vec>(x + i) * scale);
  if (i == size) return;
  typename T::Raw raw[LANES];
  T::set(raw, load<Vec>(x + i) * scale);  // x is padded
  std::copy(raw, raw + (size - i), to + i);
}

template <class T>
inline const typename T::Raw* place(const Operand& x, const Head& head, int64_t token) {
  return static_cast<const typename T::Raw*>(x.data) + (head.first + token) * x.token + head.head * x.head;
}

// `count` tokens, `room` with those of zeros, as [room][LD], sums to go over dimensions.
template <class T>
__attribute__((noinline)) void pack_rows(FloatDot, const typename T::Raw* x, int64_t stride, int64_t count, int64_t room, const Layout<FloatDot>& to,
               float* rows) {
  for (int64_t t = 0; t < count; ++t, x += stride) {
    read_row<T>(x, to.size, to.padded, rows + t * LD);
    fetch(x + to.size, to.size);
  }
  std::memset(rows + count * LD, 0, size_t((room - count) * LD) * sizeof(float));
}

template <class T>
__attribute__((noinline)) void pack_rows(PairDot, const U16* x, int64_t stride, int64_t count, int64_t room, const Layout<PairDot>& to, uint32_t* rows) {
  std::memset(rows, 0, size_t(room * LD) * sizeof(uint32_t));
  for (int64_t t = 0; t < count; ++t, x += stride) {
    std::memcpy(rows + t * LD, x, size_t(to.size) * sizeof(U16));
    fetch(x + to.size, to.size);
  }
}

// The same, sums to go over tokens: [room / PAIR][LD]. Plain floats lie as above.
template <class T>
void pack_tokens_summed(FloatDot dot, const typename T::Raw* x, int64_t stride, int64_t count, int64_t room,
                        const Layout<FloatDot>& to, float* rows) {
  pack_rows<T>(dot, x, stride, count, room, to, rows);
}

template <class T>
__attribute__((noinline)) void pack_tokens_summed(PairDot, const U16* x, int64_t stride, int64_t count, int64_t room, const Layout<PairDot>& to,
                        uint32_t* rows) {
  std::memset(rows, 0, size_t(room / 2 * LD) * sizeof(uint32_t));
  for (int64_t t = 0; t < count; t += 2, rows += LD) {
    const U16 *low = x + t * stride, *high = t + 1 < count ? low + stride : nullptr;
    for (int64_t i = 0; i < to.size; ++i) rows[i] = pair(low[i], high ? high[i] : U16(0));
  }
}

// Rows as `pack_rows` leaves them -> [panel of tokens][steps][PANEL], `room` a multiple of PANEL.
template <class D>
__attribute__((noinline)) void transpose_panels(const typename D::Element* rows, int64_t room, const Layout<D>& of, typename D::Element* to) {
  for (int64_t t = 0; t < room; t += PANEL, to += of.panel)
    for (int64_t s = 0; s < of.steps; s += LANES)
      for (int64_t r = 0; r < PANEL; r += LANES) transpose(rows + (t + r) * LD + s, LD, to + s * PANEL + r, PANEL);
}

// Shares or their gradients, a tile of floats, as factors of a product. Plain floats are what they are.
template <class T>
inline const float* by_keys(FloatDot, const float* tile, int64_t, int64_t, uint32_t*) { return tile; }

template <class T>
inline const float* by_queries(FloatDot, const float* tile, int64_t, int64_t, uint32_t*) { return tile; }

// Pairs of keys, rows LD apart; `keys` a multiple of PANEL.
template <class T>
inline const uint32_t* by_keys(PairDot, const float* tile, int64_t rows, int64_t keys, uint32_t* to) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < keys; k += LANES)
      BF16::set(reinterpret_cast<U16*>(to + r * LD) + k, load<Vec>(tile + r * LD + k));
  return to;
}

// [rows / 2][LD] pairs of queries, the one after an odd last one zeros.
template <class T>
inline const uint32_t* by_queries(PairDot, const float* tile, int64_t rows, int64_t keys, uint32_t* to) {
  for (int64_t r = 0; r < rows; r += 2, tile += 2 * LD, to += LD)
    for (int64_t k = 0; k < keys; k += LANES) {
      alignas(64) U16 low[LANES], high[LANES] = {};
      BF16::set(low, load<Vec>(tile + k));
      if (r + 1 < rows) BF16::set(high, load<Vec>(tile + LD + k));
      for (int i = 0; i < LANES; ++i) to[k + i] = pair(low[i], high[i]);
    }
  return to - (rows + 1) / 2 * LD;
}

}  // namespace dsbert
