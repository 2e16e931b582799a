// SPDX-License-Identifier: Apache-2.0
// The entry points of the whole attention: prefix_attention, its backward, and softmax_sums.
#include "../kernels/sequence_backward.cuh"
#include "../kernels/sequence_forward.cuh"
#include "merge.h"

using namespace peftkern;

namespace {

SequenceForward sequence_forward_of(const peftkern_attention& a) {
  SequenceForward forward{};
  forward.call = call_of(a);
  forward.q = matrices(a.q, a.q_stride);
  forward.k = matrices(a.k, a.k_stride);
  forward.v = matrices(a.v, a.v_stride);
  forward.prefix_k = matrices(a.prefix_k, a.prefix_k_stride);
  forward.prefix_v = matrices(a.prefix_v, a.prefix_v_stride);
  forward.out = matrices(a.out, a.out_stride);
  forward.lse = a.lse;
  forward.sinks = a.sinks;
  forward.key_mask = a.key_mask;
  forward.key_mask_batch = a.key_mask_stride[0], forward.key_mask_key = a.key_mask_stride[1];
  forward.splits = 1;
  return forward;
}

void attention(Launcher& launcher, const peftkern_attention& a) {
  const SequenceForward forward = sequence_forward_of(a);
  with_kernels(a.head_dim, [&](auto kernels) { kernels.sequence_forward(launcher, a.dtype, forward); });
}

// An attention of few rows, with the keys of the prefix and of the sequence split separately: if all samples share the
// prefix, their rows fill tiles together.
struct Decoding {
  SequenceForward prefix, sequence;
  int64_t rows, width;  // dimensions of `partial`

  Decoding(const Launcher& launcher, const peftkern_attention& a)
      : prefix(sequence_forward_of(a)), sequence(prefix), rows(a.batch * a.num_heads * a.q_len), width(a.head_dim + 2) {
    prefix.call = prefix_call_of(a, -1);
    prefix.k = prefix.v = {};
    sequence.call.prefix_len = 0;
    sequence.call.prefix_ids = sequence.call.prefix_lens = {};
    with_kernels(a.head_dim, [&](auto kernels) {
      prefix.splits = kernels.key_splits(launcher, prefix.call, a.prefix_len);
      sequence.splits = kernels.key_splits(launcher, sequence.call, a.kv_len);
    });
  }
  int splits() const { return prefix.splits + sequence.splits; }
  int64_t bytes() const { return splits() * rows * width * (int64_t)sizeof(float); }
};

void decode(Launcher& launcher, const peftkern_attention& a, Decoding decoding, float* partial) {
  decoding.prefix.partial = partial;
  decoding.sequence.partial = partial + decoding.prefix.splits * decoding.rows * decoding.width;
  with_kernels(a.head_dim, [&](auto kernels) {
    for (const SequenceForward& part : {decoding.prefix, decoding.sequence})
      kernels.sequence_forward(launcher, a.dtype, part);
    const CombineSplits combine{partial,
                                matrices(a.out, a.out_stride),
                                a.lse,
                                a.sinks,
                                decoding.rows,
                                (int)a.num_heads,
                                (int)a.q_len,
                                (int)a.head_dim,
                                decoding.splits()};
    kernels.combine_splits(launcher, a.dtype, combine);
  });
}

SequenceBackward sequence_backward_of(const peftkern_cuda_attention_backward& args) {
  const peftkern_attention_backward& g = args.backward;
  const peftkern_attention& a = g.forward;
  SequenceBackward backward{};
  backward.call = call_of(a);
  backward.q = matrices(a.q, a.q_stride);
  backward.k = matrices(a.k, a.k_stride);
  backward.v = matrices(a.v, a.v_stride);
  backward.prefix_k = matrices(a.prefix_k, a.prefix_k_stride);
  backward.prefix_v = matrices(a.prefix_v, a.prefix_v_stride);
  backward.out = matrices(a.out, a.out_stride);
  backward.dout = matrices(g.dout, g.dout_stride);
  backward.dq = matrices(g.dq, g.dq_stride);
  backward.dk = matrices(g.dk, g.dk_stride);
  backward.dv = matrices(g.dv, g.dv_stride);
  backward.lse = a.lse;
  backward.dlse = matrices(g.dlse, g.dlse_stride);
  backward.delta = args.delta;
  backward.key_mask = a.key_mask;
  backward.key_mask_batch = a.key_mask_stride[0], backward.key_mask_key = a.key_mask_stride[1];
  return backward;
}

void attention_backward(Launcher& launcher, const peftkern_cuda_attention_backward& args) {
  const peftkern_attention& a = args.backward.forward;
  const SequenceBackward backward = sequence_backward_of(args);
  const bool sequence = backward.dq.pointer || backward.dk.pointer || backward.dv.pointer;
  with_kernels(a.head_dim, [&](auto kernels) {
    if (sequence && !args.delta_is_given) kernels.row_sums(launcher, a.dtype, backward);
    kernels.sequence_backward(launcher, a.dtype, backward);
  });
  merge_prefix_backward(launcher, args, sequence || args.delta_is_given ? args.delta : nullptr);
}

}  // namespace

extern "C" {

int peftkern_cuda_softmax_sums(const peftkern_cuda_attention_backward* args) {
  if (!args || !args->delta) return PEFTKERN_INVALID_ARGUMENT;
  const peftkern_attention& a = args->backward.forward;
  if (const int status = check(*args)) return status;
  if (const int status = check_sequence(a)) return status;
  if (empty(a)) return PEFTKERN_OK;
  Launcher launcher(args->device, args->stream);
  const SequenceBackward backward = sequence_backward_of(*args);
  with_kernels(a.head_dim, [&](auto kernels) { kernels.softmax_sums(launcher, a.dtype, backward); });
  return launcher.status();
}

int64_t peftkern_cuda_split_workspace_size(const peftkern_cuda_attention* args) {
  if (!args || check(args->attention) || empty(args->attention)) return 0;
  const Launcher launcher(args->device, args->stream);
  return launcher.status() == PEFTKERN_OK ? Decoding(launcher, args->attention).bytes() : 0;
}

int peftkern_cuda_prefix_attention(const peftkern_cuda_attention* args) {
  if (!args) return PEFTKERN_INVALID_ARGUMENT;
  const peftkern_attention& a = args->attention;
  if (const int status = check(a)) return status;
  if (const int status = check_sequence(a)) return status;
  if (empty(a)) return PEFTKERN_OK;
  Launcher launcher(args->device, args->stream);
  if (!args->workspace) {
    attention(launcher, a);
    return launcher.status();
  }
  const Decoding decoding(launcher, a);
  if (a.cu_seqlens || args->workspace_size < decoding.bytes()) return PEFTKERN_INVALID_ARGUMENT;
  decode(launcher, a, decoding, static_cast<float*>(args->workspace));
  return launcher.status();
}

int peftkern_cuda_prefix_attention_backward(const peftkern_cuda_attention_backward* args) {
  if (!args || !args->delta) return PEFTKERN_INVALID_ARGUMENT;
  const peftkern_attention& a = args->backward.forward;
  if (const int status = check(*args)) return status;
  if (const int status = check_sequence(a)) return status;
  if (args->workspace_size < peftkern_cuda_workspace_size(args)) return PEFTKERN_INVALID_ARGUMENT;
  Launcher launcher(args->device, args->stream);
  attention_backward(launcher, *args);
  return launcher.status();
}

}  // extern "C"
