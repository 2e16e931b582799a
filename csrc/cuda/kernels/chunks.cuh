// SPDX-License-Identifier: Apache-2.0
// Chunks of 8 elements, 16 bytes of half precision: what one thread of the copying kernels handles.
#ifndef PEFTKERN_CUDA_CHUNKS_H_
#define PEFTKERN_CUDA_CHUNKS_H_

#include "common.cuh"

namespace peftkern {

constexpr int kCopyThreads = 256;

// 8 elements of a row as T, read from T or from fp32.
template <class T>
PEFTKERN_DEVICE uint4 load_as(const void* pointer, int64_t at, bool is_float) {
  if (!is_float) return *reinterpret_cast<const uint4*>(static_cast<const T*>(pointer) + at);
  const float* from = static_cast<const float*>(pointer) + at;
  const float4 x = *reinterpret_cast<const float4*>(from), y = *reinterpret_cast<const float4*>(from + 4);
  return make_uint4(pack<T>(x.x, x.y), pack<T>(x.z, x.w), pack<T>(y.x, y.y), pack<T>(y.z, y.w));
}

// Adds 8 elements to `sum`.
PEFTKERN_DEVICE void add_chunk(float (&sum)[8], const float* from) {
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    const float4 x = *reinterpret_cast<const float4*>(from + i);
    sum[i] += x.x, sum[i + 1] += x.y, sum[i + 2] += x.z, sum[i + 3] += x.w;
  }
}
template <class T>
PEFTKERN_DEVICE void add_chunk(float (&sum)[8], const T* from) {
  const uint4 chunk = *reinterpret_cast<const uint4*>(from);
  const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 x = unpack<T>(words[i]);
    sum[2 * i] += x.x;
    sum[2 * i + 1] += x.y;
  }
}

PEFTKERN_DEVICE void store_chunk(float* to, const float (&sum)[8]) {
  reinterpret_cast<float4*>(to)[0] = make_float4(sum[0], sum[1], sum[2], sum[3]);
  reinterpret_cast<float4*>(to)[1] = make_float4(sum[4], sum[5], sum[6], sum[7]);
}

}  // namespace peftkern
#endif  // PEFTKERN_CUDA_CHUNKS_H_
