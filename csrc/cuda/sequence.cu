// SPDX-License-Identifier: Apache-2.0
// Launches of the kernels over [prefix | sequence] for one head dim, PEFTKERN_HEAD_DIM.
#include "attention.h"
#include "sequence_backward.cuh"
#include "sequence_forward.cuh"

namespace peftkern {

template <int kHeadDim>
void Kernels<kHeadDim>::sequence_forward(Queue& queue, int64_t dtype, const Extent& extent, const SequenceForward& args) {
  using Shape = SequenceForwardShape<kHeadDim>;
  const auto run = [&](void (*kernel)(SequenceForward)) {
    queue.launch(kernel, extent.tiles(Shape::kRows), args.call.num_kv_heads, kHeadDim / Shape::kColumns * args.splits,
                 Shape::kThreads, Shape::kSharedBytes, args);
  };
  const bool options = has_options(args.call);
  if (dtype == PEFTKERN_FLOAT16)
    run(options ? peftkern::sequence_forward<fp16, kHeadDim, true> : peftkern::sequence_forward<fp16, kHeadDim, false>);
  else
    run(options ? peftkern::sequence_forward<bf16, kHeadDim, true> : peftkern::sequence_forward<bf16, kHeadDim, false>);
}

template <int kHeadDim>
int Kernels<kHeadDim>::splits(const Queue& queue, const Extent& extent, int num_kv_heads, int64_t keys) {
  using Shape = SequenceForwardShape<kHeadDim>;
  const int64_t blocks = (keys + Shape::kKeys - 1) / Shape::kKeys;
  const int64_t tiles = (int64_t)extent.tiles(Shape::kRows) * num_kv_heads * (kHeadDim / Shape::kColumns);
  const int64_t wanted = (2 * queue.multiprocessors() + tiles - 1) / tiles;
  return (int)min(wanted, (blocks + 1) / 2);  // of two blocks of keys at least
}

template <int kHeadDim>
void Kernels<kHeadDim>::combine_splits(Queue& queue, int64_t dtype, const CombineSplits& args) {
  queue.launch(dtype == PEFTKERN_FLOAT16 ? peftkern::combine_splits<fp16> : peftkern::combine_splits<bf16>,
               (int)((args.rows + 7) / 8), 1, 1, 256, 0, args);
}

template <class T, int kHeadDim>
static void run_sequence_backward(Queue& queue, const Extent& extent, const SequenceBackward& args) {
  using Shape = BackwardShape<kHeadDim>;
  const Call& call = args.call;
  const bool options = has_options(call);
  if (args.dq.pointer)
    queue.launch(options ? sequence_backward_queries<T, kHeadDim, true> : sequence_backward_queries<T, kHeadDim, false>,
                 extent.tiles(Shape::kRows), call.num_kv_heads, 1, Shape::kThreads, Shape::kSharedBytes, args);
  if (args.dk.pointer || args.dv.pointer)
    queue.launch(options ? sequence_backward_keys<T, kHeadDim, true> : sequence_backward_keys<T, kHeadDim, false>,
                 (call.kv_len + Shape::kKeys - 1) / Shape::kKeys, call.num_kv_heads, (int)extent.sequences, Shape::kThreads,
                 Shape::kSharedBytes, args);
}

template <int kHeadDim>
void Kernels<kHeadDim>::sequence_backward(Queue& queue, int64_t dtype, const Extent& extent, const SequenceBackward& args) {
  if (dtype == PEFTKERN_FLOAT16)
    run_sequence_backward<fp16, kHeadDim>(queue, extent, args);
  else
    run_sequence_backward<bf16, kHeadDim>(queue, extent, args);
}

template <int kHeadDim>
void Kernels<kHeadDim>::row_sums(Queue& queue, int64_t dtype, const SequenceBackward& args) {
  const Call& call = args.call;
  const int64_t rows = (int64_t)call.batch * call.num_kv_heads * call.group * call.q_len;
  queue.launch(dtype == PEFTKERN_FLOAT16 ? peftkern::row_sums<fp16> : peftkern::row_sums<bf16>, (int)((rows + 7) / 8), 1, 1,
               256, 0, args);
}

template <int kHeadDim>
void Kernels<kHeadDim>::softmax_sums(Queue& queue, int64_t dtype, const Extent& extent, const SequenceBackward& args) {
  using Shape = BackwardShape<kHeadDim>;
  queue.launch(dtype == PEFTKERN_FLOAT16 ? peftkern::softmax_sums<fp16, kHeadDim> : peftkern::softmax_sums<bf16, kHeadDim>,
               extent.tiles(Shape::kRows), args.call.num_kv_heads, 1, Shape::kThreads, Shape::kSharedBytes, args);
}

template void Kernels<PEFTKERN_HEAD_DIM>::sequence_forward(Queue&, int64_t, const Extent&, const SequenceForward&);
template int Kernels<PEFTKERN_HEAD_DIM>::splits(const Queue&, const Extent&, int, int64_t);
template void Kernels<PEFTKERN_HEAD_DIM>::combine_splits(Queue&, int64_t, const CombineSplits&);
template void Kernels<PEFTKERN_HEAD_DIM>::sequence_backward(Queue&, int64_t, const Extent&, const SequenceBackward&);
template void Kernels<PEFTKERN_HEAD_DIM>::row_sums(Queue&, int64_t, const SequenceBackward&);
template void Kernels<PEFTKERN_HEAD_DIM>::softmax_sums(Queue&, int64_t, const Extent&, const SequenceBackward&);

}  // namespace peftkern
