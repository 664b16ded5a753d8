// How operands are laid out before they are multiplied, and what multiplies them.
#pragma once

#include <algorithm>
#include <cstdlib>

#include "vectors.h"

namespace dsbert {

constexpr int PANEL = 16;  // outputs that a pass computes; every block size here is a multiple
constexpr int NV = PANEL / LANES;

// What is multiplied: plain floats, or pairs of bf16 that one instruction multiplies and adds.

struct FloatDot {
  typedef float Element;
  typedef Vec Weights;
  static constexpr int PAIR = 1;
  static Vec fma(Vec sum, float a, Vec b) { return sum + a * b; }
};

struct PairDot {
  typedef uint32_t Element;
  typedef UVec Weights;
  static constexpr int PAIR = 2;
#if defined(__AVX512BF16__)
  static Vec fma(Vec sum, uint32_t a, UVec b) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
  }
#else  // the same in plain vectors, so that the layout can be tested where the instruction is missing
  static Vec fma(Vec sum, uint32_t a, UVec b) {
    sum += bits<float>(a << 16) * bits<Vec>(b << 16);
    return sum + bits<float>(a & 0xffff0000u) * bits<Vec>(b & 0xffff0000u);
  }
#endif
};

// Memory that a thread keeps from call to call: fresh pages would cost more than the packing.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  template <class E>
  E* take(int64_t count) {
    size_t size = (size_t(count) * sizeof(E) + 255) / 64 * 64;
    if (size > size_) {
      std::free(data_);
      data_ = std::aligned_alloc(64, size);
      if (!data_) std::abort();
      size_ = size;
    }
    return static_cast<E*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

// A block as [panel][k][PANEL], k the summed side.
template <class T>
void pack_block(FloatDot, const typename T::Raw* block, bool transpose, int B, float* to) {
  static thread_local Scratch unpacked;
  float* values = unpacked.take<float>(int64_t(B) * B);
  for (int64_t i = 0; i < int64_t(B) * B; i += LANES) put(values + i, T::get(block + i));
  for (int p = 0; p < B; p += PANEL)
    for (int k = 0; k < B; ++k, to += PANEL)
      for (int o = 0; o < PANEL; ++o) to[o] = transpose ? values[(p + o) * B + k] : values[k * B + p + o];
}

inline uint32_t pair(U16 low, U16 high) { return uint32_t(high) << 16 | low; }

template <class T>
void pack_block(PairDot, const U16* block, bool transpose, int B, uint32_t* to) {
  for (int p = 0; p < B; p += PANEL)
    for (int k = 0; k < B; k += 2, to += PANEL)
      for (int o = 0; o < PANEL; ++o)
        to[o] = transpose ? pair(block[(p + o) * B + k], block[(p + o) * B + k + 1])
                          : pair(block[k * B + p + o], block[(k + 1) * B + p + o]);
}

// `count` tokens as [group][token][B]: what a block reads lies side by side. `room` tokens are laid out per group.
template <class T>
void pack_tokens(FloatDot, const typename T::Raw* x, int64_t ldx, int64_t groups, int B, int64_t count, int64_t room, float* to) {
  for (int64_t t = 0; t < count; ++t, x += ldx)
    for (int64_t g = 0; g < groups; ++g)
      for (int i = 0; i < B; i += LANES) put(to + (g * room + t) * B + i, T::get(x + g * B + i));
}

template <class T>
void pack_tokens(PairDot, const U16* x, int64_t ldx, int64_t groups, int B, int64_t count, int64_t room, uint32_t* to) {
  for (int64_t t = 0; t < count; ++t, x += ldx)
    for (int64_t g = 0; g < groups; ++g) std::memcpy(to + (g * room + t) * B / 2, x + g * B, size_t(B) * 2);
}

// The same for sums over tokens: with pairs, two tokens side by side, and a token of zeros after an odd last one.
template <class T>
void pack_summed(FloatDot dot, const typename T::Raw* x, int64_t ldx, int64_t groups, int B, int64_t count, int64_t room, float* to) {
  pack_tokens<T>(dot, x, ldx, groups, B, count, room, to);
}

template <class T>
void pack_summed(PairDot, const U16* x, int64_t ldx, int64_t groups, int B, int64_t count, int64_t room, uint32_t* to) {
  for (int64_t t = 0; t < count; t += 2, x += 2 * ldx)
    for (int64_t g = 0; g < groups; ++g) {
      const U16 *low = x + g * B, *high = t + 1 < count ? low + ldx : nullptr;
      uint32_t* at = to + (g * room + t) / 2 * B;
      for (int i = 0; i < B; ++i) at[i] = pair(low[i], high ? high[i] : U16(0));
    }
}

}  // namespace dsbert
