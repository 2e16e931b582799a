// SPDX-License-Identifier: Apache-2.0
// The C ABI of slots and embeddings: checks arguments, turns them into the kernels' and queues the launches.
#include "copies.cuh"

#include "arguments.h"
#include "launch.h"

using namespace peftkern;

namespace {

bool copyable(int64_t elements) { return elements >= 0 && elements / 8 < (int64_t)kCopyThreads * 0x7fffffff; }

// `results` results of params.count chunks each.
template <class Params>
int launch(int64_t device, void* stream, void (*kernel)(Params), int results, const Params& params) {
  Queue queue(device, stream);
  const int blocks = (int)((params.count + kCopyThreads - 1) / kCopyThreads);
  queue.launch(kernel, blocks, results, 1, kCopyThreads, 0, params);
  return queue.status();
}

}  // namespace

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
  Slot slot{};
  slot.from[0] = matrices(a.k, a.k_stride), slot.from[1] = matrices(a.v, a.v_stride);
  slot.prefix[0] = matrices(a.prefix_k, a.prefix_k_stride), slot.prefix[1] = matrices(a.prefix_v, a.prefix_v_stride);
  slot.to[0] = matrices(a.out_k, a.out_k_stride), slot.to[1] = matrices(a.out_v, a.out_v_stride);
  slot.prefix_ids = indices(a.prefix_ids, a.prefix_ids_dtype);
  slot.num_kv_heads = (int)a.num_kv_heads, slot.kv_len = (int)a.kv_len, slot.prefix_len = (int)a.prefix_len;
  slot.chunks = (int)(a.head_dim / 8), slot.count = elements / 8;
  slot.prefix_is_float = a.prefix_dtype == PEFTKERN_FLOAT32;
  return launch(a.device, a.stream, a.dtype == PEFTKERN_FLOAT16 ? kv_slot<fp16> : kv_slot<bf16>, 2, slot);
}

int peftkern_cuda_concat_backward(const peftkern_cuda_concat_backward_args* args) {
  if (!args || !(is_half(args->dtype) || args->dtype == PEFTKERN_FLOAT32)) return PEFTKERN_INVALID_ARGUMENT;
  const peftkern_cuda_concat_backward_args& a = *args;
  const int64_t elements = a.bank_size * a.num_kv_heads * a.prefix_len * a.head_dim;
  if (!copyable(elements)) return PEFTKERN_INVALID_ARGUMENT;
  if (a.head_dim % 8 || !aligned(a.dout, a.dout_stride) || !aligned(a.dprefix)) return PEFTKERN_MISALIGNED;
  SlotBackward slot{};
  slot.dslot = matrices(a.dout, a.dout_stride);
  slot.total = a.dprefix;
  slot.prefix_ids = indices(a.prefix_ids, a.prefix_ids_dtype);
  slot.batch = (int)a.batch, slot.num_kv_heads = (int)a.num_kv_heads, slot.prefix_len = (int)a.prefix_len;
  slot.chunks = (int)(a.head_dim / 8), slot.count = elements / 8;
  const auto kernel = a.dtype == PEFTKERN_FLOAT32   ? kv_slot_backward<float>
                      : a.dtype == PEFTKERN_FLOAT16 ? kv_slot_backward<fp16>
                                                    : kv_slot_backward<bf16>;
  return launch(a.device, a.stream, kernel, 1, slot);
}

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
