// SPDX-License-Identifier: Apache-2.0
// The entry points of the soft prompt's embedding and its backward.
#include "../kernels/embedding.cuh"

#include "chunks.h"

using namespace peftkern;

extern "C" {

int peftkern_cuda_soft_prompt_embedding(const peftkern_cuda_embedding* args) {
  if (!args || !is_half(args->backward.forward.dtype)) return PEFTKERN_INVALID_ARGUMENT;
  const peftkern_embedding& a = args->backward.forward;
  const int64_t elements = a.batch * (a.prompt_len + a.seq_len) * a.dim;
  if ((a.prompt_dtype != PEFTKERN_FLOAT32 && a.prompt_dtype != a.dtype) || !copyable(elements))
    return PEFTKERN_INVALID_ARGUMENT;
  if (a.dim % 8 || !aligned(a.weight) || a.weight_stride[0] % 8 || !aligned(a.prompt) || a.prompt_stride[0] % 8 ||
      a.prompt_stride[1] % 8 || !aligned(a.out))
    return PEFTKERN_MISALIGNED;
  Embedding embedding{};
  embedding.input_ids = indices(a.input_ids, a.input_ids_dtype);
  embedding.prompt_ids = indices(a.prompt_ids, a.prompt_ids_dtype);
  embedding.weight = a.weight, embedding.prompt = a.prompt, embedding.out = a.out;
  embedding.ids_batch = a.input_ids_stride[0], embedding.ids_row = a.input_ids_stride[1];
  embedding.weight_row = a.weight_stride[0];
  embedding.prompt_bank = a.prompt_stride[0], embedding.prompt_row = a.prompt_stride[1];
  embedding.seq_len = (int)a.seq_len, embedding.prompt_len = (int)a.prompt_len;
  embedding.vocab_size = (int)a.vocab_size;
  embedding.chunks = (int)(a.dim / 8), embedding.count = elements / 8;
  embedding.prompt_is_float = a.prompt_dtype == PEFTKERN_FLOAT32;
  const auto kernel = a.dtype == PEFTKERN_FLOAT16 ? soft_prompt_embedding<fp16> : soft_prompt_embedding<bf16>;
  return launch(args->device, args->stream, kernel, 1, embedding);
}

int peftkern_cuda_soft_prompt_embedding_backward(const peftkern_cuda_embedding* args) {
  if (!args || !is_half(args->backward.forward.dtype) || args->backward.dweight) return PEFTKERN_INVALID_ARGUMENT;
  const peftkern_embedding_backward& g = args->backward;
  const peftkern_embedding& a = g.forward;
  const int64_t elements = a.bank_size * a.prompt_len * a.dim;
  if (!copyable(elements)) return PEFTKERN_INVALID_ARGUMENT;
  if (a.dim % 8 || !aligned(g.dout, g.dout_stride) || !aligned(g.dprompt)) return PEFTKERN_MISALIGNED;
  EmbeddingBackward backward{};
  backward.dout = g.dout, backward.dprompt = g.dprompt;
  backward.prompt_ids = indices(a.prompt_ids, a.prompt_ids_dtype);
  backward.dout_batch = g.dout_stride[0], backward.dout_row = g.dout_stride[1];
  backward.batch = (int)a.batch, backward.prompt_len = (int)a.prompt_len;
  backward.chunks = (int)(a.dim / 8), backward.count = elements / 8;
  const auto kernel =
      a.dtype == PEFTKERN_FLOAT16 ? soft_prompt_embedding_backward<fp16> : soft_prompt_embedding_backward<bf16>;
  return launch(args->device, args->stream, kernel, 1, backward);
}

}  // extern "C"
