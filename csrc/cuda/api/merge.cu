// SPDX-License-Identifier: Apache-2.0
// The entry points of the prefix beside another library's attention: merge_prefix and its backward.
#include "merge.h"

#include "../kernels/prefix_backward.cuh"
#include "../kernels/prefix_forward.cuh"
#include "../kernels/splits.cuh"

using namespace peftkern;

namespace peftkern {
namespace {

int row_splits(const Launcher& launcher, const peftkern_cuda_attention_backward& args) {
  const peftkern_attention& a = args.backward.forward;
  const Call call = prefix_call_of(a, args.prefix_start);
  if (empty(a)) return 1;
  return with_kernels(a.head_dim, [&](auto kernels) { return kernels.row_splits(launcher, call); });
}

void merge_prefix(Launcher& launcher, const peftkern_cuda_attention& args) {
  const peftkern_attention& a = args.attention;
  // what a row without a prefix keeps as it is
  const bool in_place = args.part_out == a.out && args.part_lse == a.lse && !a.sinks;
  PrefixForward forward{};
  forward.call = prefix_call_of(a, in_place ? args.prefix_start : -1);
  forward.q = matrices(a.q, a.q_stride);
  forward.prefix_k = matrices(a.prefix_k, a.prefix_k_stride);
  forward.prefix_v = matrices(a.prefix_v, a.prefix_v_stride);
  forward.out = matrices(a.out, a.out_stride);
  forward.part_out = matrices(args.part_out, args.part_out_stride);
  forward.part_lse = matrices(args.part_lse, args.part_lse_stride);
  forward.lse = a.lse;
  forward.sinks = a.sinks;
  with_kernels(a.head_dim, [&](auto kernels) { kernels.prefix_forward(launcher, a.dtype, forward); });
}

}  // namespace

void merge_prefix_backward(Launcher& launcher, const peftkern_cuda_attention_backward& args, const float* delta) {
  const peftkern_attention_backward& g = args.backward;
  const peftkern_attention& a = g.forward;
  const int64_t elements = prefix_elements(a);
  PrefixBackward backward{};
  backward.call = prefix_call_of(a, args.prefix_start);
  backward.q = matrices(a.q, a.q_stride);
  backward.prefix_k = matrices(a.prefix_k, a.prefix_k_stride);
  backward.prefix_v = matrices(a.prefix_v, a.prefix_v_stride);
  backward.out = matrices(a.out, a.out_stride);
  backward.dout = matrices(g.dout, g.dout_stride);
  backward.dq = matrices(g.dq, g.dq_stride);
  backward.lse = a.lse;
  backward.dlse = matrices(g.dlse, g.dlse_stride);
  backward.delta = delta;
  const int splits = row_splits(launcher, args);
  float* const workspace = static_cast<float*>(args.workspace);
  backward.dprefix_k = splits > 1 && g.dprefix_k ? workspace : g.dprefix_k;
  backward.dprefix_v = splits > 1 && g.dprefix_v ? workspace + splits * elements : g.dprefix_v;
  if (g.dq || g.dprefix_k || g.dprefix_v)
    with_kernels(a.head_dim, [&](auto kernels) { kernels.prefix_backward(launcher, a.dtype, splits, backward); });
  const auto add = [&](const AddSplits& sums, int results) {
    launcher.launch(add_splits, (int)std::min<int64_t>((sums.elements + 1023) / 1024, 4096), results, 1, 256, 0, sums);
  };
  if (splits > 1 && (g.dprefix_k || g.dprefix_v)) add({workspace, {g.dprefix_k, g.dprefix_v}, elements, splits}, 2);
  if (g.dprefix_bias) {
    float* const sums = workspace + (splits > 1 ? 2 * splits * elements : 0);
    const PrefixBiasBackward bias{backward.call, backward.q, backward.prefix_k, backward.prefix_v, backward.dout, a.lse,
                                  delta,         sums,       bias_elements(a)};
    with_kernels(a.head_dim, [&](auto kernels) { kernels.prefix_bias_backward(launcher, a.dtype, splits, bias); });
    add({sums, {g.dprefix_bias, nullptr}, bias.elements, splits * (int)a.bank_size}, 1);
  }
}

}  // namespace peftkern

extern "C" {

int peftkern_cuda_merge_prefix(const peftkern_cuda_attention* args) {
  if (!args) return PEFTKERN_INVALID_ARGUMENT;
  if (const int status = check(*args)) return status;
  if (empty(args->attention)) return PEFTKERN_OK;
  Launcher launcher(args->device, args->stream);
  merge_prefix(launcher, *args);
  return launcher.status();
}

int64_t peftkern_cuda_workspace_size(const peftkern_cuda_attention_backward* args) {
  if (!args || check(*args)) return 0;
  const peftkern_attention& a = args->backward.forward;
  const Launcher launcher(args->device, args->stream);
  const int splits = launcher.status() == PEFTKERN_OK ? row_splits(launcher, *args) : 1;
  const int64_t matrices = splits > 1 ? 2 * splits * prefix_elements(a) : 0;
  const int64_t bias = args->backward.dprefix_bias ? splits * a.bank_size * bias_elements(a) : 0;
  return (matrices + bias) * (int64_t)sizeof(float);
}

int peftkern_cuda_merge_prefix_backward(const peftkern_cuda_attention_backward* args) {
  if (!args) return PEFTKERN_INVALID_ARGUMENT;
  if (const int status = check(*args)) return status;
  if (args->workspace_size < peftkern_cuda_workspace_size(args)) return PEFTKERN_INVALID_ARGUMENT;
  Launcher launcher(args->device, args->stream);
  merge_prefix_backward(launcher, *args, args->delta_is_given ? args->delta : nullptr);
  return launcher.status();
}

}  // extern "C"
