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

// Which of a run of LANES positions stay, each with probability 1 - p.
struct Draw {
  uint32_t seed, more, falls;
  UVec lanes;

  Draw(uint64_t seed_, double p) : seed(uint32_t(seed_)), more(uint32_t(seed_ >> 32)), falls(uint32_t(p * 4294967296.0)) {
    for (int i = 0; i < LANES; ++i) lanes[i] = uint32_t(i);
  }

  // Beyond 2^32 positions another seed takes over.
  IVec stays(uint64_t position) const {
    const uint32_t low = uint32_t(position), high = seed + uint32_t(position >> 32);
    const UVec at = lanes + low;
    UVec drawn = draw(at, high, more);
    if (__builtin_expect(low > UINT32_MAX - LANES + 1, 0)) {  // in the middle of the run
      const UVec beyond = draw(at, high + 1, more), over = bits<UVec>(at < lanes);
      drawn = (drawn & ~over) | (beyond & over);
    }
    return drawn >= (falls - UVec{});
  }
};

inline float kept_scale(double p) { return float(1.0 / (1.0 - p)); }

// What stays of a vector that begins at position i, scaled.
struct Drawn {
  Draw draw;
  float scale;

  Drawn(uint64_t seed, double p) : draw(seed, p), scale(kept_scale(p)) {}

  Vec operator()(Vec x, int64_t i) const { return bits<Vec>(bits<IVec>(x * scale) & draw.stays(uint64_t(i))); }
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
