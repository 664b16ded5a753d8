// The three products of a block-sparse linear layer on a CPU, the derivative of GELU, dropout, attention, LayerNorm and
// cross-entropy: what Python calls.
//
// T tokens, K active blocks, B block size. A weight [out, in] is cut into groups of B rows and B columns. Sums run in the
// order of blocks, or of tokens, however many threads there are: equal input gives equal bits.
#include "attention_backward.h"
#include "attention_forward.h"
#include "cross_entropy.h"
#include "dropout.h"
#include "elements.h"
#include "gelu.h"
#include "gradient.h"
#include "product.h"
#include "residual_norm.h"

namespace dsbert {

// dx = dy times gelu'(x), element by element.
template <class T>
void gelu_gradient(const void* dy, const void* x, void* dx, int64_t count, int threads) {
  typedef typename T::Raw Raw;
  const Raw *dy_ = static_cast<const Raw*>(dy), *x_ = static_cast<const Raw*>(x);
  Raw* dx_ = static_cast<Raw*>(dx);
  const int64_t whole = count / LANES * LANES;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < whole; i += LANES) T::set(dx_ + i, T::get(dy_ + i) * gelu_derivative(T::get(x_ + i)));
  if (whole < count) {
    Raw a[LANES] = {}, b[LANES] = {}, c[LANES];
    std::copy(dy_ + whole, dy_ + count, a);
    std::copy(x_ + whole, x_ + count, b);
    T::set(c, T::get(a) * gelu_derivative(T::get(b)));
    std::copy(c, c + (count - whole), dx_ + whole);
  }
}

}  // namespace dsbert

#if defined(__AVX512BF16__) || defined(DSBERT_PAIRS)
typedef dsbert::PairDot BF16Dot;
#else
typedef dsbert::FloatDot BF16Dot;
#endif

// dtype: 0 fp32, 1 bf16, 2 fp16. Strides count elements. Everything has been checked by the caller.
#pragma GCC visibility push(default)
extern "C" {

void dsbert_product(int dtype, const void* x, int64_t ldx, const void* blocks, const void* bias, void* y,
                    void* activated, const int32_t* ptr, const int32_t* slots, const int32_t* groups, int64_t tokens,
                    int64_t out_groups, int64_t in_groups, int B, int transpose, int threads) {
  using namespace dsbert;
  const Product p{x,      ldx,        blocks,    bias, y,              activated, ptr, slots, groups,
                  tokens, out_groups, in_groups, B,    transpose != 0, threads};
  const bool small = B % PANEL != 0;
  if (dtype == 0) small ? small_product<F32>(p) : product<F32, FloatDot>(p);
  if (dtype == 1) small ? small_product<BF16>(p) : product<BF16, BF16Dot>(p);
  if (dtype == 2) small ? small_product<F16>(p) : product<F16, FloatDot>(p);
}

void dsbert_gradient(int dtype, const void* dy, int64_t lddy, const void* x, int64_t ldx, void* dw, const int32_t* rows,
                     const int32_t* cols, const int32_t* slots, int64_t active, int64_t tokens, int64_t out_groups,
                     int64_t in_groups, int B, int threads) {
  using namespace dsbert;
  const Gradient g{dy, lddy, x, ldx, dw, rows, cols, slots, active, tokens, out_groups, in_groups, B, threads};
  const bool small = B % PANEL != 0;
  if (dtype == 0) small ? small_gradient<F32>(g) : gradient<F32, FloatDot>(g);
  if (dtype == 1) small ? small_gradient<BF16>(g) : gradient<BF16, BF16Dot>(g);
  if (dtype == 2) small ? small_gradient<F16>(g) : gradient<F16, FloatDot>(g);
}

void dsbert_gelu_gradient(int dtype, const void* dy, const void* x, void* dx, int64_t count, int threads) {
  using namespace dsbert;
  if (dtype == 0) gelu_gradient<F32>(dy, x, dx, count, threads);
  if (dtype == 1) gelu_gradient<BF16>(dy, x, dx, count, threads);
  if (dtype == 2) gelu_gradient<F16>(dy, x, dx, count, threads);
}

void dsbert_dropout(int dtype, const void* x, void* y, int64_t count, uint64_t seed, double p, int threads) {
  using namespace dsbert;
  const Dropout d{x, y, count, seed, p, threads};
  if (dtype == 0) dropout<F32>(d);
  if (dtype == 1) dropout<BF16>(d);
  if (dtype == 2) dropout<F16>(d);
}

void dsbert_attention(const dsbert::Attention* a) {
  using namespace dsbert;
  if (a->dtype == 0) attention_forward<F32, FloatDot>(*a);
  if (a->dtype == 1) attention_forward<BF16, BF16Dot>(*a);
  if (a->dtype == 2) attention_forward<F16, FloatDot>(*a);
}

void dsbert_attention_gradient(const dsbert::Attention* a) {
  using namespace dsbert;
  if (a->dtype == 0) attention_backward<F32, FloatDot>(*a);
  if (a->dtype == 1) attention_backward<BF16, BF16Dot>(*a);
  if (a->dtype == 2) attention_backward<F16, FloatDot>(*a);
}

void dsbert_norm(int dtype, const void* x, const void* residual, const void* gamma, const void* beta, void* sum, void* y,
                 float* mean, float* scale, int64_t rows, int64_t width, double eps, uint64_t seed, double p, int after,
                 int threads) {
  using namespace dsbert;
  const Norm n{x, residual, gamma, beta, sum, y, mean, scale, rows, width, eps, seed, p, after != 0, threads};
  if (dtype == 0) norm<F32>(n);
  if (dtype == 1) norm<BF16>(n);
  if (dtype == 2) norm<F16>(n);
}

void dsbert_norm_gradient(int dtype, const void* dy, const void* sum, const void* gamma, const float* mean,
                          const float* scale, void* dx, void* dresidual, void* dgamma, void* dbeta, int64_t rows,
                          int64_t width, uint64_t seed, double p, int after, int threads) {
  using namespace dsbert;
  const NormGradient n{dy, sum, gamma, mean, scale, dx, dresidual, dgamma, dbeta, rows, width, seed, p, after != 0, threads};
  if (dtype == 0) norm_gradient<F32>(n);
  if (dtype == 1) norm_gradient<BF16>(n);
  if (dtype == 2) norm_gradient<F16>(n);
}

void dsbert_cross_entropy(float* logits, const int64_t* labels, float* losses, int64_t rows, int64_t classes,
                          int gradient, int threads) {
  dsbert::cross_entropy({logits, labels, losses, rows, classes, gradient != 0, threads});
}

}  // extern "C"
#pragma GCC visibility pop
