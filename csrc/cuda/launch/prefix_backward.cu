// SPDX-License-Identifier: Apache-2.0
// Launches of the prefix's backward for one head dim, PEFTKERN_HEAD_DIM.
#include <algorithm>

#include "launches.h"
#include "../kernels/prefix_backward.cuh"

namespace peftkern {

template <int kHeadDim>
int Kernels<kHeadDim>::row_splits(const Launcher& launcher, const Call& call) {
  const int matrices = call.num_kv_heads * call.bank_size;
  const int tiles = row_tiles<BackwardShape<kHeadDim>::kRows>(call).count();
  return std::max(1, std::min(tiles, launcher.multiprocessors() / std::max(1, matrices)));
}

template <int kHeadDim>
void Kernels<kHeadDim>::prefix_backward(Launcher& launcher, int64_t dtype, int splits, const PrefixBackward& args) {
  using Shape = BackwardShape<kHeadDim>;
  const auto run = [&](void (*kernel)(PrefixBackward)) {
    if (args.call.prefix_len > 0)
      launcher.launch(kernel, splits, args.call.num_kv_heads, args.call.bank_size, Shape::kThreads, Shape::kSharedBytes,
                      args);
  };
  const bool options = has_options(args.call);
  if (dtype == PEFTKERN_FLOAT16)
    run(options ? peftkern::prefix_backward<fp16, kHeadDim, true> : peftkern::prefix_backward<fp16, kHeadDim, false>);
  else
    run(options ? peftkern::prefix_backward<bf16, kHeadDim, true> : peftkern::prefix_backward<bf16, kHeadDim, false>);
}

template <int kHeadDim>
void Kernels<kHeadDim>::prefix_bias_backward(Launcher& launcher, int64_t dtype, int splits,
                                             const PrefixBiasBackward& args) {
  using Shape = BackwardShape<kHeadDim>;
  launcher.launch(dtype == PEFTKERN_FLOAT16 ? peftkern::prefix_bias_backward<fp16, kHeadDim>
                                            : peftkern::prefix_bias_backward<bf16, kHeadDim>,
                  splits, args.call.num_kv_heads, args.call.bank_size, Shape::kThreads, Shape::kSharedBytes, args);
}

template int Kernels<PEFTKERN_HEAD_DIM>::row_splits(const Launcher&, const Call&);
template void Kernels<PEFTKERN_HEAD_DIM>::prefix_backward(Launcher&, int64_t, int, const PrefixBackward&);
template void Kernels<PEFTKERN_HEAD_DIM>::prefix_bias_backward(Launcher&, int64_t, int, const PrefixBiasBackward&);

}  // namespace peftkern
