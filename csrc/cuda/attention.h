// SPDX-License-Identifier: Apache-2.0
// What api.cu calls: the launches of each kernel, one instance per head dim, built apart from each other.
#ifndef PEFTKERN_CUDA_ATTENTION_H_
#define PEFTKERN_CUDA_ATTENTION_H_

#include "launch.h"

namespace peftkern {

struct PrefixForward;
struct PrefixBackward;
struct PrefixBiasBackward;
struct SequenceForward;
struct SequenceBackward;
struct CombineSplits;

// `tiles(rows)` bounds the number of tiles of so many rows that a key head has.
struct Extent {
  int64_t positions, sequences;  // sequences that end in a tile of their own
  int group;

  int tiles(int rows) const { return (int)((positions * group + rows - 1) / rows + sequences - 1); }
};

template <int kHeadDim>
struct Kernels {
  static void prefix_forward(Queue& queue, int64_t dtype, const Extent& extent, PrefixForward args);
  // Shares of the rows whose sums are kept apart: fixed by sizes and device.
  static int prefix_shares(const Queue& queue, const Extent& extent, const Call& call);
  static void prefix_backward(Queue& queue, int64_t dtype, int shares, const PrefixBackward& args);
  static void prefix_bias_backward(Queue& queue, int64_t dtype, int shares, const PrefixBiasBackward& args);
  static void sequence_forward(Queue& queue, int64_t dtype, const Extent& extent, const SequenceForward& args);
  // Parts that so many keys of each tile are cut into: fixed by sizes and device.
  static int splits(const Queue& queue, const Extent& extent, int num_kv_heads, int64_t keys);
  static void combine_splits(Queue& queue, int64_t dtype, const CombineSplits& args);
  static void sequence_backward(Queue& queue, int64_t dtype, const Extent& extent, const SequenceBackward& args);
  // delta from out, or from scores.
  static void row_sums(Queue& queue, int64_t dtype, const SequenceBackward& args);
  static void softmax_sums(Queue& queue, int64_t dtype, const Extent& extent, const SequenceBackward& args);
};

// Whether scores need the kernels with options.
inline bool has_options(const Call& call) {
  return call.softcap != 0.f || call.window != 0 || call.prefix_window != 0 || call.prefix_bias || call.gate;
}

}  // namespace peftkern
#endif  // PEFTKERN_CUDA_ATTENTION_H_
