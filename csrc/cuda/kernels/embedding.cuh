// SPDX-License-Identifier: Apache-2.0
// [prompt | embeddings] and the prompt's gradient.
#ifndef PEFTKERN_CUDA_EMBEDDING_H_
#define PEFTKERN_CUDA_EMBEDDING_H_

#include "chunks.cuh"

namespace peftkern {

struct Embedding {
  Indices input_ids, prompt_ids;
  const void *weight, *prompt;
  void* out;
  int64_t ids_batch, ids_row, weight_row, prompt_bank, prompt_row;
  int64_t count;  // chunks of out
  int seq_len, prompt_len, vocab_size, chunks, prompt_is_float;
};

// out[b] = [prompt[prompt_ids[b]] | weight[input_ids[b]]]. A token outside the vocabulary becomes NaN.
template <class T>
PEFTKERN_KERNEL(kCopyThreads, 1)
soft_prompt_embedding(PEFTKERN_PARAMS Embedding args) {
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

// dprompt[a, p] = the sum of dout[b, p] over the samples b of prompt a, in order
template <class T>
PEFTKERN_KERNEL(kCopyThreads, 1)
soft_prompt_embedding_backward(PEFTKERN_PARAMS EmbeddingBackward args) {
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
#endif  // PEFTKERN_CUDA_EMBEDDING_H_
