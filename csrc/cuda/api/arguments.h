// SPDX-License-Identifier: Apache-2.0
// What the entry points share: checks of the arguments, and the conversion of the C ABI's structs to the kernels'.
#ifndef PEFTKERN_CUDA_ARGUMENTS_H_
#define PEFTKERN_CUDA_ARGUMENTS_H_

#include <algorithm>

#include "../launch/launches.h"

namespace peftkern {

inline bool is_half(int64_t dtype) { return dtype == PEFTKERN_FLOAT16 || dtype == PEFTKERN_BFLOAT16; }

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Whether a pointer and all strides, of 2-byte elements, are multiples of 16 bytes. A null pointer is aligned.
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

// Calls run(Kernels<the smallest head dim with kernels that fits>()). The columns beyond head_dim are zeros in shared
// memory and do not exist in global memory.
template <class Run>
auto with_kernels(int64_t head_dim, Run run) {
  if (head_dim <= 64) return run(Kernels<64>());
  if (head_dim <= 96) return run(Kernels<96>());
  if (head_dim <= 128) return run(Kernels<128>());
  return run(Kernels<256>());
}

inline int check(const peftkern_attention& a) {
  const int64_t largest = 0x7fffffff;
  if (!is_half(a.dtype) || a.prefix_dtype != a.dtype || a.head_dim <= 0 || a.head_dim > 256 ||
      a.value_dim != a.head_dim || a.num_kv_heads <= 0 || a.num_heads % a.num_kv_heads || a.batch < 0 || a.q_len < 0 ||
      a.kv_len < 0 || a.prefix_len < 0 || a.bank_size <= 0 || a.num_kv_heads > 65535 || a.bank_size > 65535 ||
      a.batch * a.q_len * a.num_heads > largest || a.kv_len > largest || a.prefix_len > largest ||
      (a.bank_size > 1 && !a.prefix_ids) || a.dropout_p != 0)
    return PEFTKERN_INVALID_ARGUMENT;
  if (a.head_dim % 8 || !aligned(a.q, a.q_stride) || !aligned(a.prefix_k, a.prefix_k_stride) ||
      !aligned(a.prefix_v, a.prefix_v_stride) || !aligned(a.out, a.out_stride))
    return PEFTKERN_MISALIGNED;
  return PEFTKERN_OK;
}

// The additional requirements of kernels that read the sequence.
inline int check_sequence(const peftkern_attention& a) {
  if (a.bias || a.gate) return PEFTKERN_INVALID_ARGUMENT;
  return aligned(a.k, a.k_stride) && aligned(a.v, a.v_stride) ? PEFTKERN_OK : PEFTKERN_MISALIGNED;
}

// `prefix_start` divides the rows of a packed call, or is -1.
inline int check_start(const peftkern_attention& a, int64_t prefix_start) {
  const bool known = a.cu_seqlens && a.prefix_ids && a.bank_size == 1 && prefix_start <= a.q_len;
  return prefix_start == -1 || (prefix_start >= 0 && known) ? PEFTKERN_OK : PEFTKERN_INVALID_ARGUMENT;
}

inline int check(const peftkern_cuda_attention& args) {
  if (const int status = check(args.attention)) return status;
  if (const int status = check_start(args.attention, args.prefix_start)) return status;
  return aligned(args.part_out, args.part_out_stride) ? PEFTKERN_OK : PEFTKERN_MISALIGNED;
}

inline int check(const peftkern_cuda_attention_backward& args) {
  const peftkern_attention_backward& g = args.backward;
  if (const int status = check(g.forward)) return status;
  if (const int status = check_start(g.forward, args.prefix_start)) return status;
  const bool all = aligned(g.dout, g.dout_stride) && aligned(g.dq, g.dq_stride) && aligned(g.dprefix_k) &&
                   aligned(g.dprefix_v) && aligned(g.dprefix_bias) && aligned(args.workspace);
  if (!all) return PEFTKERN_MISALIGNED;
  return g.dprefix_bias && !args.delta_is_given ? PEFTKERN_INVALID_ARGUMENT : PEFTKERN_OK;
}

inline Call call_of(const peftkern_attention& a) {
  Call call{};
  call.batch = (int)a.batch, call.num_kv_heads = (int)a.num_kv_heads, call.group = (int)(a.num_heads / a.num_kv_heads);
  call.q_len = (int)a.q_len, call.kv_len = (int)a.kv_len, call.head_dim = (int)a.head_dim;
  call.prefix_len = (int)a.prefix_len, call.bank_size = (int)a.bank_size;
  call.sequences = (int)(a.cu_seqlens ? a.num_sequences : a.batch), call.length = call.q_len;
  call.causal = a.causal != 0, call.window = (int)std::min(a.window, (int64_t)0x7fffffff);
  call.prefix_window = a.prefix_in_window ? call.window : 0;
  call.scale = (float)a.scale, call.softcap = (float)a.softcap;
  call.cu_seqlens = indices(a.cu_seqlens, a.cu_seqlens_dtype);
  call.prefix_ids = indices(a.prefix_ids, a.prefix_ids_dtype);
  call.prefix_lens = indices(a.prefix_lens, a.prefix_lens_dtype);
  call.prefix_bias = a.prefix_bias;
  call.bias_head = a.prefix_bias_stride[0], call.bias_key = a.prefix_bias_stride[1];
  call.gate = a.gate;
  return call;
}

// The same for a kernel that reads only the prefix: rows then differ by their prefix, or by their position in a packed
// sequence under a window. If they differ by their prefix, and only those from `prefix_start` on have one, the kernel
// may leave out the others.
inline Call prefix_call_of(const peftkern_attention& a, int64_t prefix_start) {
  Call call = call_of(a);
  call.window = 0;
  if ((a.prefix_ids && prefix_start < 0) || (a.cu_seqlens && call.prefix_window)) return call;
  call.cu_seqlens = call.prefix_ids = {};
  call.first_row = (int)std::max<int64_t>(prefix_start, 0);
  call.sequences = 1, call.length = call.batch * call.q_len - call.first_row;
  return call;
}

inline bool empty(const peftkern_attention& a) { return a.batch == 0 || a.q_len == 0; }

inline int64_t prefix_elements(const peftkern_attention& a) {
  return a.bank_size * a.num_kv_heads * a.prefix_len * a.head_dim;
}

// The elements of dprefix_bias, rounded up to a multiple of 16 bytes.
inline int64_t bias_elements(const peftkern_attention& a) { return (a.num_heads * a.prefix_len + 3) / 4 * 4; }

}  // namespace peftkern
#endif  // PEFTKERN_CUDA_ARGUMENTS_H_
