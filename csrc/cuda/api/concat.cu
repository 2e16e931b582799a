// SPDX-License-Identifier: Apache-2.0
// The entry points of concat and its backward.
#include "../kernels/concat.cuh"

#include "chunks.h"

using namespace peftkern;

extern "C" {

int peftkern_cuda_concat(const peftkern_cuda_concat_args* args) {
  if (!args || !is_half(args->dtype)) return PEFTKERN_INVALID_ARGUMENT;
  const peftkern_cuda_concat_args& a = *args;
  const int64_t elements = a.batch * a.num_kv_heads * (a.prefix_len + a.kv_len) * a.head_dim;
  if ((a.prefix_dtype != PEFTKERN_FLOAT32 && a.prefix_dtype != a.dtype) || !copyable(elements))
    return PEFTKERN_INVALID_ARGUMENT;
  if (a.head_dim % 8 || !aligned(a.k, a.k_stride) || !aligned(a.v, a.v_stride) || !aligned(a.out_k, a.out_k_stride) ||
      !aligned(a.out_v, a.out_v_stride) || !aligned(a.prefix_k, a.prefix_k_stride) ||
      !aligned(a.prefix_v, a.prefix_v_stride))
    return PEFTKERN_MISALIGNED;
  Concat params{};
  params.from[0] = matrices(a.k, a.k_stride), params.from[1] = matrices(a.v, a.v_stride);
  params.prefix[0] = matrices(a.prefix_k, a.prefix_k_stride),
  params.prefix[1] = matrices(a.prefix_v, a.prefix_v_stride);
  params.to[0] = matrices(a.out_k, a.out_k_stride), params.to[1] = matrices(a.out_v, a.out_v_stride);
  params.prefix_ids = indices(a.prefix_ids, a.prefix_ids_dtype);
  params.num_kv_heads = (int)a.num_kv_heads, params.kv_len = (int)a.kv_len, params.prefix_len = (int)a.prefix_len;
  params.chunks = (int)(a.head_dim / 8), params.count = elements / 8;
  params.prefix_is_float = a.prefix_dtype == PEFTKERN_FLOAT32;
  return launch(a.device, a.stream, a.dtype == PEFTKERN_FLOAT16 ? concat<fp16> : concat<bf16>, 2, params);
}

int peftkern_cuda_concat_backward(const peftkern_cuda_concat_backward_args* args) {
  if (!args || !(is_half(args->dtype) || args->dtype == PEFTKERN_FLOAT32)) return PEFTKERN_INVALID_ARGUMENT;
  const peftkern_cuda_concat_backward_args& a = *args;
  const int64_t elements = a.bank_size * a.num_kv_heads * a.prefix_len * a.head_dim;
  if (!copyable(elements)) return PEFTKERN_INVALID_ARGUMENT;
  if (a.head_dim % 8 || !aligned(a.dout, a.dout_stride) || !aligned(a.dprefix)) return PEFTKERN_MISALIGNED;
  ConcatBackward params{};
  params.dout = matrices(a.dout, a.dout_stride);
  params.dprefix = a.dprefix;
  params.prefix_ids = indices(a.prefix_ids, a.prefix_ids_dtype);
  params.batch = (int)a.batch, params.num_kv_heads = (int)a.num_kv_heads, params.prefix_len = (int)a.prefix_len;
  params.chunks = (int)(a.head_dim / 8), params.count = elements / 8;
  const auto kernel = a.dtype == PEFTKERN_FLOAT32   ? concat_backward<float>
                      : a.dtype == PEFTKERN_FLOAT16 ? concat_backward<fp16>
                                                    : concat_backward<bf16>;
  return launch(a.device, a.stream, kernel, 1, params);
}

}  // extern "C"
