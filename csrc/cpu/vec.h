// SPDX-License-Identifier: Apache-2.0
// Vectors of floats, with one width per instruction set. Arithmetic uses the compilers' vector extensions; intrinsics
// are used where compilers miss the instruction. Each instruction set has one source file that defines PEFTKERN_ISA
// (the namespace) and PEFTKERN_LANES and includes this file.
#ifndef PEFTKERN_CPU_VEC_H_
#define PEFTKERN_CPU_VEC_H_

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../peftkern.h"

#if defined(__AVX512BF16__)
#define PEFTKERN_HAS_PAIRS 1  // an instruction that multiplies pairs of bf16
#else
#define PEFTKERN_HAS_PAIRS 0
#endif
#if defined(__AMX_TILE__) && defined(__AMX_BF16__)
#define PEFTKERN_HAS_AMX 1  // products of pairs on tiles: see amx.h
#else
#define PEFTKERN_HAS_AMX 0
#endif

#define PEFTKERN_INLINE_MEMBER inline __attribute__((always_inline))
#define PEFTKERN_INLINE static PEFTKERN_INLINE_MEMBER

namespace peftkern {
namespace PEFTKERN_ISA {

constexpr int kLanes = PEFTKERN_LANES;
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

// ln x for normal x > 0, relative error 1e-7 (the polynomial is Cephes' logf); -inf for 0, NaN stays NaN.
PEFTKERN_INLINE vf log(vf x) {
  const vu offset = (vu)x - 0x3f3504f3u;  // of the mantissa's range [sqrt 1/2, sqrt 2); unsigned: any bits may come
  const vf exponent = __builtin_convertvector((vi)offset >> 23, vf);
  const vf f = (vf)((offset & 0x7fffffu) + 0x3f3504f3u) - 1.0f;
  vf p = f * 7.0376836292e-2f + -1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f + -1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f + -1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f + -2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const vf square = f * f;
  const vf y = exponent * 0.693147180f + (f + (p * f * square - square * 0.5f));
  return select(x == 0.0f, set1(-kInf), select((x < kInf), y, x));
}

struct Tanh {
  vf value, slope;
};

// tanh x and its derivative, relative errors of 2e-7 and 5e-7 while they are normal numbers; NaN stays NaN. With e =
// e^y, y = -2|x|, they are (1 - e) / (1 + e) = 1 - 2 e / (1 + e) and e (1 + |tanh x|)^2: nothing cancels, near 0 or
// where tanh rounds to 1. y = n ln 2 + r as in exp2; e^r - 1 = r + r^2 q(r) with a minimax polynomial q.
PEFTKERN_INLINE Tanh tanh(vf x) {
  const float kMagic = 12582912.0f + 127.0f;
  const vi sign = bits(x) & seti(INT32_MIN);
  const vf y = max(set1(-87.0f), (vf)(bits(x) | seti(INT32_MIN)) * 2.0f);
  const vf shifted = y * (float)kLog2e + kMagic;
  const vf r = y - (shifted - kMagic) * (float)kLn2;
  vf q = r * 1.388251022e-03f + 8.366580331e-03f;
  q = q * r + 4.166720178e-02f;
  q = q * r + 1.666654318e-01f;
  q = q * r + 4.999999814e-01f;
  const vf p = r * r * q + r;
  const vf power = (vf)(bits(shifted) << 23);
  const vf m = p * power + (power - 1.0f), e = p * power + power;
  const vi small = y > -1.0f;
  const vf ratio = select(small, m, e) / (m + 2.0f);
  const vf magnitude = select(small, -ratio, 1.0f - 2.0f * ratio);
  const vf twice = 1.0f + magnitude;
  return {(vf)(bits(magnitude) ^ sign), e * (twice * twice)};
}

PEFTKERN_INLINE vf from_bf16(vh x) { return (vf)(__builtin_convertvector(x, vu) << 16); }
PEFTKERN_INLINE vh to_bf16(vf x) {
#if PEFTKERN_HAS_PAIRS
  return (vh)_mm512_cvtneps_pbh((__m512)x);
#endif
  vu u = (vu)x;
  vu rounded = (u + (((u >> 16) & 1) + 0x7fff)) >> 16;
  vi is_nan = x != x;
  return __builtin_convertvector((vu)(is_nan ? (vi)((u >> 16) | 0x40) : (vi)rounded), vh);
}

#if PEFTKERN_HAS_PAIRS
// Both vectors rounded to bf16, the first in the low half.
PEFTKERN_INLINE vu bf16_both(vf first, vf second) { return (vu)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first); }

// Words of (low, high), both rounded to bf16.
PEFTKERN_INLINE vu bf16_pairs(vf low, vf high) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (vu)_mm512_permutexvar_epi16(order, (__m512i)bf16_both(low, high));
}
#endif

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
#else
  vh y;
  for (int i = 0; i < kLanes; i++) y[i] = float_to_half(x[i]);
  return y;
#endif
}

// Not std::min and std::max: a linker may keep the copy of a template that was compiled for another instruction set.
PEFTKERN_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
PEFTKERN_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
PEFTKERN_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

PEFTKERN_INLINE const char* offset(const void* data, int64_t dtype, int64_t elements) {
  return static_cast<const char*>(data) + elements * (dtype == PEFTKERN_FLOAT32 ? 4 : 2);
}

PEFTKERN_INLINE float load_scalar(const void* data, int64_t dtype, int64_t i) {
  if (dtype == PEFTKERN_FLOAT32) return static_cast<const float*>(data)[i];
  uint16_t x = static_cast<const uint16_t*>(data)[i];
  if (dtype == PEFTKERN_FLOAT16) return half_to_float(x);
  uint32_t u = (uint32_t)x << 16;
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}

// `lanes` values of any dtype (the rest of the vector is 0).
template <int64_t kDtype>
PEFTKERN_INLINE vf load_lanes(const void* data, int64_t lanes) {
  if (kDtype == PEFTKERN_FLOAT32) {
    if (lanes >= kLanes) return load(static_cast<const float*>(data));
    vf x = zero();
    __builtin_memcpy(&x, data, 4 * lanes);
    return x;
  }
  vh x = vh{};
  if (lanes >= kLanes)
    __builtin_memcpy(&x, data, sizeof x);
  else
    __builtin_memcpy(&x, data, 2 * lanes);
  return kDtype == PEFTKERN_FLOAT16 ? from_half(x) : from_bf16(x);
}

template <int64_t kDtype>
PEFTKERN_INLINE void store_lanes(void* data, vf x, int64_t lanes) {
  if (kDtype == PEFTKERN_FLOAT32) {
    __builtin_memcpy(data, &x, 4 * min(lanes, kLanes));
    return;
  }
  vh y = kDtype == PEFTKERN_FLOAT16 ? to_half(x) : to_bf16(x);
  __builtin_memcpy(data, &y, 2 * min(lanes, kLanes));
}

template <int64_t kDtype>
static void widen_row_as(const void* src, int64_t n, float* dst) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(dst + i, load_lanes<kDtype>(offset(src, kDtype, i), kLanes));
  if (i < n) store(dst + i, load_lanes<kDtype>(offset(src, kDtype, i), n - i));
}

// Writes n values as floats, padded with zeros to whole vectors.
PEFTKERN_INLINE void widen_row(const void* src, int64_t dtype, int64_t n, float* dst) {
  if (dtype == PEFTKERN_FLOAT32) return widen_row_as<PEFTKERN_FLOAT32>(src, n, dst);
  if (dtype == PEFTKERN_FLOAT16) return widen_row_as<PEFTKERN_FLOAT16>(src, n, dst);
  widen_row_as<PEFTKERN_BFLOAT16>(src, n, dst);
}

template <int64_t kDtype>
static void narrow_row_as(const float* src, float factor, int64_t n, void* dst) {
  int64_t i = 0;
  char* out = static_cast<char*>(dst);
  const int64_t size = kDtype == PEFTKERN_FLOAT32 ? 4 : 2;
  for (; i + kLanes <= n; i += kLanes) store_lanes<kDtype>(out + i * size, load(src + i) * factor, kLanes);
  if (i < n) store_lanes<kDtype>(out + i * size, load(src + i) * factor, n - i);
}

// Writes factor * src, rounded to dtype. src is padded to whole vectors.
PEFTKERN_INLINE void narrow_row(const float* src, float factor, int64_t n, int64_t dtype, void* dst) {
  if (dtype == PEFTKERN_FLOAT32) return narrow_row_as<PEFTKERN_FLOAT32>(src, factor, n, dst);
  if (dtype == PEFTKERN_FLOAT16) return narrow_row_as<PEFTKERN_FLOAT16>(src, factor, n, dst);
  narrow_row_as<PEFTKERN_BFLOAT16>(src, factor, n, dst);
}

// Rounds floats to dtype, in place.
PEFTKERN_INLINE void round_row(float* row, int64_t n, int64_t dtype) {
  if (dtype == PEFTKERN_FLOAT32) return;
  for (int64_t i = 0; i < n; i += kLanes) {
    vf x = load(row + i);
    store(row + i, dtype == PEFTKERN_FLOAT16 ? from_half(to_half(x)) : from_bf16(to_bf16(x)));
  }
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif  // PEFTKERN_CPU_VEC_H_
