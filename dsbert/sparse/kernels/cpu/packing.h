// How operands are laid out before they are multiplied, and what multiplies them.
//
// The unit is a PANEL of 16 features: a block of size B has B / 16 by B / 16 of them, and loops know no B.
#pragma once

#include <algorithm>
#include <cstdlib>

#include "vectors.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace dsbert {

constexpr int PANEL = 16;
constexpr int NV = PANEL / LANES;

// What is multiplied: plain floats, or pairs of bf16 that one instruction multiplies and adds.

struct FloatDot {
  typedef float Element;
  typedef Vec Weights;
  static constexpr int PAIR = 1;
  static void fma(Vec& sum, const float& a, Vec b) { add_product(sum, a, b); }
};

struct PairDot {
  typedef uint32_t Element;
  typedef UVec Weights;
  static constexpr int PAIR = 2;
#if defined(__AVX512BF16__)
  static void fma(Vec& sum, const uint32_t& a, UVec b) {
    sum = (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
  }
#else  // the same in plain vectors, so that the layout can be tested where the instruction is missing
  static void fma(Vec& sum, const uint32_t& a, UVec b) {
    add_product(sum, bits<float>(a << 16), bits<Vec>(b << 16));
    add_product(sum, bits<float>(a & 0xffff0000u), bits<Vec>(b & 0xffff0000u));
  }
#endif
};

// Memory that a thread keeps from call to call: fresh pages would cost more than the packing. Where it is much, it asks
// for large pages: which of the small ones fall into one set of the cache would be luck.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  template <class E>
  E* take(int64_t count) {
    const size_t wanted = size_t(count) * sizeof(E) + 255;
    const size_t unit = wanted > LARGE / 4 ? LARGE : 64, size = wanted / unit * unit + unit;
    if (size > size_) {
      std::free(data_);
      data_ = std::aligned_alloc(unit, size);
      if (!data_) std::abort();
#if defined(MADV_HUGEPAGE)
      if (unit == LARGE) madvise(data_, size, MADV_HUGEPAGE);
#endif
      size_ = size;
    }
    return static_cast<E*>(data_);
  }

 private:
  static constexpr size_t LARGE = size_t(2) << 20;
  void* data_ = nullptr;
  size_t size_ = 0;
};

inline uint32_t pair(U16 low, U16 high) { return uint32_t(high) << 16 | low; }

// PANEL outputs of a block, those from `offset` on, as [k][PANEL], k the summed side.
template <class T>
void pack_weights(FloatDot, const typename T::Raw* block, bool transpose, int B, int offset, float* to) {
  for (int k = 0; k < B; k += LANES)
    for (int o = 0; transpose && o < PANEL; ++o) {
      const Vec values = T::get(block + int64_t(offset + o) * B + k);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) to[(k + i) * PANEL + o] = values[i];
    }
  for (int k = 0; !transpose && k < B; ++k)
    for (int o = 0; o < PANEL; o += LANES) put(to + k * PANEL + o, T::get(block + int64_t(k) * B + offset + o));
}

template <class T>
void pack_weights(PairDot, const U16* block, bool transpose, int B, int offset, uint32_t* to) {
  block += transpose ? int64_t(offset) * B : offset;
  for (int k = 0; k < B; k += 2, to += PANEL)
    for (int64_t o = 0; o < PANEL; ++o)
      to[o] = transpose ? pair(block[o * B + k], block[o * B + k + 1])
                        : pair(block[int64_t(k) * B + o], block[int64_t(k + 1) * B + o]);
}

// `count` tokens as [panel][room][16 features]: what a product reads of a panel lies side by side.
template <class T>
void pack_tokens(FloatDot, const typename T::Raw* x, int64_t ldx, int64_t panels, int64_t count, int64_t room, float* to) {
  for (int64_t t = 0; t < count; ++t, x += ldx, to += PANEL)
    for (int64_t p = 0; p < panels; ++p)
      for (int i = 0; i < PANEL; i += LANES) put(to + p * room * PANEL + i, T::get(x + p * PANEL + i));
}

template <class T>
void pack_tokens(PairDot, const U16* x, int64_t ldx, int64_t panels, int64_t count, int64_t room, uint32_t* to) {
  for (int64_t t = 0; t < count; ++t, x += ldx, to += PANEL / 2)
    for (int64_t p = 0; p < panels; ++p) std::memcpy(to + p * room * PANEL / 2, x + p * PANEL, PANEL * 2);
}

// The same for sums over tokens: with pairs [panel][room / 2][16 features], two tokens side by side, and a token of
// zeros after an odd last one.
template <class T>
void pack_summed(FloatDot dot, const typename T::Raw* x, int64_t ldx, int64_t panels, int64_t count, int64_t room, float* to) {
  pack_tokens<T>(dot, x, ldx, panels, count, room, to);
}

template <class T>
void pack_summed(PairDot, const U16* x, int64_t ldx, int64_t panels, int64_t count, int64_t room, uint32_t* to) {
  for (int64_t t = 0; t < count; t += 2, x += 2 * ldx, to += PANEL)
    for (int64_t p = 0; p < panels; ++p) {
      const U16 *low = x + p * PANEL, *high = t + 1 < count ? low + ldx : nullptr;
      for (int i = 0; i < PANEL; ++i) to[p * room / 2 * PANEL + i] = pair(low[i], high ? high[i] : U16(0));
    }
}

}  // namespace dsbert
