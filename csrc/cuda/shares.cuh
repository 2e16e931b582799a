// SPDX-License-Identifier: Apache-2.0
// The sums of shares of rows, in order: the second pass of the prefix's gradients. For one source file.
#ifndef PEFTKERN_CUDA_SHARES_H_
#define PEFTKERN_CUDA_SHARES_H_

#include "common.cuh"

namespace peftkern {

struct AddShares {
  const float* shares;  // [2, shares, elements]
  float* sums[2];         // null: nobody needs it
  int64_t elements;  // a multiple of 4
  int num_shares;
};

// sums[i] = shares[i, 0] + shares[i, 1] + ..., in order. grid: (blocks, 2)
PEFTKERN_KERNEL(256, 1) add_shares(PEFTKERN_PARAMS AddShares args) {
  const float* from = args.shares + blockIdx.y * args.num_shares * args.elements;
  if (args.sums[blockIdx.y] == nullptr) return;
  for (int64_t i = ((int64_t)blockIdx.x * 256 + threadIdx.x) * 4; i < args.elements; i += (int64_t)gridDim.x * 1024) {
    float4 sum = *reinterpret_cast<const float4*>(from + i);
    for (int share = 1; share < args.num_shares; share++) {
      const float4 x = *reinterpret_cast<const float4*>(from + share * args.elements + i);
      sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
    }
    *reinterpret_cast<float4*>(args.sums[blockIdx.y] + i) = sum;
  }
}

}  // namespace peftkern
#endif  // PEFTKERN_CUDA_SHARES_H_
