// SPDX-License-Identifier: Apache-2.0
// Floating point arithmetic, comparisons and conversions (PTX ISA 9.7.3 to 9.7.5, 9.7.9). Operations that a GPU
// approximates (ex2, lg2, rcp, div.full) are computed to the nearest: the approximation's error is not modelled.
#pragma once
#include <cmath>

#include "machine.h"

namespace ptx {

inline float widen(BFloat x) { return from_slot<float>(u64(x.bits) << 16); }
inline float widen(Half x) {
  _Float16 h;
  memcpy(&h, &x.bits, 2);
  return float(h);
}
inline float widen(float x) { return x; }

template <class T>
T narrow(float x);
template <>
inline float narrow<float>(float x) {
  return x;
}
template <>
inline BFloat narrow<BFloat>(float x) {  // to nearest, ties to even
  const u32 bits = u32(to_slot(x));
  if (std::isnan(x))
    return {0x7fff};
  return {u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline Half narrow<Half>(float x) {
  if (std::isnan(x))
    return {0x7fff};
  const _Float16 h = _Float16(x);
  Half result;
  memcpy(&result.bits, &h, 2);
  return result;
}
inline float toward_zero_bf16(float x) { return std::isnan(x) ? x : from_slot<float>(to_slot(x) & 0xffff0000u); }

// tf32 keeps 10 bits of the mantissa; rna rounds ties away from zero.
inline u32 to_tf32(float x) {
  const u32 bits = u32(to_slot(x));
  return std::isfinite(x) ? (bits + 0x1000u) & ~0x1fffu : bits;
}

inline float flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.f, x) : x; }

// min and max return the number where one operand is NaN; .NaN variants return NaN. -0 is less than +0.
inline float minimum(float a, float b) {
  if (std::isnan(a) || std::isnan(b))
    return std::isnan(a) ? b : a;
  return a == b ? (std::signbit(a) ? a : b) : std::min(a, b);
}
inline float maximum(float a, float b) {
  if (std::isnan(a) || std::isnan(b))
    return std::isnan(a) ? b : a;
  return a == b ? (std::signbit(a) ? b : a) : std::max(a, b);
}

template <class T>
T to_integer(float x, float (*round)(float)) {  // saturates; NaN gives 0
  if (std::isnan(x))
    return 0;
  const double y = round(x);
  if (y <= double(std::numeric_limits<T>::min()))
    return std::numeric_limits<T>::min();
  if (y >= double(std::numeric_limits<T>::max()))
    return std::numeric_limits<T>::max();
  return T(y);
}

// Operations on two halves of a 32-bit register.
template <class T, class F>
inline u32 pairwise(u32 a, u32 b, F f) {
  const T low = narrow<T>(f(widen(T{u16(a)}), widen(T{u16(b)})));
  const T high = narrow<T>(f(widen(T{u16(a >> 16)}), widen(T{u16(b >> 16)})));
  return low.bits | u32(high.bits) << 16;
}
template <class T>
inline T fused(T a, T b, T c) {  // a product of halves is exact in double, and so, but for its last bit, is the sum
  return narrow<T>(float(double(widen(a)) * widen(b) + widen(c)));
}
template <class T>
inline u32 fused_pair(u32 a, u32 b, u32 c) {
  const T low = fused(T{u16(a)}, T{u16(b)}, T{u16(c)}), high = fused(T{u16(a >> 16)}, T{u16(b >> 16)}, T{u16(c >> 16)});
  return low.bits | u32(high.bits) << 16;
}

// clang-format off
#define WITH_FLUSH1(name, expression) \
  {name ".f32", lanewise<[](float a) { return float(expression); }>}, \
  {name ".ftz.f32", lanewise<[](float x) { float a = flush(x); return flush(expression); }>}
#define WITH_FLUSH2(name, expression) \
  {name ".f32", lanewise<[](float a, float b) { return float(expression); }>}, \
  {name ".ftz.f32", lanewise<[](float x, float y) { float a = flush(x), b = flush(y); return flush(expression); }>}
#define HALVES2(name, expression) \
  {name ".f16", lanewise<[](Half x, Half y) { float a = widen(x), b = widen(y); return narrow<Half>(expression); }>}, \
  {name ".bf16", lanewise<[](BFloat x, BFloat y) { float a = widen(x), b = widen(y); return narrow<BFloat>(expression); }>}, \
  {name ".f16x2", lanewise<[](u32 x, u32 y) { return pairwise<Half>(x, y, [](float a, float b) { return float(expression); }); }>}, \
  {name ".bf16x2", lanewise<[](u32 x, u32 y) { return pairwise<BFloat>(x, y, [](float a, float b) { return float(expression); }); }>}
// ordered comparisons are false, unordered ones (…u) true where an operand is NaN
#define COMPARISON(name, op, type, widened) \
  {"setp." name "." type, lanewise<[](widened a, widened b) { return (widen(a) op widen(b)); }>}, \
  {"setp." name "u." type, lanewise<[](widened a, widened b) { return (std::isnan(widen(a)) || std::isnan(widen(b)) || widen(a) op widen(b)); }>}
#define COMPARISONS(type, widened) \
  COMPARISON("eq", ==, type, widened), COMPARISON("lt", <, type, widened), COMPARISON("le", <=, type, widened), \
  COMPARISON("gt", >, type, widened), COMPARISON("ge", >=, type, widened), \
  {"setp.ne." type, lanewise<[](widened a, widened b) { return !std::isnan(widen(a)) && !std::isnan(widen(b)) && widen(a) != widen(b); }>}, \
  {"setp.neu." type, lanewise<[](widened a, widened b) { return widen(a) != widen(b); }>}, \
  {"setp.num." type, lanewise<[](widened a, widened b) { return !std::isnan(widen(a)) && !std::isnan(widen(b)); }>}, \
  {"setp.nan." type, lanewise<[](widened a, widened b) { return std::isnan(widen(a)) || std::isnan(widen(b)); }>}

inline const Definition kFloats[] = {
  WITH_FLUSH2("add", a + b), WITH_FLUSH2("sub", a - b), WITH_FLUSH2("mul", a * b), WITH_FLUSH2("div", a / b),
  WITH_FLUSH2("min", minimum(a, b)), WITH_FLUSH2("max", maximum(a, b)),
  WITH_FLUSH2("min.NaN", std::isnan(a) || std::isnan(b) ? NAN : minimum(a, b)),
  WITH_FLUSH2("max.NaN", std::isnan(a) || std::isnan(b) ? NAN : maximum(a, b)),
  {"fma.f32", lanewise<[](float a, float b, float c) { return std::fmaf(a, b, c); }>},
  {"fma.ftz.f32", lanewise<[](float a, float b, float c) { return flush(std::fmaf(flush(a), flush(b), flush(c))); }>},
  {"neg.f32", lanewise<[](u32 a) { return a ^ 0x80000000u; }>},
  {"abs.f32", lanewise<[](u32 a) { return a & 0x7fffffffu; }>},
  WITH_FLUSH1("ex2", std::exp2(a)), WITH_FLUSH1("lg2", std::log2(a)), WITH_FLUSH1("rcp", 1.f / a),
  WITH_FLUSH1("sqrt", std::sqrt(a)), WITH_FLUSH1("rsqrt", 1.f / std::sqrt(a)), WITH_FLUSH1("tanh", std::tanh(a)),
  HALVES2("add", a + b), HALVES2("sub", a - b), HALVES2("mul", a * b), HALVES2("min", minimum(a, b)),
  HALVES2("max", maximum(a, b)),
  {"fma.f16", lanewise<[](Half a, Half b, Half c) { return fused(a, b, c); }>},
  {"fma.bf16", lanewise<[](BFloat a, BFloat b, BFloat c) { return fused(a, b, c); }>},
  {"fma.f16x2", lanewise<[](u32 a, u32 b, u32 c) { return fused_pair<Half>(a, b, c); }>},
  {"fma.bf16x2", lanewise<[](u32 a, u32 b, u32 c) { return fused_pair<BFloat>(a, b, c); }>},
  {"neg.f16 neg.bf16", lanewise<[](u16 a) { return u16(a ^ 0x8000u); }>},
  {"neg.f16x2 neg.bf16x2", lanewise<[](u32 a) { return a ^ 0x80008000u; }>},
  {"abs.f16 abs.bf16", lanewise<[](u16 a) { return u16(a & 0x7fffu); }>},
  COMPARISONS("f32", float), COMPARISONS("f16", Half), COMPARISONS("bf16", BFloat),

  {"cvt.rn.bf16.f32", lanewise<[](float a) { return narrow<BFloat>(a); }>},
  {"cvt.rz.bf16.f32", lanewise<[](float a) { return narrow<BFloat>(toward_zero_bf16(a)); }>},
  {"cvt.rn.f16.f32", lanewise<[](float a) { return narrow<Half>(a); }>},
  // of a pair the first source is the upper half
  {"cvt.rn.bf16x2.f32", lanewise<[](float a, float b) { return u32(narrow<BFloat>(a).bits) << 16 | narrow<BFloat>(b).bits; }>},
  {"cvt.rn.f16x2.f32", lanewise<[](float a, float b) { return u32(narrow<Half>(a).bits) << 16 | narrow<Half>(b).bits; }>},
  {"cvt.rna.tf32.f32", lanewise<[](float a) { return to_tf32(a); }>},
  {"cvt.f32.bf16", lanewise<[](BFloat a) { return widen(a); }>},
  {"cvt.f32.f16", lanewise<[](Half a) { return widen(a); }>},
  {"cvt.rn.f32.s32", lanewise<[](s32 a) { return float(a); }>},
  {"cvt.rn.f32.u32", lanewise<[](u32 a) { return float(a); }>},
  {"cvt.rn.f32.s64", lanewise<[](s64 a) { return float(a); }>},
  {"cvt.rn.f32.u64", lanewise<[](u64 a) { return float(a); }>},
  {"cvt.rn.f32.s16", lanewise<[](s16 a) { return float(a); }>},
  {"cvt.rn.f32.u16", lanewise<[](u16 a) { return float(a); }>},
  {"cvt.rn.f32.s8", lanewise<[](s8 a) { return float(a); }>},
  {"cvt.rn.f32.u8", lanewise<[](u8 a) { return float(a); }>},
  {"cvt.rzi.s32.f32", lanewise<[](float a) { return to_integer<s32>(a, std::trunc); }>},
  {"cvt.rzi.u32.f32", lanewise<[](float a) { return to_integer<u32>(a, std::trunc); }>},
  {"cvt.rzi.s64.f32", lanewise<[](float a) { return to_integer<s64>(a, std::trunc); }>},
  {"cvt.rmi.f32.f32", lanewise<[](float a) { return std::floor(a); }>},
  {"cvt.rpi.f32.f32", lanewise<[](float a) { return std::ceil(a); }>},
  {"cvt.rzi.f32.f32", lanewise<[](float a) { return std::trunc(a); }>},
  {"cvt.rni.f32.f32", lanewise<[](float a) { return std::nearbyint(a); }>},
};
#undef WITH_FLUSH1
#undef WITH_FLUSH2
#undef HALVES2
#undef COMPARISON
#undef COMPARISONS
// clang-format on

}  // namespace ptx
