// Cross-entropy of rows of logits, and its gradient in their place.
#pragma once

#include <cmath>

#include "gelu.h"
#include "vectors.h"

namespace dsbert {

struct CrossEntropy {
  float* logits;          // [rows, classes]; becomes softmax(logits) - one_hot(label) where the gradient is asked for
  const int64_t* labels;  // negative: nothing is asked of this row, loss and gradient are 0
  float* losses;          // [rows]
  int64_t rows, classes;
  bool gradient;
  int threads;
};

// Sum of exp(row - most), which is left in place of the row if `keep`. Long rows are summed in parts, so that what a part
// adds is not lost beside all before it.
template <bool KEEP>
inline double sum_of_exponentials(float* row, int64_t classes, float most) {
  constexpr int64_t PART = 64 * LANES;
  double sum = 0;
  for (int64_t start = 0; start < classes; start += PART) {
    const int64_t end = std::min(classes, start + PART);
    Vec part = {};
    int64_t c = start;
    for (; c + LANES <= end; c += LANES) {
      const Vec e = exp_minus(most - load<Vec>(row + c));
      part += e;
      if (KEEP) put(row + c, e);
    }
    for (int i = 0; i < LANES; ++i) sum += part[i];
    for (; c < end; ++c) {
      const float e = exp_minus(splat(most - row[c]))[0];
      sum += e;
      if (KEEP) row[c] = e;
    }
  }
  return sum;
}

// The largest of a row, or NaN if any is not finite: exp_minus would make a number of it.
inline float largest(const float* row, int64_t classes) {
  Vec most[4], none[4] = {};  // taking turns: one would have each step wait for the one before
  for (Vec& m : most) m = splat(row[0]);
  int64_t c = 0;
  for (; c + 4 * LANES <= classes; c += 4 * LANES)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Vec v = load<Vec>(row + c + i * LANES);
      most[i] = v > most[i] ? v : most[i];
      none[i] += v * 0.0f;
    }
  float found = row[0], poison = 0;
  for (int i = 0; i < 4; ++i)
    for (int lane = 0; lane < LANES; ++lane) found = std::max(found, most[i][lane]), poison += none[i][lane];
  for (; c < classes; ++c) found = std::max(found, row[c]), poison += row[c] * 0.0f;
  return found + poison;
}

inline void cross_entropy(const CrossEntropy& x) {
#pragma omp parallel for schedule(static) num_threads(x.threads)
  for (int64_t r = 0; r < x.rows; ++r) {
    float* row = x.logits + r * x.classes;
    const int64_t label = x.labels[r];
    if (label < 0) {
      x.losses[r] = 0;
      if (x.gradient) std::fill(row, row + x.classes, 0.0f);
      continue;
    }
    const float most = largest(row, x.classes), asked = row[label];
    const double sum = (x.gradient ? sum_of_exponentials<true>(row, x.classes, most)
                                   : sum_of_exponentials<false>(row, x.classes, most)) + (most - most);
    x.losses[r] = float(std::log(sum) + double(most) - double(asked));
    if (!x.gradient) continue;
    const float share = float(1.0 / sum);
    for (int64_t c = 0; c < x.classes; ++c) row[c] *= share;
    row[label] -= 1.0f;
  }
}

}  // namespace dsbert
