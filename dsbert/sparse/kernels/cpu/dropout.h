// Dropout without a mask in memory: which elements fall is a hash of (seed, position), so that backward draws it again.
#pragma once

#include <algorithm>

#include "vectors.h"

namespace dsbert {

// Two rounds of multiply and shift over the position, a part of the seed before each: every bit of the result depends on
// every bit of all three.
inline UVec draw(UVec position, uint32_t seed, uint32_t more) {
  UVec h = position * 0x9e3779b1u ^ seed;
  h ^= h >> 16;
  h *= 0x7feb352du;
  h ^= h >> 15;
  h = (h ^ more) * 0x846ca68bu;
  h ^= h >> 16;
  h *= 0x9e3779b1u;
  return h ^ h >> 15;
}

// What stays of a vector that begins at position i, scaled by 1 / (1 - p). Beyond 2^32 elements another seed takes over:
// a vector must not lie across that border.
struct Drawn {
  uint32_t seed, more, falls;
  float scale;
  UVec lanes;

  Drawn(uint64_t whole, double p)
      : seed(uint32_t(whole)), more(uint32_t(whole >> 32)), falls(uint32_t(p * 4294967296.0)), scale(float(1.0 / (1.0 - p))) {
    for (int i = 0; i < LANES; ++i) lanes[i] = uint32_t(i);
  }

  Vec operator()(Vec x, int64_t i) const {
    const IVec stays = draw(lanes + uint32_t(i), seed + uint32_t(i >> 32), more) >= (falls - UVec{});
    return bits<Vec>(bits<IVec>(x * scale) & stays);
  }
};

struct Dropout {
  const void* x;
  void* y;  // x / (1 - p) where an element stays, 0 where it falls
  int64_t count;
  uint64_t seed;
  double p;
  int threads;
};

template <class T>
void dropout(const Dropout& d) {
  typedef typename T::Raw Raw;
  const Raw* x = static_cast<const Raw*>(d.x);
  Raw* y = static_cast<Raw*>(d.y);
  const Drawn drawn(d.seed, d.p);
#pragma omp parallel for schedule(static) num_threads(d.threads)
  for (int64_t i = 0; i < d.count; i += LANES) {
    const int n = int(std::min<int64_t>(LANES, d.count - i));
    Raw part[LANES] = {};
    const Raw* from = x + i;
    if (n < LANES) {
      std::copy(x + i, x + d.count, part);
      from = part;
    }
    const Vec value = drawn(T::get(from), i);
    if (n == LANES) {
      T::set(y + i, value);
    } else {
      T::set(part, value);
      std::copy(part, part + n, y + i);
    }
  }
}

}  // namespace dsbert
