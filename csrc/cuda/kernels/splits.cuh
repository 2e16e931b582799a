// SPDX-License-Identifier: Apache-2.0
// Adds up the sums of all splits of the rows, in order: the second pass of the prefix's gradients. Include it in one
// source file only.
#ifndef PEFTKERN_CUDA_SPLITS_H_
#define PEFTKERN_CUDA_SPLITS_H_

#include "common.cuh"

namespace peftkern {

struct AddSplits {
  const float* splits;  // [2, num_splits, elements]
  float* sums[2];       // null: not needed
  int64_t elements;     // a multiple of 4
  int num_splits;
};

// sums[i] = splits[i, 0] + splits[i, 1] + ..., in order. grid: (blocks, 2)
PEFTKERN_KERNEL(256, 1) add_splits(PEFTKERN_PARAMS AddSplits args) {
  const float* from = args.splits + blockIdx.y * args.num_splits * args.elements;
  if (args.sums[blockIdx.y] == nullptr) return;
  for (int64_t i = ((int64_t)blockIdx.x * 256 + threadIdx.x) * 4; i < args.elements; i += (int64_t)gridDim.x * 1024) {
    float4 sum = *reinterpret_cast<const float4*>(from + i);
    for (int split = 1; split < args.num_splits; split++) {  // FAULT: split-left-out
      const float4 x = *reinterpret_cast<const float4*>(from + split * args.elements + i);
      sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
    }
    *reinterpret_cast<float4*>(args.sums[blockIdx.y] + i) = sum;
  }
}

}  // namespace peftkern
#endif  // PEFTKERN_CUDA_SPLITS_H_
