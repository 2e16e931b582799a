// SPDX-License-Identifier: Apache-2.0
// Vectors of floats, with one width per instruction set. Arithmetic uses the compilers' vector extensions; intrinsics
// are used where compilers miss the instruction, and only in this file. Each instruction set has one source file in
// isa/, which defines PEFTKERN_ISA (the namespace) and PEFTKERN_LANES.
#ifndef PEFTKERN_CPU_VEC_H_
#define PEFTKERN_CPU_VEC_H_

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../peftkern.h"

#define PEFTKERN_INLINE_MEMBER inline __attribute__((always_inline))
#define PEFTKERN_INLINE static PEFTKERN_INLINE_MEMBER

namespace peftkern {
namespace PEFTKERN_ISA {

constexpr int kLanes = PEFTKERN_LANES;
#if PEFTKERN_LANES == 16 || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
constexpr float kInf = __builtin_inff();
constexpr double kLog2e = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

typedef float vf __attribute__((vector_size(4 * kLanes)));
typedef int32_t vi __attribute__((vector_size(4 * kLanes)));
typedef uint32_t vu __attribute__((vector_size(4 * kLanes)));
typedef uint16_t vh __attribute__((vector_size(2 * kLanes)));

template <typename V, typename T>
PEFTKERN_INLINE V load_as(const T* p) {
  V x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
PEFTKERN_INLINE vf load(const float* p) { return load_as<vf>(p); }
PEFTKERN_INLINE void store(float* p, vf x) { __builtin_memcpy(p, &x, sizeof x); }
PEFTKERN_INLINE vf set1(float x) { return x - vf{}; }
PEFTKERN_INLINE vi seti(int32_t x) { return x - vi{}; }
PEFTKERN_INLINE vi bits(vf x) { return (vi)x; }
PEFTKERN_INLINE vf select(vi mask, vf a, vf b) { return mask ? a : b; }
PEFTKERN_INLINE vf zero() { return vf{}; }

// The maximum of each lane; b where either is NaN.
PEFTKERN_INLINE vf max(vf a, vf b) {
#if PEFTKERN_LANES == 16 && defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif PEFTKERN_LANES == 8 && defined(__AVX__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif PEFTKERN_LANES == 4 && defined(__SSE__)
  return (vf)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}

PEFTKERN_INLINE bool any_greater(vf a, vf b) {
#if PEFTKERN_LANES == 16 && defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
#elif PEFTKERN_LANES == 8 && defined(__AVX__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)) != 0;
#else
  vi greater = a > b;
  int32_t any = 0;
  for (int i = 0; i < kLanes; i++) any |= greater[i];
  return any != 0;
#endif
}

#if defined(__GNUC__) && !defined(__clang__)
// Swaps the bit `kWidth` of the row index with that of the lane index.
template <int kWidth>
PEFTKERN_INLINE void transpose_bit(vf* rows) {
  vi first, second;
#pragma GCC unroll 16
  for (int lane = 0; lane < kLanes; lane++) {
    first[lane] = lane & kWidth ? kLanes + lane - kWidth : lane;
    second[lane] = lane & kWidth ? kLanes + lane : lane + kWidth;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i++) {
    if (i & kWidth) continue;
    const vf a = rows[i], b = rows[i | kWidth];
    rows[i] = __builtin_shuffle(a, b, first);
    rows[i | kWidth] = __builtin_shuffle(a, b, second);
  }
}
#endif

// Transposes the square matrix rows[0..kLanes).
PEFTKERN_INLINE void transpose(vf* rows) {
#if defined(__GNUC__) && !defined(__clang__)
  transpose_bit<1>(rows);
  transpose_bit<2>(rows);
  if (kLanes > 4) transpose_bit<(kLanes > 4 ? 4 : 1)>(rows);
  if (kLanes > 8) transpose_bit<(kLanes > 8 ? 8 : 1)>(rows);
#else
  for (int i = 0; i < kLanes; i++)
    for (int j = 0; j < i; j++) {
      const float swapped = rows[i][j];
      rows[i][j] = rows[j][i];
      rows[j][i] = swapped;
    }
#endif
}

// The sum of the lanes, by repeated halving.
PEFTKERN_INLINE float reduce_add(vf x) {
  float lane[kLanes];
  store(lane, x);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; i++) lane[i] += lane[i + width];
  return lane[0];
}

// 2^f by a minimax polynomial that is exactly 1 at 0: for 0 <= f <= 1 where exp2 subtracts the floor, else for |f| <=
// 1/2.
PEFTKERN_INLINE vf exp2_of_fraction(vf f) {
#if PEFTKERN_LANES == 16 && defined(__AVX512DQ__)
  constexpr float c[] = {1.867130228e-03f, 9.017029988e-03f, 5.579991334e-02f, 2.401644501e-01f, 6.931513118e-01f};
#else
  constexpr float c[] = {1.326472708e-03f, 9.671512862e-03f, 5.550733746e-02f, 2.402224208e-01f, 6.931469776e-01f};
#endif
  vf p = f * c[0] + c[1];
  p = p * f + c[2];
  p = p * f + c[3];
  p = p * f + c[4];
  return p * f + 1.0f;
}

// 2^x for x <= 127, relative error 2e-7; 0 below 2^-150, or below 2^-126 where it rounds by adding 1.5 2^23 + 127,
// whose low bits then hold the biased exponent; NaN stays NaN.
PEFTKERN_INLINE vf exp2(vf x) {
#if PEFTKERN_LANES == 16 && defined(__AVX512DQ__)
  const vf fraction = (vf)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - floor x
  return (vf)_mm512_scalef_ps((__m512)exp2_of_fraction(fraction), (__m512)x);
#else
  const float kMagic = 12582912.0f + 127.0f;
  x = max(set1(-127.0f), x);
  vf shifted = x + kMagic;
  vf f = x - (shifted - kMagic);
  return exp2_of_fraction(f) * (vf)(bits(shifted) << 23);
#endif
}

// Not std::min and std::max: a linker may keep the copy of a template that was compiled for another instruction set.
PEFTKERN_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
PEFTKERN_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
PEFTKERN_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

PEFTKERN_INLINE vf from_bf16(vh x) { return (vf)(__builtin_convertvector(x, vu) << 16); }
PEFTKERN_INLINE vh to_bf16(vf x) {
#if defined(__AVX512BF16__)
  return (vh)_mm512_cvtneps_pbh((__m512)x);
#else
  vu u = (vu)x;
  vu rounded = (u + (((u >> 16) & 1) + 0x7fff)) >> 16;
  vi is_nan = x != x;
  return __builtin_convertvector((vu)(is_nan ? (vi)((u >> 16) | 0x40) : (vi)rounded), vh);
#endif
}

// The first `count` words at p, zeros behind them.
PEFTKERN_INLINE vf load_first(const float* p, int64_t count) {
#if PEFTKERN_LANES == 16 && defined(__AVX512F__)
  return (vf)_mm512_maskz_loadu_ps(count >= kLanes ? 0xffff : (1u << count) - 1, p);
#else
  vf x = vf{};
  __builtin_memcpy(&x, p, 4 * (size_t)(count < kLanes ? count : kLanes));
  return x;
#endif
}

PEFTKERN_INLINE vh load_first(const uint16_t* p, int64_t count) {
#if PEFTKERN_LANES == 16 && defined(__AVX512BW__)
  return (vh)_mm256_maskz_loadu_epi16(count >= kLanes ? 0xffff : (1u << count) - 1, p);
#else
  vh x = vh{};
  __builtin_memcpy(&x, p, 2 * (size_t)(count < kLanes ? count : kLanes));
  return x;
#endif
}

// A pair is a word of two bf16 numbers, the first in the low half.

// c + a.first b.first + a.second b.second
PEFTKERN_INLINE vf multiply_add(uint32_t a, vu b, vf c) {
#if defined(__AVX512BF16__)
  return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  return (vf)vbfdotq_f32((float32x4_t)c, (bfloat16x8_t)vdupq_n_u32(a), (bfloat16x8_t)b);
#else
  const vf first = (vf)(vu{} + (a << 16)), second = (vf)(vu{} + (a & 0xffff0000u));
  c += first * (vf)(b << 16);
  return c + second * (vf)(b & 0xffff0000u);
#endif
}
PEFTKERN_INLINE vf multiply_add(float a, vf b, vf c) { return c + a * b; }

// Both vectors rounded to bf16, one behind the other: words of neighbouring lanes.
PEFTKERN_INLINE vu bf16_both(vf first, vf second) {
#if defined(__AVX512BF16__)
  return (vu)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
#else
  const vh halves[2] = {to_bf16(first), to_bf16(second)};
  return load_as<vu>(halves);
#endif
}

// The same without rounding: the upper halves of the floats.
PEFTKERN_INLINE vu upper_both(vf first, vf second) {
#if PEFTKERN_LANES == 16 && defined(__AVX512BW__)
  const __m512i upper = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25,
                                         23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return (vu)_mm512_permutex2var_epi16((__m512i)first, upper, (__m512i)second);
#else
  const vh halves[2] = {__builtin_convertvector((vu)first >> 16, vh), __builtin_convertvector((vu)second >> 16, vh)};
  return load_as<vu>(halves);
#endif
}

// Words of (low, high), both rounded to bf16.
PEFTKERN_INLINE vu bf16_pairs(vf low, vf high) {
#if defined(__AVX512BF16__)
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (vu)_mm512_permutexvar_epi16(order, (__m512i)bf16_both(low, high));
#else
  return __builtin_convertvector(to_bf16(low), vu) | __builtin_convertvector(to_bf16(high), vu) << 16;
#endif
}

// out[d] = (first[d], second[d]) for bf16 rows, padded with zeros to whole vectors. A null `second` stands for zeros.
PEFTKERN_INLINE void interleave_rows(const uint16_t* first, const uint16_t* second, int64_t n, uint32_t* out) {
#if PEFTKERN_LANES == 16 && defined(__AVX512BW__)
  const __m512i order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i sixteen = _mm512_set1_epi16(16);
  for (int64_t d = 0; d < n; d += 2 * kLanes) {
    const __mmask32 valid = n - d >= 32 ? ~0u : (1u << (n - d)) - 1;
    const __m512i a = _mm512_maskz_loadu_epi16(valid, first + d);
    const __m512i b = second ? _mm512_maskz_loadu_epi16(valid, second + d) : _mm512_setzero_si512();
    _mm512_storeu_si512(out + d, _mm512_permutex2var_epi16(a, order, b));
    if (n - d > kLanes)
      _mm512_storeu_si512(out + d + kLanes, _mm512_permutex2var_epi16(a, _mm512_add_epi16(order, sixteen), b));
  }
#else
  for (int64_t d = 0; d < n; d += kLanes) {
    const size_t bytes = 2 * (size_t)(n - d < kLanes ? n - d : kLanes);
    vh a = vh{}, b = vh{};
    __builtin_memcpy(&a, first + d, bytes);
    if (second) __builtin_memcpy(&b, second + d, bytes);
    const vu pairs = __builtin_convertvector(a, vu) | __builtin_convertvector(b, vu) << 16;
    __builtin_memcpy(out + d, &pairs, sizeof pairs);
  }
#endif
}

PEFTKERN_INLINE float half_to_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = (uint32_t)(h & 0x7fff) << 13;
  float f;
  __builtin_memcpy(&f, &magnitude, 4);
  f *= 5.192296858534828e33f;  // 2^112 moves the exponent's bias; denormals come out right
  __builtin_memcpy(&magnitude, &f, 4);
  if ((h & 0x7c00) == 0x7c00) magnitude |= 0x7f800000;
  magnitude |= sign;
  __builtin_memcpy(&f, &magnitude, 4);
  return f;
}
PEFTKERN_INLINE uint16_t float_to_half(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  uint16_t sign = (u >> 16) & 0x8000;
  u &= 0x7fffffff;
  if (u > 0x7f800000) return sign | 0x7e00;
  if (u >= 0x477ff000) return sign | 0x7c00;  // rounds to 2^16 or more
  if (u < 0x38800000) {                       // below 2^-14: adding 1/2 leaves the rounded denormal in the low bits
    float magnitude;
    __builtin_memcpy(&magnitude, &u, 4);
    magnitude += 0.5f;
    __builtin_memcpy(&u, &magnitude, 4);
    return sign | (uint16_t)(u - 0x3f000000);
  }
  return sign | (uint16_t)((u - 0x38000000 + 0xfff + ((u >> 13) & 1)) >> 13);
}
PEFTKERN_INLINE vf from_half(vh x) {
#if PEFTKERN_LANES == 16 && defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps((__m256i)x);
#elif PEFTKERN_LANES == 8 && defined(__F16C__)
  return (vf)_mm256_cvtph_ps((__m128i)x);
#elif PEFTKERN_LANES == 4 && defined(__aarch64__)
  return (vf)vcvt_f32_f16((float16x4_t)x);
#else
  vf y;
  for (int i = 0; i < kLanes; i++) y[i] = half_to_float(x[i]);
  return y;
#endif
}
PEFTKERN_INLINE vh to_half(vf x) {
#if PEFTKERN_LANES == 16 && defined(__AVX512F__)
  return (vh)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif PEFTKERN_LANES == 8 && defined(__F16C__)
  return (vh)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#elif PEFTKERN_LANES == 4 && defined(__aarch64__)
  return (vh)vcvt_f16_f32((float32x4_t)x);
#else
  vh y;
  for (int i = 0; i < kLanes; i++) y[i] = float_to_half(x[i]);
  return y;
#endif
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif  // PEFTKERN_CPU_VEC_H_
