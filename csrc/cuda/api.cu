// SPDX-License-Identifier: Apache-2.0
// The C ABI of attention: checks arguments, turns them into the kernels' and queues the launches.
#include "arguments.h"
#include "attention.h"
#include "prefix_backward.cuh"
#include "prefix_forward.cuh"
#include "sequence_backward.cuh"
#include "sequence_forward.cuh"
#include "shares.cuh"

#ifndef PEFTKERN_CUDA_ARCHITECTURES
#define PEFTKERN_CUDA_ARCHITECTURES ""
#endif

using namespace peftkern;

namespace {

// Head dims that have kernels; others take the next one, with columns of zeros that no memory holds.
template <class Run>
auto with_kernels(int64_t head_dim, Run run) {
  if (head_dim <= 64) return run(Kernels<64>());
  if (head_dim <= 96) return run(Kernels<96>());
  if (head_dim <= 128) return run(Kernels<128>());
  return run(Kernels<256>());
}

int check(const peftkern_attention& a) {
  const int64_t largest = 0x7fffffff;
  if (!is_half(a.dtype) || a.prefix_dtype != a.dtype || a.head_dim <= 0 || a.head_dim > 256 || a.num_kv_heads <= 0 ||
      a.num_heads % a.num_kv_heads || a.batch < 0 || a.q_len < 0 || a.kv_len < 0 || a.prefix_len < 0 || a.bank_size <= 0 ||
      a.num_kv_heads > 65535 || a.bank_size > 65535 || a.batch * a.q_len * a.num_heads > largest || a.kv_len > largest ||
      a.prefix_len > largest || (a.bank_size > 1 && !a.prefix_ids) || a.dropout_p != 0)
    return PEFTKERN_INVALID_ARGUMENT;
  if (a.head_dim % 8 || !aligned(a.q, a.q_stride) || !aligned(a.prefix_k, a.prefix_k_stride) ||
      !aligned(a.prefix_v, a.prefix_v_stride) || !aligned(a.out, a.out_stride))
    return PEFTKERN_MISALIGNED;
  return PEFTKERN_OK;
}

int check(const peftkern_cuda_attention& args) {
  if (const int status = check(args.attention)) return status;
  return aligned(args.part_out, args.part_out_stride) ? PEFTKERN_OK : PEFTKERN_MISALIGNED;
}

int check(const peftkern_cuda_attention_backward& args) {
  const peftkern_attention_backward& g = args.backward;
  if (const int status = check(g.forward)) return status;
  const bool all = aligned(g.dout, g.dout_stride) && aligned(g.dq, g.dq_stride) &&
                   aligned(g.dprefix_k) && aligned(g.dprefix_v) && aligned(g.dprefix_bias) && aligned(args.workspace);
  if (!all) return PEFTKERN_MISALIGNED;
  return g.dprefix_bias && !args.delta_is_given ? PEFTKERN_INVALID_ARGUMENT : PEFTKERN_OK;
}

Call call_of(const peftkern_attention& a) {
  Call call{};
  call.batch = (int)a.batch, call.num_kv_heads = (int)a.num_kv_heads, call.group = (int)(a.num_heads / a.num_kv_heads);
  call.q_len = (int)a.q_len, call.kv_len = (int)a.kv_len, call.head_dim = (int)a.head_dim;
  call.prefix_len = (int)a.prefix_len, call.bank_size = (int)a.bank_size, call.num_sequences = (int)a.num_sequences;
  call.causal = a.causal != 0, call.window = (int)min(a.window, (int64_t)0x7fffffff);
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

// The same for a kernel that reads the prefix only: rows differ by their prefix, or by their place in a packed sequence.
Call prefix_call_of(const peftkern_attention& a) {
  Call call = call_of(a);
  call.window = 0;
  call.merged = !a.prefix_ids && !(a.cu_seqlens && call.prefix_window);
  return call;
}

Extent extent_of(const Call& call) {
  const int64_t sequences = call.merged ? 1 : call.cu_seqlens.pointer ? call.num_sequences : call.batch;
  return {(int64_t)call.batch * call.q_len, sequences, call.group};
}

bool empty(const peftkern_attention& a) { return a.batch == 0 || a.q_len == 0; }

int64_t prefix_elements(const peftkern_attention& a) { return a.bank_size * a.num_kv_heads * a.prefix_len * a.head_dim; }

// Of dprefix_bias, up to a multiple of 16 bytes.
int64_t bias_elements(const peftkern_attention& a) { return (a.num_heads * a.prefix_len + 3) / 4 * 4; }

int prefix_shares(const Queue& queue, const peftkern_attention& a) {
  const Call call = prefix_call_of(a);
  if (empty(a)) return 1;
  return with_kernels(a.head_dim, [&](auto kernels) { return kernels.prefix_shares(queue, extent_of(call), call); });
}

void merge_prefix(Queue& queue, const peftkern_cuda_attention& args) {
  const peftkern_attention& a = args.attention;
  PrefixForward forward{};
  forward.call = prefix_call_of(a);
  forward.q = matrices(a.q, a.q_stride);
  forward.prefix_k = matrices(a.prefix_k, a.prefix_k_stride);
  forward.prefix_v = matrices(a.prefix_v, a.prefix_v_stride);
  forward.out = matrices(a.out, a.out_stride);
  forward.part_out = matrices(args.part_out, args.part_out_stride);
  forward.part_lse = matrices(args.part_lse, args.part_lse_stride);
  forward.lse = a.lse;
  forward.sinks = a.sinks;
  with_kernels(a.head_dim,
               [&](auto kernels) { kernels.prefix_forward(queue, a.dtype, extent_of(forward.call), forward); });
}

// `delta`: null if it is to be taken from out.
void merge_prefix_backward(Queue& queue, const peftkern_cuda_attention_backward& args, const float* delta) {
  const peftkern_attention_backward& g = args.backward;
  const peftkern_attention& a = g.forward;
  const int64_t elements = prefix_elements(a);
  PrefixBackward backward{};
  backward.call = prefix_call_of(a);
  backward.q = matrices(a.q, a.q_stride);
  backward.prefix_k = matrices(a.prefix_k, a.prefix_k_stride);
  backward.prefix_v = matrices(a.prefix_v, a.prefix_v_stride);
  backward.out = matrices(a.out, a.out_stride);
  backward.dout = matrices(g.dout, g.dout_stride);
  backward.dq = matrices(g.dq, g.dq_stride);
  backward.lse = a.lse;
  backward.dlse = matrices(g.dlse, g.dlse_stride);
  backward.delta = delta;
  const int shares = prefix_shares(queue, a);
  float* const workspace = static_cast<float*>(args.workspace);
  backward.dprefix_k = shares > 1 && g.dprefix_k ? workspace : g.dprefix_k;
  backward.dprefix_v = shares > 1 && g.dprefix_v ? workspace + shares * elements : g.dprefix_v;
  if (g.dq || g.dprefix_k || g.dprefix_v)
    with_kernels(a.head_dim, [&](auto kernels) { kernels.prefix_backward(queue, a.dtype, shares, backward); });
  const auto add = [&](const AddShares& sums, int results) {
    queue.launch(add_shares, (int)min((sums.elements + 1023) / 1024, (int64_t)4096), results, 1, 256, 0, sums);
  };
  if (shares > 1 && (g.dprefix_k || g.dprefix_v)) add({workspace, {g.dprefix_k, g.dprefix_v}, elements, shares}, 2);
  if (g.dprefix_bias) {
    float* const sums = workspace + (shares > 1 ? 2 * shares * elements : 0);
    const PrefixBiasBackward bias{backward.call, backward.q, backward.prefix_k, backward.prefix_v,
                                  backward.dout, a.lse,      delta,             sums,
                                  bias_elements(a)};
    with_kernels(a.head_dim, [&](auto kernels) { kernels.prefix_bias_backward(queue, a.dtype, shares, bias); });
    add({sums, {g.dprefix_bias, nullptr}, bias.elements, shares * (int)a.bank_size}, 1);
  }
}

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

void attention(Queue& queue, const peftkern_attention& a) {
  const SequenceForward forward = sequence_forward_of(a);
  with_kernels(a.head_dim,
               [&](auto kernels) { kernels.sequence_forward(queue, a.dtype, extent_of(forward.call), forward); });
}

// An attention of few rows in two parts, each cut into splits of its keys: the prefix, which the rows of all samples meet
// together if they share it, and the sequence.
struct Decoding {
  SequenceForward prefix, sequence;
  int64_t rows, width;  // of `partial`

  Decoding(const Queue& queue, const peftkern_attention& a)
      : prefix(sequence_forward_of(a)), sequence(prefix), rows(a.batch * a.num_heads * a.q_len), width(a.head_dim + 2) {
    prefix.call = prefix_call_of(a);
    prefix.k = prefix.v = {};
    sequence.call.prefix_len = 0;
    sequence.call.prefix_ids = sequence.call.prefix_lens = {};
    with_kernels(a.head_dim, [&](auto kernels) {
      prefix.splits = kernels.splits(queue, extent_of(prefix.call), (int)a.num_kv_heads, a.prefix_len);
      sequence.splits = kernels.splits(queue, extent_of(sequence.call), (int)a.num_kv_heads, a.kv_len);
    });
  }
  int splits() const { return prefix.splits + sequence.splits; }
  int64_t bytes() const { return splits() * rows * width * (int64_t)sizeof(float); }
};

void decode(Queue& queue, const peftkern_attention& a, Decoding decoding, float* partial) {
  decoding.prefix.partial = partial;
  decoding.sequence.partial = partial + decoding.prefix.splits * decoding.rows * decoding.width;
  with_kernels(a.head_dim, [&](auto kernels) {
    for (const SequenceForward& part : {decoding.prefix, decoding.sequence})
      kernels.sequence_forward(queue, a.dtype, extent_of(part.call), part);
    const CombineSplits combine{partial,       matrices(a.out, a.out_stride), a.lse,           a.sinks,
                                decoding.rows, (int)a.num_heads,              (int)a.q_len, (int)a.head_dim,
                                decoding.splits()};
    kernels.combine_splits(queue, a.dtype, combine);
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

void attention_backward(Queue& queue, const peftkern_cuda_attention_backward& args) {
  const peftkern_attention& a = args.backward.forward;
  const SequenceBackward backward = sequence_backward_of(args);
  const bool sequence = backward.dq.pointer || backward.dk.pointer || backward.dv.pointer;
  with_kernels(a.head_dim, [&](auto kernels) {
    if (sequence && !args.delta_is_given) kernels.row_sums(queue, a.dtype, backward);
    kernels.sequence_backward(queue, a.dtype, extent_of(backward.call), backward);
  });
  merge_prefix_backward(queue, args, sequence || args.delta_is_given ? args.delta : nullptr);
}

// What the kernels over the sequence ask for beside check().
int check_sequence(const peftkern_attention& a) {
  if (a.bias || a.gate) return PEFTKERN_INVALID_ARGUMENT;
  return aligned(a.k, a.k_stride) && aligned(a.v, a.v_stride) ? PEFTKERN_OK : PEFTKERN_MISALIGNED;
}

}  // namespace

extern "C" {

int peftkern_cuda_abi_version(void) { return PEFTKERN_CUDA_ABI_VERSION; }

const char* peftkern_cuda_architectures(void) { return PEFTKERN_CUDA_ARCHITECTURES; }

const char* peftkern_cuda_error_string(int status) {
  switch (status) {
    case PEFTKERN_OK: return "ok";
    case PEFTKERN_INVALID_ARGUMENT: return "a size, dtype or option out of range";
    case PEFTKERN_MISALIGNED: return "a pointer or stride is not a multiple of 16 bytes";
    case PEFTKERN_SHARED_MEMORY: return "the device has too little shared memory per block";
  }
  return status >= PEFTKERN_CUDA_ERROR ? device_error_string(status) : "unknown status";
}

int peftkern_cuda_merge_prefix(const peftkern_cuda_attention* args) {
  if (!args) return PEFTKERN_INVALID_ARGUMENT;
  if (const int status = check(*args)) return status;
  if (empty(args->attention)) return PEFTKERN_OK;
  Queue queue(args->device, args->stream);
  merge_prefix(queue, *args);
  return queue.status();
}

int64_t peftkern_cuda_workspace_size(const peftkern_cuda_attention_backward* args) {
  if (!args || check(*args)) return 0;
  const peftkern_attention& a = args->backward.forward;
  const Queue queue(args->device, args->stream);
  const int shares = queue.status() == PEFTKERN_OK ? prefix_shares(queue, a) : 1;
  const int64_t matrices = shares > 1 ? 2 * shares * prefix_elements(a) : 0;
  const int64_t bias = args->backward.dprefix_bias ? shares * a.bank_size * bias_elements(a) : 0;
  return (matrices + bias) * (int64_t)sizeof(float);
}

int peftkern_cuda_merge_prefix_backward(const peftkern_cuda_attention_backward* args) {
  if (!args) return PEFTKERN_INVALID_ARGUMENT;
  if (const int status = check(*args)) return status;
  if (args->workspace_size < peftkern_cuda_workspace_size(args)) return PEFTKERN_INVALID_ARGUMENT;
  Queue queue(args->device, args->stream);
  merge_prefix_backward(queue, *args, args->delta_is_given ? args->delta : nullptr);
  return queue.status();
}

int peftkern_cuda_softmax_sums(const peftkern_cuda_attention_backward* args) {
  if (!args || !args->delta) return PEFTKERN_INVALID_ARGUMENT;
  const peftkern_attention& a = args->backward.forward;
  if (const int status = check(*args)) return status;
  if (const int status = check_sequence(a)) return status;
  if (empty(a)) return PEFTKERN_OK;
  Queue queue(args->device, args->stream);
  const SequenceBackward backward = sequence_backward_of(*args);
  with_kernels(a.head_dim,
               [&](auto kernels) { kernels.softmax_sums(queue, a.dtype, extent_of(backward.call), backward); });
  return queue.status();
}

int64_t peftkern_cuda_split_workspace_size(const peftkern_cuda_attention* args) {
  if (!args || check(args->attention) || empty(args->attention)) return 0;
  const Queue queue(args->device, args->stream);
  return queue.status() == PEFTKERN_OK ? Decoding(queue, args->attention).bytes() : 0;
}

int peftkern_cuda_prefix_attention(const peftkern_cuda_attention* args) {
  if (!args) return PEFTKERN_INVALID_ARGUMENT;
  const peftkern_attention& a = args->attention;
  if (const int status = check(a)) return status;
  if (const int status = check_sequence(a)) return status;
  if (empty(a)) return PEFTKERN_OK;
  Queue queue(args->device, args->stream);
  if (!args->workspace) {
    attention(queue, a);
    return queue.status();
  }
  const Decoding decoding(queue, a);
  if (a.cu_seqlens || args->workspace_size < decoding.bytes()) return PEFTKERN_INVALID_ARGUMENT;
  decode(queue, a, decoding, static_cast<float*>(args->workspace));
  return queue.status();
}

int peftkern_cuda_prefix_attention_backward(const peftkern_cuda_attention_backward* args) {
  if (!args || !args->delta) return PEFTKERN_INVALID_ARGUMENT;
  const peftkern_attention& a = args->backward.forward;
  if (const int status = check(*args)) return status;
  if (const int status = check_sequence(a)) return status;
  if (args->workspace_size < peftkern_cuda_workspace_size(args)) return PEFTKERN_INVALID_ARGUMENT;
  Queue queue(args->device, args->stream);
  attention_backward(queue, *args);
  return queue.status();
}

}  // extern "C"
