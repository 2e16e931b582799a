// SPDX-License-Identifier: Apache-2.0
// Launches of the sequence's backward for one head dim, PEFTKERN_HEAD_DIM.
#include "launches.h"
#include "../kernels/sequence_backward.cuh"

namespace peftkern {

template <class T, int kHeadDim>
static void run_sequence_backward(Launcher& launcher, const SequenceBackward& args) {
  using Shape = BackwardShape<kHeadDim>;
  const Call& call = args.call;
  const bool options = has_options(call);
  if (args.dq.pointer)
    launcher.launch(
        options ? sequence_backward_queries<T, kHeadDim, true> : sequence_backward_queries<T, kHeadDim, false>,
        row_tiles<Shape::kRows>(call).count(), call.num_kv_heads, 1, Shape::kThreads, Shape::kSharedBytes, args);
  if (args.dk.pointer || args.dv.pointer)
    launcher.launch(options ? sequence_backward_keys<T, kHeadDim, true> : sequence_backward_keys<T, kHeadDim, false>,
                    key_tiles<kHeadDim>(call).count(), call.num_kv_heads, 1, Shape::kThreads, Shape::kSharedBytes,
                    args);
}

template <int kHeadDim>
void Kernels<kHeadDim>::sequence_backward(Launcher& launcher, int64_t dtype, const SequenceBackward& args) {
  if (dtype == PEFTKERN_FLOAT16)
    run_sequence_backward<fp16, kHeadDim>(launcher, args);
  else
    run_sequence_backward<bf16, kHeadDim>(launcher, args);
}

template <int kHeadDim>
void Kernels<kHeadDim>::row_sums(Launcher& launcher, int64_t dtype, const SequenceBackward& args) {
  const Call& call = args.call;
  const int64_t rows = (int64_t)call.batch * call.num_kv_heads * call.group * call.q_len;
  launcher.launch(dtype == PEFTKERN_FLOAT16 ? peftkern::row_sums<fp16> : peftkern::row_sums<bf16>,
                  (int)((rows + 7) / 8), 1, 1, 256, 0, args);
}

template <int kHeadDim>
void Kernels<kHeadDim>::softmax_sums(Launcher& launcher, int64_t dtype, const SequenceBackward& args) {
  using Shape = BackwardShape<kHeadDim>;
  launcher.launch(
      dtype == PEFTKERN_FLOAT16 ? peftkern::softmax_sums<fp16, kHeadDim> : peftkern::softmax_sums<bf16, kHeadDim>,
      row_tiles<Shape::kRows>(args.call).count(), args.call.num_kv_heads, 1, Shape::kThreads, Shape::kSharedBytes,
      args);
}

template void Kernels<PEFTKERN_HEAD_DIM>::sequence_backward(Launcher&, int64_t, const SequenceBackward&);
template void Kernels<PEFTKERN_HEAD_DIM>::row_sums(Launcher&, int64_t, const SequenceBackward&);
template void Kernels<PEFTKERN_HEAD_DIM>::softmax_sums(Launcher&, int64_t, const SequenceBackward&);

}  // namespace peftkern
