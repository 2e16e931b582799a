// SPDX-License-Identifier: Apache-2.0
// The instruction sets of this build and this processor. Their kernels are in isa/.
#ifndef PEFTKERN_CPU_ISA_H_
#define PEFTKERN_CPU_ISA_H_

#include "plan.h"

namespace peftkern {

struct Kernels {
  int (*forward)(const peftkern_attention& args, const Plan& plan);
  int (*backward)(const peftkern_attention_backward& args, const Plan& plan);
};

bool has_isa(int isa);        // a peftkern_isa
int default_isa(int dtype);   // the fastest one for a dtype
Kernels kernels_of(int isa);  // of one that has_isa() confirms

#define PEFTKERN_FOR_EACH_ISA(F) F(portable) F(avx2) F(avx512) F(avx512_bf16) F(amx_bf16) F(sve256) F(neon_bf16)

#define PEFTKERN_DECLARE(isa)                                                        \
  namespace isa {                                                                    \
  int attention_forward(const peftkern_attention& args, const Plan& plan);           \
  int attention_backward(const peftkern_attention_backward& args, const Plan& plan); \
  }
PEFTKERN_FOR_EACH_ISA(PEFTKERN_DECLARE)
#undef PEFTKERN_DECLARE

}  // namespace peftkern
#endif  // PEFTKERN_CPU_ISA_H_
