// SPDX-License-Identifier: Apache-2.0
// Arguments of the C ABI, checked and turned into the kernels'.
#ifndef PEFTKERN_CUDA_ARGUMENTS_H_
#define PEFTKERN_CUDA_ARGUMENTS_H_

#include "../peftkern.h"
#include "common.cuh"

namespace peftkern {

inline bool is_half(int64_t dtype) { return dtype == PEFTKERN_FLOAT16 || dtype == PEFTKERN_BFLOAT16; }

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// The same, and strides of a multiple of 8 elements; null is.
template <int kCount>
bool aligned(const void* pointer, const int64_t (&strides)[kCount]) {
  bool all = aligned(pointer);
  for (int64_t stride : strides) all &= pointer == nullptr || stride % 8 == 0;
  return all;
}

inline Matrices matrices(const void* pointer, const int64_t (&stride)[3]) {
  return {const_cast<void*>(pointer), stride[0], stride[1], stride[2]};
}

inline Indices indices(const void* pointer, int64_t dtype) { return {pointer, dtype == PEFTKERN_INT64}; }

}  // namespace peftkern
#endif  // PEFTKERN_CUDA_ARGUMENTS_H_
