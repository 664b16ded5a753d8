// Vectors of the widest kind that the compiler's flags allow, and element types.
//
// One source serves every instruction set: it is compiled once for each, with other flags (see build.py).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

// A test may ask for wider vectors than the machine has: the compiler then splits them.
#if defined(DSBERT_LANES)
#elif defined(__AVX512F__)
#define DSBERT_LANES 16
#elif defined(__AVX2__)
#define DSBERT_LANES 8
#else
#define DSBERT_LANES 4
#endif

namespace dsbert {

constexpr int LANES = DSBERT_LANES;

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t IVec __attribute__((vector_size(LANES * 4)));
typedef uint32_t UVec __attribute__((vector_size(LANES * 4)));
typedef uint16_t HVec __attribute__((vector_size(LANES * 2)));
typedef uint16_t U16;

template <class V>
inline V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
inline void put(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

inline Vec splat(float value) { return value - Vec{}; }

// a where it is larger, else b: also where one is NaN. One instruction; of a comparison the compiler makes two.
inline Vec larger(Vec a, Vec b) {
#if defined(__AVX512F__) && DSBERT_LANES == 16
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__F16C__) && DSBERT_LANES == 8
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// sum += a * b. The instruction is spelled out: given the choice, the compiler has it overwrite a factor, and then copies
// registers, or runs out of them, in the innermost loops.
inline void add_product(Vec& sum, const float& a, Vec b) {
#if defined(__AVX512F__) && DSBERT_LANES == 16
  asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(b), "m"(a));
#elif defined(__FMA__) && DSBERT_LANES == 8
  const Vec every = splat(a);
  asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(every), "x"(b));
#else
  sum += a * b;
#endif
}

template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Element types: how a run of LANES elements becomes floats, and back (to nearest even, as torch does).

struct F32 {
  typedef float Raw;
  static Vec get(const Raw* p) { return load<Vec>(p); }
  static void set(Raw* p, Vec v) { put(p, v); }
};

struct BF16 {
  typedef U16 Raw;
  static Vec get(const Raw* p) { return bits<Vec>(__builtin_convertvector(load<HVec>(p), UVec) << 16); }
  static void set(Raw* p, Vec v) {
    UVec u = bits<UVec>(v);
    UVec rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    IVec is_nan = v != v;  // rounding could carry a NaN over into infinity
    UVec nan = (u >> 16) | 0x40u;
    put(p, __builtin_convertvector((rounded & ~bits<UVec>(is_nan)) | (nan & bits<UVec>(is_nan)), HVec));
  }
};

struct F16 {
  typedef U16 Raw;
#if defined(__AVX512F__) && DSBERT_LANES == 16
  static Vec get(const Raw* p) { return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  static void set(Raw* p, Vec v) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT)); }
#elif defined(__F16C__) && DSBERT_LANES == 8
  static Vec get(const Raw* p) { return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  static void set(Raw* p, Vec v) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT)); }
#else
  // By arithmetic on the bits: not every machine without AVX2 has an instruction for it.
  static float one(U16 h) {
    uint32_t sign = uint32_t(h & 0x8000u) << 16, rest = h & 0x7fffu;
    if (rest >= 0x7c00u) return bits<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    float magnitude = bits<float>(rest << 13) * bits<float>(0x77800000u);  // 2^112: also right for subnormals
    return bits<float>(sign | bits<uint32_t>(magnitude));
  }
  static U16 one(float f) {
    uint32_t u = bits<uint32_t>(f), sign = u >> 16 & 0x8000u, rest = u & 0x7fffffffu;
    if (rest > 0x7f800000u) return U16(sign | 0x7e00u);
    if (rest >= 0x477ff000u) return U16(sign | 0x7c00u);
    if (rest < 0x38800000u) {  // subnormal: the addition rounds to a multiple of 2^-24
      float shifted = bits<float>(rest) + 0.5f;
      return U16(sign | (bits<uint32_t>(shifted) - 0x3f000000u));
    }
    return U16(sign | ((rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13));
  }
  static Vec get(const Raw* p) {
    Vec v;
    for (int i = 0; i < LANES; ++i) v[i] = one(p[i]);
    return v;
  }
  static void set(Raw* p, Vec v) {
    for (int i = 0; i < LANES; ++i) p[i] = one(v[i]);
  }
#endif
};

// A single element, by way of a vector: the conversions exist once.
template <class T>
inline float get_one(const typename T::Raw* p) {
  typename T::Raw raw[LANES] = {*p};
  return T::get(raw)[0];
}

template <class T>
inline void set_one(typename T::Raw* p, float value) {
  typename T::Raw raw[LANES];
  T::set(raw, splat(value));
  *p = raw[0];
}

}  // namespace dsbert
