// SPDX-License-Identifier: Apache-2.0
// Launches of the prefix kernels for one head dim, PEFTKERN_HEAD_DIM.
#include "attention.h"
#include "prefix_backward.cuh"
#include "prefix_forward.cuh"

namespace peftkern {

template <int kHeadDim>
void Kernels<kHeadDim>::prefix_forward(Queue& queue, int64_t dtype, const Extent& extent, PrefixForward args) {
  using Shape = PrefixForwardShape<kHeadDim>;
  const Call& call = args.call;
  args.resident = min((call.prefix_len + 15) / 16 * 16, Shape::kMaxResident);
  const int resident_blocks = Shape::kBlocks * queue.multiprocessors();
  const int blocks = min(extent.tiles(Shape::kRows), (resident_blocks + call.num_kv_heads - 1) / call.num_kv_heads);
  const auto run = [&](void (*kernel)(PrefixForward)) {
    queue.launch(kernel, blocks, call.num_kv_heads, 1, Shape::kThreads, 2 * Tile<kHeadDim>::bytes(args.resident), args);
  };
  const bool options = has_options(call);
  if (dtype == PEFTKERN_FLOAT16)
    run(options ? peftkern::prefix_forward<fp16, kHeadDim, true> : peftkern::prefix_forward<fp16, kHeadDim, false>);
  else
    run(options ? peftkern::prefix_forward<bf16, kHeadDim, true> : peftkern::prefix_forward<bf16, kHeadDim, false>);
}

template <int kHeadDim>
int Kernels<kHeadDim>::prefix_shares(const Queue& queue, const Extent& extent, const Call& call) {
  const int matrices = call.num_kv_heads * call.bank_size;
  return max(1, min(extent.tiles(BackwardShape<kHeadDim>::kRows), queue.multiprocessors() / max(1, matrices)));
}

template <int kHeadDim>
void Kernels<kHeadDim>::prefix_backward(Queue& queue, int64_t dtype, int shares, const PrefixBackward& args) {
  using Shape = BackwardShape<kHeadDim>;
  const auto run = [&](void (*kernel)(PrefixBackward)) {
    if (args.call.prefix_len > 0)
      queue.launch(kernel, shares, args.call.num_kv_heads, args.call.bank_size, Shape::kThreads, Shape::kSharedBytes, args);
  };
  const bool options = has_options(args.call);
  if (dtype == PEFTKERN_FLOAT16)
    run(options ? peftkern::prefix_backward<fp16, kHeadDim, true> : peftkern::prefix_backward<fp16, kHeadDim, false>);
  else
    run(options ? peftkern::prefix_backward<bf16, kHeadDim, true> : peftkern::prefix_backward<bf16, kHeadDim, false>);
}

template <int kHeadDim>
void Kernels<kHeadDim>::prefix_bias_backward(Queue& queue, int64_t dtype, int shares, const PrefixBiasBackward& args) {
  using Shape = BackwardShape<kHeadDim>;
  queue.launch(dtype == PEFTKERN_FLOAT16 ? peftkern::prefix_bias_backward<fp16, kHeadDim>
                                         : peftkern::prefix_bias_backward<bf16, kHeadDim>,
               shares, args.call.num_kv_heads, args.call.bank_size, Shape::kThreads, Shape::kSharedBytes, args);
}

template void Kernels<PEFTKERN_HEAD_DIM>::prefix_forward(Queue&, int64_t, const Extent&, PrefixForward);
template int Kernels<PEFTKERN_HEAD_DIM>::prefix_shares(const Queue&, const Extent&, const Call&);
template void Kernels<PEFTKERN_HEAD_DIM>::prefix_backward(Queue&, int64_t, int, const PrefixBackward&);
template void Kernels<PEFTKERN_HEAD_DIM>::prefix_bias_backward(Queue&, int64_t, int, const PrefixBiasBackward&);

}  // namespace peftkern
