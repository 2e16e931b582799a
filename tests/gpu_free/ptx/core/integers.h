// SPDX-License-Identifier: Apache-2.0
// Integer arithmetic, bits, comparisons of integers, selection, and moves (PTX ISA 9.7.1, 9.7.6 to 9.7.9).
#pragma once
#include <algorithm>

#include "machine.h"

namespace ptx {

// By zero the ISA leaves the value open: all ones and the dividend, as GPUs give. Compilers move divisions out of loops
// that are never entered.
template <class T>
inline T divide(T a, T b) {
  if (b == 0)
    return T(-1);
  if (std::is_signed_v<T> && b == T(-1))
    return T(0) - a;
  return a / b;
}
template <class T>
inline T remainder(T a, T b) {
  if (b == 0)
    return a;
  if (std::is_signed_v<T> && b == T(-1))
    return 0;
  return a % b;
}
// Shifts by the width or more give zeros, or for signed numbers copies of the sign.
template <class T>
inline T shift_left(T a, u32 n) {
  return n >= 8 * sizeof(T) ? 0 : a << n;
}
template <class T>
inline T shift_right(T a, u32 n) {
  constexpr u32 last = 8 * sizeof(T) - 1;
  if (n > last)
    return std::is_signed_v<T> ? a >> last : 0;
  return a >> n;
}

inline u32 bit_field_insert(u32 a, u32 b, u32 position, u32 length) {
  position &= 255, length &= 255;
  for (u32 i = 0; i < length && position + i < 32; i++)
    b = (b & ~(1u << (position + i))) | (i < 32 ? (a >> i & 1) : 0) << (position + i);
  return b;
}
// Bits beyond the top are those of the sign, zeros for unsigned numbers.
template <class T>
inline T bit_field_extract(T a, u32 position, u32 length) {
  position &= 255, length &= 255;
  const u32 top = std::min(position + length, 8 * u32(sizeof(T))) - 1;
  const bool sign = std::is_signed_v<T> && length && (a >> std::min(top, u32(8 * sizeof(T) - 1)) & 1);
  u64 result = 0;
  for (u32 i = 0; i < 8 * sizeof(T); i++) {
    const bool inside = i < length && position + i < 8 * sizeof(T);
    result |= u64(inside ? a >> (position + i) & 1 : sign) << i;
  }
  return T(result);
}

inline u32 permute_bytes(u32 a, u32 b, u32 selector) {
  const u64 bytes = a | u64(b) << 32;
  u32 result = 0;
  for (int i = 0; i < 4; i++) {
    const u32 nibble = selector >> 4 * i & 15;
    u32 byte = bytes >> 8 * (nibble & 7) & 255;
    if (nibble & 8)  // replicate the sign
      byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * i;
  }
  return result;
}
// lop3: bit abc of the table for bits a, b, c.
inline u32 logic3(u32 a, u32 b, u32 c, u32 table) {
  u32 result = 0;
  for (u32 i = 0; i < 8; i++)
    if (table >> i & 1)
      result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return result;
}
inline u32 funnel_left(u32 low, u32 high, u32 n) { return u32((u64(high) << 32 | low) << n >> 32); }
inline u32 funnel_right(u32 low, u32 high, u32 n) { return u32((u64(high) << 32 | low) >> n); }

inline void pack(Machine&, Warp& w, const Instruction& in, Mask mask, u32 bits) {
  const u64 ones = (u64(1) << bits) - 1;
  for_lanes(mask, [&](int lane) {
    u64 value = 0;
    for (int i = 0; i < in.n_src; i++)
      value |= (w.reg(in.src[i])[lane] & ones) << i * bits;
    w.reg(in.dst[0])[lane] = value;
  });
}
inline void unpack(Machine&, Warp& w, const Instruction& in, Mask mask, u32 bits) {
  const u64 ones = (u64(1) << bits) - 1;
  for_lanes(mask, [&](int lane) {
    const u64 value = w.reg(in.src[0])[lane];
    for (int i = 0; i < in.n_dst; i++)
      if (in.dst[i] >= 0)
        w.reg(in.dst[i])[lane] = value >> i * bits & ones;
  });
}
template <u32 bits>
void pack_as(Machine& m, Warp& w, const Instruction& in, Mask mask) {
  pack(m, w, in, mask, bits / in.n_src);
}
template <u32 bits>
void unpack_as(Machine& m, Warp& w, const Instruction& in, Mask mask) {
  unpack(m, w, in, mask, bits / in.n_dst);
}

// clang-format off
#define SIGNED_UNSIGNED(name, expression)                                                     \
  {name ".s32", lanewise<[](s32 a, s32 b) { return s32(expression); }>},                       \
  {name ".u32", lanewise<[](u32 a, u32 b) { return u32(expression); }>},                       \
  {name ".s64", lanewise<[](s64 a, s64 b) { return s64(expression); }>},                       \
  {name ".u64", lanewise<[](u64 a, u64 b) { return u64(expression); }>},                       \
  {name ".s16", lanewise<[](s16 a, s16 b) { return s16(expression); }>},                       \
  {name ".u16", lanewise<[](u16 a, u16 b) { return u16(expression); }>}
#define MODULO(name, op)                                                                      \
  {name ".s16 " name ".u16 " name ".b16", lanewise<[](u16 a, u16 b) { return u16(a op b); }>}, \
  {name ".s32 " name ".u32 " name ".b32", lanewise<[](u32 a, u32 b) { return u32(a op b); }>}, \
  {name ".s64 " name ".u64 " name ".b64", lanewise<[](u64 a, u64 b) { return u64(a op b); }>}
#define COMPARISON(name, unsigned_name, op)                                                   \
  {"setp." name ".s16", lanewise<[](s16 a, s16 b) { return (a op b); }>},                        \
  {"setp." name ".s32", lanewise<[](s32 a, s32 b) { return (a op b); }>},                        \
  {"setp." name ".s64", lanewise<[](s64 a, s64 b) { return (a op b); }>},                        \
  {"setp." name ".u16 setp." name ".b16 setp." unsigned_name ".u16", lanewise<[](u16 a, u16 b) { return (a op b); }>}, \
  {"setp." name ".u32 setp." name ".b32 setp." unsigned_name ".u32", lanewise<[](u32 a, u32 b) { return (a op b); }>}, \
  {"setp." name ".u64 setp." name ".b64 setp." unsigned_name ".u64", lanewise<[](u64 a, u64 b) { return (a op b); }>}

inline const Definition kIntegers[] = {
  {"mov.b16 mov.u16 mov.s16 mov.f16 mov.bf16", lanewise<[](u16 a) { return a; }>},
  {"mov.b32 mov.u32 mov.s32 mov.f32", lanewise<[](u32 a) { return a; }>},
  {"mov.b64 mov.u64 mov.s64 mov.f64 cvta.global.u64 cvta.to.global.u64 cvta.param.u64", lanewise<[](u64 a) { return a; }>},
  {"mov.pred", lanewise<[](bool a) { return a; }>},
  {"pack.b32", pack_as<32>}, {"pack.b64", pack_as<64>},
  {"unpack.b32", unpack_as<32>}, {"unpack.b64", unpack_as<64>},
  {"ld.param.b32 ld.param.u32 ld.param.s32 ld.param.f32", lanewise<[](u32 a) { return a; }>},
  {"ld.param.b64 ld.param.u64 ld.param.s64", lanewise<[](u64 a) { return a; }>},
  {"ld.param.b16 ld.param.u16", lanewise<[](u16 a) { return a; }>},
  {"ld.param.b8 ld.param.u8", lanewise<[](u8 a) { return a; }>},
  {"ld.param.s8", lanewise<[](s8 a) { return s32(a); }>},

  MODULO("add", +), MODULO("sub", -), MODULO("mul.lo", *),
  MODULO("and", &), MODULO("or", |), MODULO("xor", ^),
  {"and.pred", lanewise<[](bool a, bool b) { return a && b; }>},
  {"or.pred", lanewise<[](bool a, bool b) { return a || b; }>},
  {"xor.pred", lanewise<[](bool a, bool b) { return a != b; }>},
  {"not.pred", lanewise<[](bool a) { return !a; }>},
  {"not.b16", lanewise<[](u16 a) { return u16(~a); }>},
  {"not.b32", lanewise<[](u32 a) { return ~a; }>},
  {"not.b64", lanewise<[](u64 a) { return ~a; }>},
  {"neg.s32", lanewise<[](u32 a) { return 0 - a; }>},
  {"neg.s64", lanewise<[](u64 a) { return 0 - a; }>},
  {"max.relu.s32", lanewise<[](s32 a, s32 b) { return std::max(std::max(a, b), 0); }>},
  {"min.relu.s32", lanewise<[](s32 a, s32 b) { return std::max(std::min(a, b), 0); }>},
  {"abs.s32", lanewise<[](s32 a) { return a < 0 ? 0 - u32(a) : u32(a); }>},
  SIGNED_UNSIGNED("min", a < b ? a : b),
  SIGNED_UNSIGNED("max", a > b ? a : b),
  SIGNED_UNSIGNED("div", divide(a, b)),
  SIGNED_UNSIGNED("rem", remainder(a, b)),
  {"mul.hi.u32", lanewise<[](u32 a, u32 b) { return u32(u64(a) * b >> 32); }>},
  {"mul.hi.s32", lanewise<[](s32 a, s32 b) { return s32(s64(a) * b >> 32); }>},
  {"mul.hi.u64", lanewise<[](u64 a, u64 b) { return u64((unsigned __int128)a * b >> 64); }>},
  {"mul.hi.s64", lanewise<[](s64 a, s64 b) { return s64((__int128)a * b >> 64); }>},
  {"mul.wide.u16", lanewise<[](u16 a, u16 b) { return u32(a) * u32(b); }>},
  {"mul.wide.s16", lanewise<[](s16 a, s16 b) { return s32(a) * s32(b); }>},
  {"mul.wide.u32", lanewise<[](u32 a, u32 b) { return u64(a) * b; }>},
  {"mul.wide.s32", lanewise<[](s32 a, s32 b) { return s64(a) * b; }>},
  {"mad.lo.s16 mad.lo.u16", lanewise<[](u16 a, u16 b, u16 c) { return u16(u32(a) * b + c); }>},
  {"mad.lo.s32 mad.lo.u32", lanewise<[](u32 a, u32 b, u32 c) { return a * b + c; }>},
  {"mad.lo.s64 mad.lo.u64", lanewise<[](u64 a, u64 b, u64 c) { return a * b + c; }>},
  {"mad.wide.u32", lanewise<[](u32 a, u32 b, u64 c) { return u64(a) * b + c; }>},
  {"mad.wide.s32", lanewise<[](s32 a, s32 b, u64 c) { return u64(s64(a) * b) + c; }>},
  {"shl.b16", lanewise<[](u16 a, u32 n) { return shift_left(a, n); }>},
  {"shl.b32", lanewise<[](u32 a, u32 n) { return shift_left(a, n); }>},
  {"shl.b64", lanewise<[](u64 a, u32 n) { return shift_left(a, n); }>},
  {"shr.u16 shr.b16", lanewise<[](u16 a, u32 n) { return shift_right(a, n); }>},
  {"shr.s16", lanewise<[](s16 a, u32 n) { return shift_right(a, n); }>},
  {"shr.u32 shr.b32", lanewise<[](u32 a, u32 n) { return shift_right(a, n); }>},
  {"shr.s32", lanewise<[](s32 a, u32 n) { return shift_right(a, n); }>},
  {"shr.u64 shr.b64", lanewise<[](u64 a, u32 n) { return shift_right(a, n); }>},
  {"shr.s64", lanewise<[](s64 a, u32 n) { return shift_right(a, n); }>},
  {"shf.l.wrap.b32", lanewise<[](u32 a, u32 b, u32 n) { return funnel_left(a, b, n & 31); }>},
  {"shf.r.wrap.b32", lanewise<[](u32 a, u32 b, u32 n) { return funnel_right(a, b, n & 31); }>},
  {"bfe.u32", lanewise<[](u32 a, u32 p, u32 n) { return bit_field_extract(a, p, n); }>},
  {"bfe.s32", lanewise<[](s32 a, u32 p, u32 n) { return bit_field_extract(a, p, n); }>},
  {"bfe.u64", lanewise<[](u64 a, u32 p, u32 n) { return bit_field_extract(a, p, n); }>},
  {"bfe.s64", lanewise<[](s64 a, u32 p, u32 n) { return bit_field_extract(a, p, n); }>},
  {"bfi.b32", lanewise<[](u32 a, u32 b, u32 p, u32 n) { return bit_field_insert(a, b, p, n); }>},
  {"prmt.b32", lanewise<[](u32 a, u32 b, u32 s) { return permute_bytes(a, b, s); }>},
  {"lop3.b32", lanewise<[](u32 a, u32 b, u32 c, u32 t) { return logic3(a, b, c, t); }>},
  {"popc.b32", lanewise<[](u32 a) { return u32(__builtin_popcount(a)); }>},
  {"clz.b32", lanewise<[](u32 a) { return a ? u32(__builtin_clz(a)) : 32u; }>},
  {"brev.b32", lanewise<[](u32 a) { u32 r = 0; for (int i = 0; i < 32; i++) r |= (a >> i & 1) << (31 - i); return r; }>},

  {"selp.b16 selp.u16 selp.s16 selp.f16", lanewise<[](u16 a, u16 b, bool p) { return p ? a : b; }>},
  {"selp.b32 selp.u32 selp.s32 selp.f32", lanewise<[](u32 a, u32 b, bool p) { return p ? a : b; }>},
  {"selp.b64 selp.u64 selp.s64 selp.f64", lanewise<[](u64 a, u64 b, bool p) { return p ? a : b; }>},
  COMPARISON("eq", "eq", ==), COMPARISON("ne", "ne", !=), COMPARISON("lt", "lo", <), COMPARISON("le", "ls", <=),
  COMPARISON("gt", "hi", >), COMPARISON("ge", "hs", >=),

  // Triton and LLVM write integer conversions with the destination's width first
  {"cvt.u16.u32 cvt.u16.s32 cvt.s16.s32 cvt.s16.u32 cvt.u16.u64 cvt.u16.u16", lanewise<[](u16 a) { return a; }>},
  {"cvt.u32.u16 cvt.s32.u16", lanewise<[](u16 a) { return u32(a); }>},
  {"cvt.s32.s16 cvt.u32.s16", lanewise<[](s16 a) { return s32(a); }>},
  {"cvt.u32.u8 cvt.s32.u8", lanewise<[](u8 a) { return u32(a); }>},
  {"cvt.s32.s8 cvt.u32.s8", lanewise<[](s8 a) { return s32(a); }>},
  {"cvt.u16.u8 cvt.s16.u8", lanewise<[](u8 a) { return u16(a); }>},
  {"cvt.s16.s8 cvt.u16.s8", lanewise<[](s8 a) { return s16(a); }>},
  {"cvt.u32.u64 cvt.s32.s64 cvt.u32.s64 cvt.s32.u64", lanewise<[](u32 a) { return a; }>},
  {"cvt.u64.u32 cvt.s64.u32", lanewise<[](u32 a) { return u64(a); }>},
  {"cvt.s64.s32 cvt.u64.s32", lanewise<[](s32 a) { return s64(a); }>},
  {"cvt.u64.u16 cvt.s64.u16", lanewise<[](u16 a) { return u64(a); }>},
  {"cvt.s64.s16 cvt.u64.s16", lanewise<[](s16 a) { return s64(a); }>},
  {"cvt.s64.s8", lanewise<[](s8 a) { return s64(a); }>},
};
#undef SIGNED_UNSIGNED
#undef MODULO
#undef COMPARISON
// clang-format on

}  // namespace ptx
