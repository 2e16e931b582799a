// SPDX-License-Identifier: Apache-2.0
// Logarithm and hyperbolic tangent of vectors. The exponential is in vec.h, as instruction sets differ in it.
#ifndef PEFTKERN_CPU_ELEMENTARY_H_
#define PEFTKERN_CPU_ELEMENTARY_H_

#include "vec.h"

namespace peftkern {
namespace PEFTKERN_ISA {

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

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif  // PEFTKERN_CPU_ELEMENTARY_H_
