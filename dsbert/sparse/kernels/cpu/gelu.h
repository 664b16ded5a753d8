// The exact GELU, x Phi(x) with Phi the normal distribution, and its derivative Phi(x) + x phi(x).
//
// Phi(-|x|) = exp(-x^2 / 2) P(1 / (1 + 0.3 |x|)), P a polynomial fitted (minimax, relative error 1.1e-7 for |x| < 13)
// to mpmath's erfc; exp by 2^n times a polynomial on half an octave (relative error 3e-9). One exponential serves both.
#pragma once

#include "vectors.h"

namespace dsbert {

// exp(-z) for z >= 0; below the smallest normal number about 0.
inline Vec exp_minus(Vec z) {
  const Vec most = splat(87.0f);
  z = z < most ? z : most;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  Vec shifted = z * -1.44269504f + magic;
  Vec n = shifted - magic;
  Vec r = (-z - n * 0.693145752f) - n * 1.42860677e-6f;
  Vec p = r * 0.00138146162f + 0.00836871935f;
  p = p * r + 0.041668388f;
  p = p * r + 0.166665206f;
  p = p * r + 0.499999934f;
  p = p * r * r + r + 1.0f;
  return bits<Vec>(bits<IVec>(p) + (bits<IVec>(shifted) << 23));
}

struct Normal {
  Vec cdf, pdf;
};

inline Normal normal(Vec x) {
  Vec size = x < Vec{} ? -x : x;
  Vec t = 1.0f / (size * 0.3f + 1.0f);
  Vec e = exp_minus(x * x * 0.5f);
  Vec p = t * 0.0361942913f - 0.159375852f;
  p = p * t + 0.210113978f;
  p = p * t - 0.0571631429f;
  p = p * t + 0.130414134f;
  p = p * t + 0.0993478532f;
  p = p * t + 0.120845409f;
  p = p * t + 0.119623271f;
  Vec tail = e * p * t;
  return {x < Vec{} ? tail : 1.0f - tail, e * 0.398942280f};
}

inline Vec gelu(Vec x) {
  Vec y = x * normal(x).cdf;
  const Vec least = splat(-13.0f);  // there and beyond 0, minus infinity included
  return x < least ? Vec{} : y;
}

inline Vec gelu_derivative(Vec x) {
  Normal n = normal(x);
  const Vec least = splat(-13.0f), most = splat(13.0f);
  Vec d = n.cdf + x * n.pdf;
  d = x < least ? Vec{} : d;
  return x > most ? splat(1.0f) : d;
}

}  // namespace dsbert
