// SPDX-License-Identifier: Apache-2.0
// The kernels of one instruction set: each call runs in the first of its layouts that serves the call.
#ifndef PEFTKERN_CPU_KERNELS_H_
#define PEFTKERN_CPU_KERNELS_H_

#include "backward/reduce.h"
#include "forward/decode.h"
#include "layouts/fp32.h"

namespace peftkern {
namespace PEFTKERN_ISA {

template <typename L, typename... Others>
static int forward_in(const peftkern_attention& args, const Plan& plan) {
  if constexpr (sizeof...(Others) > 0)
    if (!L::serves(args)) return forward_in<Others...>(args, plan);
  return plan.decode ? decode<L>(args, plan) : forward<L>(args, plan);
}

template <typename L, typename... Others>
static int backward_in(const peftkern_attention_backward& args, const Plan& plan) {
  if constexpr (sizeof...(Others) > 0)
    if (!L::serves(args.forward)) return backward_in<Others...>(args, plan);
  return backward<L>(args, plan);
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern

#define PEFTKERN_DEFINE_KERNELS(...)                                                  \
  namespace peftkern {                                                                \
  namespace PEFTKERN_ISA {                                                            \
  int attention_forward(const peftkern_attention& args, const Plan& plan) {           \
    return forward_in<__VA_ARGS__>(args, plan);                                       \
  }                                                                                   \
  int attention_backward(const peftkern_attention_backward& args, const Plan& plan) { \
    return backward_in<__VA_ARGS__>(args, plan);                                      \
  }                                                                                   \
  }                                                                                   \
  }

#endif  // PEFTKERN_CPU_KERNELS_H_
