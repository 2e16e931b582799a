// SPDX-License-Identifier: Apache-2.0
// The prefix's part of the backward, which merge.cu and attention.cu use.
#ifndef PEFTKERN_CUDA_MERGE_H_
#define PEFTKERN_CUDA_MERGE_H_

#include "arguments.h"

namespace peftkern {

// Adds the prefix's part to dq; writes dprefix_k, dprefix_v and dprefix_bias. delta is computed from out if null.
void merge_prefix_backward(Launcher& launcher, const peftkern_cuda_attention_backward& args, const float* delta);

}  // namespace peftkern
#endif  // PEFTKERN_CUDA_MERGE_H_
