// SPDX-License-Identifier: Apache-2.0
// The tasks of the backward, and the ordered sums over tasks. A task is a group of sequences that see the same prefix,
// and one kv head.
#ifndef PEFTKERN_CPU_ATTENTION_BACKWARD_H_
#define PEFTKERN_CPU_ATTENTION_BACKWARD_H_

#include "attention_backward_block.h"

namespace peftkern {
namespace PEFTKERN_ISA {

// The backward of row blocks first, first + step, ... of a sequence.
static void backward_blocks(const Problem& p, const Needs& needs, const peftkern_attention_backward& b,
                            const Sequence& seq, int64_t kv_head, int64_t first, int64_t step, BackwardScratch& s,
                            const Sums& sums, float* dbias) {
  s.tiles.open(seq, kv_head, true);
  for (int64_t block = first; block < num_position_blocks(*p.plan, seq); block += step) {
    prefetch_rows(p, seq, kv_head, block + step, p.args->q, p.args->q_stride, p.k_dim);
    prefetch_rows(p, seq, kv_head, block + step, b.dout, b.dout_stride, p.v_dim);
    for (int64_t head = 0; head < p.plan->group_size; head += p.plan->heads_per_block) {
      make_block(p, seq, kv_head, block, head, s.block);
      backward_block(p, needs, b, seq, kv_head, s, sums, dbias);
    }
  }
}

// Writes the fp32 rows [kv_len, dim.padded] of one sequence and kv head to dk or dv.
static void store_sequence(const Problem& p, const Sequence& seq, int64_t kv_head, HeadDim dim, const float* rows,
                           void* out, const int64_t* stride) {
  for (int64_t t = 0; t < seq.kv_len; t++) {
    const int64_t at = seq.batch * stride[0] + kv_head * stride[1] + (seq.start + t) * stride[2];
    narrow_row(rows + t * dim.padded, 1.0f, dim.size, p.args->dtype, const_cast<char*>(offset(out, p.args->dtype, at)));
  }
}

// The partial sums of the tasks, one per group and kv head. The ordered sums follow.
struct Partials {
  float *dprefix_k, *dprefix_v;  // [groups, num_kv_heads, prefix_len, dim.padded]
  float* dprefix_bias;           // [groups, num_heads, prefix_len]
  double *dsinks, *dgate;        // [groups, num_heads]
  float *dk, *dv;                // [partials, num_kv_heads, max_kv_len, dim.padded]
};

static Partials take_partials(const Problem& p, const Needs& needs, Arena& arena) {
  const peftkern_attention& a = *p.args;
  const int64_t groups = p.plan->num_groups;
  const int64_t prefix = groups * a.num_kv_heads * a.prefix_len;  // rows
  const int64_t partial = p.plan->num_partials * a.num_kv_heads * p.plan->max_kv_len;
  Partials x;
  x.dprefix_k = arena.take<float>(needs.dprefix_k ? prefix * p.k_dim.padded : 0);
  x.dprefix_v = arena.take<float>(needs.dprefix_v ? prefix * p.v_dim.padded : 0);
  x.dprefix_bias = arena.take<float>(needs.dprefix_bias ? groups * a.num_heads * a.prefix_len : 0);
  x.dsinks = arena.take<double>(needs.dsinks ? groups * a.num_heads : 0);
  x.dgate = arena.take<double>(needs.dgate ? groups * a.num_heads : 0);
  x.dk = arena.take<float>(needs.dk ? partial * p.k_dim.padded : 0);
  x.dv = arena.take<float>(needs.dv ? partial * p.v_dim.padded : 0);
  return x;
}

static void backward_group(const Problem& p, const Needs& needs, const peftkern_attention_backward& b, int64_t group,
                           int64_t kv_head, BackwardScratch& s, const Partials& partials) {
  const peftkern_attention& a = *p.args;
  const Plan& plan = *p.plan;
  const int64_t at = group * a.num_kv_heads + kv_head, G = plan.group_size;
  const int64_t k_width = p.k_dim.padded, v_width = p.v_dim.padded;
  // `count` rows of `width` floats, the first of which is row `first`
  const auto cleared = [](float* rows, int64_t first, int64_t count, int64_t width) {
    return (float*)memset(rows + first * width, 0, sizeof(float) * count * width);
  };
  Sums sums{};
  if (needs.dprefix_k) sums.dprefix_k = cleared(partials.dprefix_k, at * a.prefix_len, a.prefix_len, k_width);
  if (needs.dprefix_v) sums.dprefix_v = cleared(partials.dprefix_v, at * a.prefix_len, a.prefix_len, v_width);
  if (needs.dprefix_bias)
    sums.dprefix_bias =
        (float*)memset(partials.dprefix_bias + at * G * a.prefix_len, 0, sizeof(float) * G * a.prefix_len);
  if (needs.dsinks) sums.dsinks = (double*)memset(partials.dsinks + at * G, 0, sizeof(double) * G);
  if (needs.dgate) sums.dgate = (double*)memset(partials.dgate + at * G, 0, sizeof(double) * G);
  for (int32_t i = 0; i < plan.groups[group].count; i++) {
    const Unit& unit = plan.units[plan.groups[group].first + i];
    const Sequence& seq = plan.sequences[unit.sequence];
    const bool split = unit.splits > 1;
    const int64_t first = split ? (unit.partial * a.num_kv_heads + kv_head) * plan.max_kv_len : 0;
    if (needs.dk) sums.dk = cleared(split ? partials.dk : s.dk, first, seq.kv_len, k_width);
    if (needs.dv) sums.dv = cleared(split ? partials.dv : s.dv, first, seq.kv_len, v_width);
    backward_blocks(p, needs, b, seq, kv_head, unit.split, unit.splits, s, sums, nullptr);
    if (!split && needs.dk) store_sequence(p, seq, kv_head, p.k_dim, s.dk, b.dk, b.dk_stride);
    if (!split && needs.dv) store_sequence(p, seq, kv_head, p.v_dim, s.dv, b.dv, b.dv_stride);
  }
}

// dprefix_x[bank, kv_head] = the sum over the groups that see this prefix, in order.
static void sum_prefix(const Problem& p, int64_t prefix, int64_t kv_head, HeadDim dim, const float* partials,
                       float* out) {
  const peftkern_attention& a = *p.args;
  const int64_t D = dim.size;
  float* rows = out + (prefix * a.num_kv_heads + kv_head) * a.prefix_len * D;
  memset(rows, 0, sizeof(float) * a.prefix_len * D);
  for (int64_t g = 0; g < p.plan->num_groups; g++) {
    if (p.plan->groups[g].prefix != prefix) continue;
    const float* partial = partials + (g * a.num_kv_heads + kv_head) * a.prefix_len * dim.padded;
    for (int64_t j = 0; j < a.prefix_len; j++)
      for (int64_t d = 0; d < D; d++) rows[j * D + d] += partial[j * dim.padded + d];
  }
}

// dk or dv of a sequence that was split: adds the splits to the first one, in order.
static void sum_splits(const Problem& p, int32_t first_unit, int64_t kv_head, HeadDim dim, float* partials, void* out,
                       const int64_t* stride) {
  const Unit& unit = p.plan->units[first_unit];
  const Sequence& seq = p.plan->sequences[unit.sequence];
  const int64_t split_size = p.plan->max_kv_len * dim.padded;
  float* first = partials + (unit.partial * p.args->num_kv_heads + kv_head) * split_size;
  for (int32_t split = 1; split < unit.splits; split++) {
    const float* next = first + split * p.args->num_kv_heads * split_size;
    for (int64_t i = 0; i < seq.kv_len * dim.padded; i += kLanes) store(first + i, load(first + i) + load(next + i));
  }
  store_sequence(p, seq, kv_head, dim, first, out, stride);
}

static void sum_small(const Problem& p, const peftkern_attention_backward& b, const Partials& partials) {
  const peftkern_attention& a = *p.args;
  for (int64_t head = 0; head < a.num_heads; head++) {
    double dsink = 0.0, dgate = 0.0;
    for (int64_t g = 0; g < p.plan->num_groups; g++) {
      if (b.dsinks) dsink += partials.dsinks[g * a.num_heads + head];
      if (b.dgate) dgate += partials.dgate[g * a.num_heads + head];
    }
    if (b.dsinks) b.dsinks[head] = (float)dsink;
    if (b.dgate) b.dgate[head] = (float)dgate;
  }
  if (!b.dprefix_bias) return;
  const int64_t heads = b.prefix_bias_size[0], keys = b.prefix_bias_size[1];
  for (int64_t i = 0; i < heads * keys; i++) {
    double sum = 0.0;
    for (int64_t g = 0; g < p.plan->num_groups; g++)
      for (int64_t head = 0; head < a.num_heads; head++)
        for (int64_t j = 0; j < a.prefix_len; j++)
          if ((heads == 1 || head == i / keys) && (keys == 1 || j == i % keys))
            sum += partials.dprefix_bias[(g * a.num_heads + head) * a.prefix_len + j];
    b.dprefix_bias[i] = (float)sum;
  }
}

// dbias is summed over every dimension along which bias is broadcast, so its tasks are cut along the other dimensions.
// They recompute the weights and their gradients. Trained biases are rare, so the main pass does not pay for them.
static void bias_tasks(const Problem& p, const peftkern_attention_backward& b, BackwardScratch& s) {
  const peftkern_attention& a = *p.args;
  const Plan& plan = *p.plan;
  Needs needs{};
  needs.dbias = true;
  const Sums none{};
  const int64_t* size = b.bias_size;
  const int64_t sequences = a.cu_seqlens ? plan.num_sequences : a.batch;
  const int64_t outer =
      size[2] > 1 && a.cu_seqlens ? sequences : size[0];  // sequences or samples that have a bias of their own
  const int64_t heads = size[1] == 1 ? 1 : a.num_kv_heads;
  int64_t blocks = 1;
  if (size[2] > 1) {
    for (int64_t i = 0; i < plan.num_sequences; i++) blocks = max(blocks, num_position_blocks(plan, plan.sequences[i]));
  }
#pragma omp for schedule(dynamic, 1)
  for (int64_t task = 0; task < outer * heads * blocks; task++) {
    const int64_t block = task % blocks, head = task / blocks % heads, sample = task / blocks / heads;
    for (int64_t i = 0; i < sequences; i++) {
      const Sequence& seq = plan.sequences[i];
      if (outer > 1 && i != sample && outer == sequences) continue;
      for (int64_t h = heads == 1 ? 0 : head; h < (heads == 1 ? a.num_kv_heads : head + 1); h++)
        backward_blocks(p, needs, b, seq, h, block, size[2] > 1 ? (int64_t)1 << 40 : 1, s, none, b.dbias);
    }
  }
}

Needs needs_of(const peftkern_attention_backward& b) {
  return {b.dq != nullptr,        b.dk != nullptr,           b.dv != nullptr,
          b.dprefix_k != nullptr, b.dprefix_v != nullptr,    b.dsinks != nullptr,
          b.dbias != nullptr,     b.dprefix_bias != nullptr, b.dgate != nullptr};
}

int attention_backward(const peftkern_attention_backward& b, const Plan& plan) {
  const peftkern_attention& args = b.forward;
  Problem problem = make_problem(args, plan, true);
#if PEFTKERN_HAS_PAIRS
  use_pairs(problem);
#endif
  const Needs needs = needs_of(b);
  Needs main = needs;
  main.dbias = false;
  const int64_t kv_heads = args.num_kv_heads, num_tasks = plan.num_groups * kv_heads;
  const int num_threads = (int)max(1, args.num_threads);

  float *packed_k = nullptr, *packed_v = nullptr;
  BackwardScratch unused;
  Arena size{nullptr, 0};
  take_backward_scratch(problem, needs, size, unused);
  const size_t per_thread = size.used;
  take_packed_prefixes(problem, size, packed_k, packed_v);
  take_partials(problem, needs, size);
  char* base = static_cast<char*>(acquire_scratch(size.used + per_thread * (num_threads - 1)));
  if (!base) return PEFTKERN_OUT_OF_MEMORY;
  Arena shared{base, 0};
  take_packed_prefixes(problem, shared, packed_k, packed_v);
  problem.prefix_k = packed_k;
  problem.prefix_v = packed_v;
  const Partials partials = take_partials(problem, needs, shared);
  int64_t bias_elements = 1;
  for (int i = 0; i < 4; i++) bias_elements *= b.bias_size[i];
  if (b.dbias) memset(b.dbias, 0, sizeof(float) * bias_elements);

  run_by_threads(num_threads, [&] {
    BackwardScratch s;
    Arena own{base + shared.used + per_thread * omp_get_thread_num(), 0};
    take_backward_scratch(problem, needs, own, s);
#if PEFTKERN_HAS_AMX
    const TileScope scope(problem.amx);
#endif
    pack_prefixes(problem, packed_k, packed_v);
#pragma omp for schedule(dynamic, 1)  // FAULT: partial-sums-read-early
    for (int64_t task = 0; task < num_tasks; task++)
      backward_group(problem, main, b, task / kv_heads, task % kv_heads, s, partials);
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < args.bank_size * kv_heads; i++) {
      const int64_t prefix = i / kv_heads, head = i % kv_heads;
      if (needs.dprefix_k) sum_prefix(problem, prefix, head, problem.k_dim, partials.dprefix_k, b.dprefix_k);
      if (needs.dprefix_v) sum_prefix(problem, prefix, head, problem.v_dim, partials.dprefix_v, b.dprefix_v);
    }
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < plan.num_units * kv_heads; i++) {
      const int32_t unit = (int32_t)(i / kv_heads);
      if (plan.units[unit].splits == 1 || plan.units[unit].split != 0) continue;
      if (needs.dk) sum_splits(problem, unit, i % kv_heads, problem.k_dim, partials.dk, b.dk, b.dk_stride);
      if (needs.dv) sum_splits(problem, unit, i % kv_heads, problem.v_dim, partials.dv, b.dv, b.dv_stride);
    }
#pragma omp master
    sum_small(problem, b, partials);
    if (needs.dbias) bias_tasks(problem, b, s);
  });
  return PEFTKERN_OK;
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif  // PEFTKERN_CPU_ATTENTION_BACKWARD_H_
