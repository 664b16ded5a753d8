// Squares of LANES rows of LANES elements of 32 bits, transposed in registers.
#pragma once

#include "vectors.h"

namespace dsbert {

// x and y, element by element in turn.
inline void interleave(UVec x, UVec y, UVec& low, UVec& high) {
  UVec first, second;  // places in (x, y)
#pragma GCC unroll 16
  for (uint32_t i = 0; i < LANES; ++i) {
    first[i] = i / 2 + i % 2 * LANES;
    second[i] = first[i] + LANES / 2;
  }
#if defined(__clang__)
  UVec both[2] = {x, y};
  for (uint32_t i = 0; i < LANES; ++i) {
    low[i] = both[first[i] / LANES][first[i] % LANES];
    high[i] = both[second[i] / LANES][second[i] % LANES];
  }
#else
  low = __builtin_shuffle(x, y, first);
  high = __builtin_shuffle(x, y, second);
#endif
}

// Each round interleaves the first half of the rows with the second.
inline void transpose(UVec (&rows)[LANES]) {
  UVec next[LANES];
#pragma GCC unroll 4
  for (int round = 1; round < LANES; round *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES / 2; ++i) interleave(rows[i], rows[i + LANES / 2], next[2 * i], next[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) rows[i] = next[i];
  }
}

// From rows `ld` apart to rows `ldt` apart.
inline void transpose(const void* from, int64_t ld, void* to, int64_t ldt) {
  UVec rows[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) rows[i] = load<UVec>(static_cast<const uint32_t*>(from) + i * ld);
  transpose(rows);
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) put(static_cast<uint32_t*>(to) + i * ldt, rows[i]);
}

}  // namespace dsbert
