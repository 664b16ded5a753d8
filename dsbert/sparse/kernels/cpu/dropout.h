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
  const uint32_t seed = uint32_t(d.seed), more = uint32_t(d.seed >> 32), falls = uint32_t(d.p * 4294967296.0);
  const float scale = float(1.0 / (1.0 - d.p));
  UVec lanes;
  for (int i = 0; i < LANES; ++i) lanes[i] = uint32_t(i);
#pragma omp parallel for schedule(static) num_threads(d.threads)
  for (int64_t i = 0; i < d.count; i += LANES) {
    // Beyond 2^32 elements another seed takes over.
    const UVec drawn = draw(lanes + uint32_t(i), seed + uint32_t(i >> 32), more);
    const IVec stays = drawn >= (falls - UVec{});
    const int n = int(std::min<int64_t>(LANES, d.count - i));
    Raw part[LANES] = {};
    const Raw* from = x + i;
    if (n < LANES) {
      std::copy(x + i, x + d.count, part);
      from = part;
    }
    const Vec value = bits<Vec>(bits<IVec>(T::get(from) * scale) & stays);
    if (n == LANES) {
      T::set(y + i, value);
    } else {
      T::set(part, value);
      std::copy(part, part + n, y + i);
    }
  }
}

}  // namespace dsbert
