// SPDX-License-Identifier: Apache-2.0
// Kernels that lay rows beside each other and add up what comes back: [prefix | keys] for another library's attention, and
// [prompt | embeddings]. A thread handles 8 elements, 16 bytes; sums run over the batch in order.
#ifndef PEFTKERN_CUDA_COPIES_H_
#define PEFTKERN_CUDA_COPIES_H_

#include "common.cuh"

namespace peftkern {

constexpr int kCopyThreads = 256;

// 8 elements of a row as T, from T or from fp32.
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

struct Slot {
  Matrices from[2], prefix[2], to[2];  // of keys and of values
  Indices prefix_ids;
  int num_kv_heads, kv_len, prefix_len, chunks, prefix_is_float;
  int64_t count;  // chunks of one result
};

// to[b, h] = [prefix[id of b, h] | from[b, h]]; zeros for id -1. grid: (chunks, 2)
template <class T>
PEFTKERN_KERNEL(kCopyThreads, 1) kv_slot(PEFTKERN_PARAMS Slot args) {
  const int64_t i = (int64_t)blockIdx.x * kCopyThreads + threadIdx.x;
  if (i >= args.count) return;
  const bool v = blockIdx.y != 0;
  const int column = (int)(i % args.chunks) * 8, length = args.prefix_len + args.kv_len;
  const int h = (int)(i / args.chunks % args.num_kv_heads), n = (int)(i / args.chunks / args.num_kv_heads % length);
  const int b = (int)(i / args.chunks / args.num_kv_heads / length);
  uint4 x = make_uint4(0, 0, 0, 0);
  if (n >= args.prefix_len) {
    x = *reinterpret_cast<const uint4*>((v ? args.from[1] : args.from[0]).template at<T>(b, h, n - args.prefix_len) + column);
  } else {
    const int id = args.prefix_ids.pointer ? args.prefix_ids[b] : 0;
    const Matrices& prefix = v ? args.prefix[1] : args.prefix[0];
    if (id >= 0)
      x = load_as<T>(prefix.pointer, id * prefix.batch + h * prefix.head + n * prefix.row + column, args.prefix_is_float);
  }
  *reinterpret_cast<uint4*>((v ? args.to[1] : args.to[0]).template at<T>(b, h, n) + column) = x;
}

struct SlotBackward {
  Matrices dslot;
  float* total;  // [bank, Hkv, P, D]
  Indices prefix_ids;
  int batch, num_kv_heads, prefix_len, chunks;
  int64_t count;  // chunks of the result
};

// total[a, h, p] = sum of dslot[b, h, p] over the samples b of prefix a
template <class T>
PEFTKERN_KERNEL(kCopyThreads, 1) kv_slot_backward(PEFTKERN_PARAMS SlotBackward args) {
  const int64_t i = (int64_t)blockIdx.x * kCopyThreads + threadIdx.x;
  if (i >= args.count) return;
  const int column = (int)(i % args.chunks) * 8, p = (int)(i / args.chunks % args.prefix_len);
  const int h = (int)(i / args.chunks / args.prefix_len % args.num_kv_heads);
  const int a = (int)(i / args.chunks / args.prefix_len / args.num_kv_heads);
  float sum[8] = {0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
  for (int b = 0; b < args.batch; b++)
    if (!args.prefix_ids.pointer || args.prefix_ids[b] == a) add_chunk(sum, args.dslot.at<T>(b, h, p) + column);
  store_chunk(args.total + i * 8, sum);
}

struct Embedding {
  Indices input_ids, prompt_ids;
  const void *weight, *prompt;
  void* out;
  int64_t ids_batch, ids_row, weight_row, prompt_bank, prompt_row;
  int64_t count;  // chunks of the result
  int seq_len, prompt_len, vocab_size, chunks, prompt_is_float;
};

// out[b] = [prompt[id of b] | weight[input_ids[b]]]; a token that is no row of the weight becomes NaN
template <class T>
PEFTKERN_KERNEL(kCopyThreads, 1) soft_prompt_embedding(PEFTKERN_PARAMS Embedding args) {
  const int64_t i = (int64_t)blockIdx.x * kCopyThreads + threadIdx.x;
  if (i >= args.count) return;
  const int column = (int)(i % args.chunks) * 8, length = args.prompt_len + args.seq_len;
  const int n = (int)(i / args.chunks % length), b = (int)(i / args.chunks / length);
  uint4 x;
  if (n < args.prompt_len) {
    const int id = args.prompt_ids.pointer ? args.prompt_ids[b] : 0;
    x = load_as<T>(args.prompt, id * args.prompt_bank + n * args.prompt_row + column, args.prompt_is_float);
  } else {
    const int token = args.input_ids.at(b * args.ids_batch + (n - args.prompt_len) * args.ids_row);
    const uint32_t nan = pack<T>(NAN, NAN);
    x = make_uint4(nan, nan, nan, nan);
    if (token >= 0 && token < args.vocab_size) x = load_as<T>(args.weight, token * args.weight_row + column, false);
  }
  static_cast<uint4*>(args.out)[i] = x;
}

struct EmbeddingBackward {
  const void* dout;
  float* dprompt;  // [bank, P, E]
  Indices prompt_ids;
  int64_t dout_batch, dout_row, count;
  int batch, prompt_len, chunks;
};

// dprompt[a, p] = sum of dout[b, p] over the samples b of prompt a
template <class T>
PEFTKERN_KERNEL(kCopyThreads, 1) soft_prompt_embedding_backward(PEFTKERN_PARAMS EmbeddingBackward args) {
  const int64_t i = (int64_t)blockIdx.x * kCopyThreads + threadIdx.x;
  if (i >= args.count) return;
  const int column = (int)(i % args.chunks) * 8, p = (int)(i / args.chunks % args.prompt_len);
  const int a = (int)(i / args.chunks / args.prompt_len);
  float sum[8] = {0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
  for (int b = 0; b < args.batch; b++)
    if (!args.prompt_ids.pointer || args.prompt_ids[b] == a)
      add_chunk(sum, static_cast<const T*>(args.dout) + b * args.dout_batch + p * args.dout_row + column);
  store_chunk(args.dprompt + i * 8, sum);
}

}  // namespace peftkern
#endif  // PEFTKERN_CUDA_COPIES_H_
