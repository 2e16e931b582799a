// SPDX-License-Identifier: Apache-2.0
// The launches that csrc/cuda/api calls. Each head dim has an instance of its own, compiled separately.
#ifndef PEFTKERN_CUDA_LAUNCHES_H_
#define PEFTKERN_CUDA_LAUNCHES_H_

#include "launch.h"

namespace peftkern {

struct PrefixForward;
struct PrefixBackward;
struct PrefixBiasBackward;
struct SequenceForward;
struct SequenceBackward;
struct CombineSplits;

template <int kHeadDim>
struct Kernels {
  static void prefix_forward(Launcher& launcher, int64_t dtype, PrefixForward args);
  // The number of splits of the rows, each of which has sums of its own. Depends on sizes and device only.
  static int row_splits(const Launcher& launcher, const Call& call);
  static void prefix_backward(Launcher& launcher, int64_t dtype, int splits, const PrefixBackward& args);
  static void prefix_bias_backward(Launcher& launcher, int64_t dtype, int splits, const PrefixBiasBackward& args);
  static void sequence_forward(Launcher& launcher, int64_t dtype, const SequenceForward& args);
  // The number of splits of the keys of each tile. Depends on sizes and device only.
  static int key_splits(const Launcher& launcher, const Call& call, int64_t keys);
  static void combine_splits(Launcher& launcher, int64_t dtype, const CombineSplits& args);
  static void sequence_backward(Launcher& launcher, int64_t dtype, const SequenceBackward& args);
  // Two ways to compute delta: row_sums from out, softmax_sums from scores.
  static void row_sums(Launcher& launcher, int64_t dtype, const SequenceBackward& args);
  static void softmax_sums(Launcher& launcher, int64_t dtype, const SequenceBackward& args);
};

// Whether the call needs the kernels with options.
inline bool has_options(const Call& call) {
  return call.softcap != 0.f || call.window != 0 || call.prefix_window != 0 || call.prefix_bias || call.gate;
}

}  // namespace peftkern
#endif  // PEFTKERN_CUDA_LAUNCHES_H_
