// SPDX-License-Identifier: Apache-2.0
// Launches of the forward over [prefix | sequence] for one head dim, PEFTKERN_HEAD_DIM.
#include <algorithm>

#include "launches.h"
#include "../kernels/sequence_forward.cuh"

namespace peftkern {

template <int kHeadDim>
void Kernels<kHeadDim>::sequence_forward(Launcher& launcher, int64_t dtype, const SequenceForward& args) {
  using Shape = SequenceForwardShape<kHeadDim>;
  const auto run = [&](void (*kernel)(SequenceForward)) {
    launcher.launch(kernel, row_tiles<Shape::kRows>(args.call).count(), args.call.num_kv_heads,
                    kHeadDim / Shape::kColumns * args.splits, Shape::kThreads, Shape::kSharedBytes, args);
  };
  const bool options = has_options(args.call);
  if (dtype == PEFTKERN_FLOAT16)
    run(options ? peftkern::sequence_forward<fp16, kHeadDim, true> : peftkern::sequence_forward<fp16, kHeadDim, false>);
  else
    run(options ? peftkern::sequence_forward<bf16, kHeadDim, true> : peftkern::sequence_forward<bf16, kHeadDim, false>);
}

template <int kHeadDim>
int Kernels<kHeadDim>::key_splits(const Launcher& launcher, const Call& call, int64_t keys) {
  using Shape = SequenceForwardShape<kHeadDim>;
  const int64_t blocks = (keys + Shape::kKeys - 1) / Shape::kKeys;
  const int64_t tiles =
      (int64_t)row_tiles<Shape::kRows>(call).count() * call.num_kv_heads * (kHeadDim / Shape::kColumns);
  const int64_t wanted = (2 * launcher.multiprocessors() + tiles - 1) / tiles;
  return (int)std::min(wanted, (blocks + 1) / 2);  // each of at least two blocks of keys
}

template <int kHeadDim>
void Kernels<kHeadDim>::combine_splits(Launcher& launcher, int64_t dtype, const CombineSplits& args) {
  launcher.launch(dtype == PEFTKERN_FLOAT16 ? peftkern::combine_splits<fp16> : peftkern::combine_splits<bf16>,
                  (int)((args.rows + 7) / 8), 1, 1, 256, 0, args);
}

template void Kernels<PEFTKERN_HEAD_DIM>::sequence_forward(Launcher&, int64_t, const SequenceForward&);
template int Kernels<PEFTKERN_HEAD_DIM>::key_splits(const Launcher&, const Call&, int64_t);
template void Kernels<PEFTKERN_HEAD_DIM>::combine_splits(Launcher&, int64_t, const CombineSplits&);

}  // namespace peftkern
