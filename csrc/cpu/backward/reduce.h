// SPDX-License-Identifier: Apache-2.0
// The tasks of the backward, and the ordered sums over tasks. A task is a group of sequences that see the same prefix,
// and one kv head.
#ifndef PEFTKERN_CPU_BACKWARD_REDUCE_H_
#define PEFTKERN_CPU_BACKWARD_REDUCE_H_

#include <omp.h>

#include "../forward/forward.h"
#include "block.h"

namespace peftkern {
namespace PEFTKERN_ISA {

// Where dk or dv goes.
struct KeyGradient {
  void* data;
  const int64_t* stride;
  HeadDim dim;
};

// Writes the fp32 rows [kv_len, dim.padded] of one sequence and kv head to dk or dv.
static void store_sequence(const Call& p, const Target& target, const KeyGradient& to, const float* rows) {
  const Sequence& seq = target.seq;
  for (int64_t t = 0; t < seq.kv_len; t++) {
    const int64_t at = seq.batch * to.stride[0] + target.kv_head * to.stride[1] + (seq.start + t) * to.stride[2];
    narrow_row(rows + t * to.dim.padded, 1.0f, to.dim.size, p.args->dtype,
               const_cast<char*>(offset(to.data, p.args->dtype, at)));
  }
}

// The partial sums of the tasks, one per group and kv head. The ordered sums follow.
template <typename L>
struct Partials {
  const BackwardProblem<L>& p;
  float *dprefix_k, *dprefix_v;  // [groups, num_kv_heads, prefix_len, dim.padded]
  float* dprefix_bias;           // [groups, num_heads, prefix_len]
  double *dsinks, *dgate;        // [groups, num_heads]
  float *dk, *dv;                // [partials, num_kv_heads, max_kv_len, dim.padded]

  explicit Partials(const BackwardProblem<L>& problem) : p(problem) {}

  void take(Arena& arena) {
    const peftkern_attention& a = *p.args;
    const Needs& needs = p.needs;
    const int64_t groups = p.plan->num_groups;
    const int64_t prefix = groups * a.num_kv_heads * a.prefix_len;  // rows
    const int64_t partial = p.plan->num_partials * a.num_kv_heads * p.plan->max_kv_len;
    dprefix_k = arena.take<float>(needs.dprefix_k ? prefix * p.k_dim.padded : 0);
    dprefix_v = arena.take<float>(needs.dprefix_v ? prefix * p.v_dim.padded : 0);
    dprefix_bias = arena.take<float>(needs.dprefix_bias ? groups * a.num_heads * a.prefix_len : 0);
    dsinks = arena.take<double>(needs.dsinks ? groups * a.num_heads : 0);
    dgate = arena.take<double>(needs.dgate ? groups * a.num_heads : 0);
    dk = arena.take<float>(needs.dk ? partial * p.k_dim.padded : 0);
    dv = arena.take<float>(needs.dv ? partial * p.v_dim.padded : 0);
  }

  // The sums of a group and kv head, cleared; those of the sequence follow.
  Sums start(int64_t group, int64_t kv_head) const {
    const peftkern_attention& a = *p.args;
    const Needs& needs = p.needs;
    const int64_t at = group * a.num_kv_heads + kv_head, G = p.plan->group_size, prefix = a.prefix_len;
    Sums sums{};
    if (needs.dprefix_k) sums.dprefix_k = cleared(dprefix_k + at * prefix * p.k_dim.padded, prefix * p.k_dim.padded);
    if (needs.dprefix_v) sums.dprefix_v = cleared(dprefix_v + at * prefix * p.v_dim.padded, prefix * p.v_dim.padded);
    if (needs.dprefix_bias) sums.dprefix_bias = cleared(dprefix_bias + at * G * prefix, G * prefix);
    if (needs.dsinks) sums.dsinks = cleared(dsinks + at * G, G);
    if (needs.dgate) sums.dgate = cleared(dgate + at * G, G);
    return sums;
  }

  // Where a unit's dk or dv is summed, cleared: in the thread's memory, or among the partial sums if it is split.
  float* start_keys(const Unit& unit, const Target& target, HeadDim dim, float* own, float* partials) const {
    const int64_t first = (unit.partial * p.args->num_kv_heads + target.kv_head) * p.plan->max_kv_len;
    return cleared(unit.splits > 1 ? partials + first * dim.padded : own, target.seq.kv_len * dim.padded);
  }

  // dprefix_x[bank, kv_head] = the sum over the groups that see this prefix, in order.
  void sum_prefix(int64_t prefix, int64_t kv_head, HeadDim dim, const float* partials, float* out) const {
    const peftkern_attention& a = *p.args;
    float* rows = cleared(out + (prefix * a.num_kv_heads + kv_head) * a.prefix_len * dim.size, a.prefix_len * dim.size);
    for (int64_t g = 0; g < p.plan->num_groups; g++) {
      if (p.plan->groups[g].prefix != prefix) continue;
      const float* partial = partials + (g * a.num_kv_heads + kv_head) * a.prefix_len * dim.padded;
      for (int64_t j = 0; j < a.prefix_len; j++)
        for (int64_t d = 0; d < dim.size; d++) rows[j * dim.size + d] += partial[j * dim.padded + d];
    }
  }

  // dk or dv of a sequence that was split: adds the splits to the first one, in order.
  void sum_splits(const Unit& unit, int64_t kv_head, float* partials, const KeyGradient& to) const {
    const Target target{p.plan->sequences[unit.sequence], kv_head};
    const int64_t split_size = p.plan->max_kv_len * to.dim.padded;
    float* first = partials + (unit.partial * p.args->num_kv_heads + kv_head) * split_size;
    for (int32_t split = 1; split < unit.splits; split++) {
      const float* next = first + split * p.args->num_kv_heads * split_size;
      for (int64_t i = 0; i < target.seq.kv_len * to.dim.padded; i += kLanes)
        store(first + i, load(first + i) + load(next + i));
    }
    store_sequence(p, target, to, first);
  }

  void sum_small() const {
    const peftkern_attention& a = *p.args;
    const peftkern_attention_backward& b = p.gradients;
    for (int64_t head = 0; head < a.num_heads; head++) {
      double dsink = 0.0, gate = 0.0;
      for (int64_t g = 0; g < p.plan->num_groups; g++) {
        if (b.dsinks) dsink += dsinks[g * a.num_heads + head];
        if (b.dgate) gate += dgate[g * a.num_heads + head];
      }
      if (b.dsinks) b.dsinks[head] = (float)dsink;
      if (b.dgate) b.dgate[head] = (float)gate;
    }
    if (!b.dprefix_bias) return;
    const int64_t heads = b.prefix_bias_size[0], keys = b.prefix_bias_size[1];
    for (int64_t i = 0; i < heads * keys; i++) {
      double sum = 0.0;
      for (int64_t g = 0; g < p.plan->num_groups; g++)
        for (int64_t head = 0; head < a.num_heads; head++)
          for (int64_t j = 0; j < a.prefix_len; j++)
            if ((heads == 1 || head == i / keys) && (keys == 1 || j == i % keys))
              sum += dprefix_bias[(g * a.num_heads + head) * a.prefix_len + j];
      b.dprefix_bias[i] = (float)sum;
    }
  }

 private:
  template <typename T>
  static T* cleared(T* x, int64_t count) {
    return static_cast<T*>(memset(x, 0, sizeof(T) * count));
  }
};

// The memory of one thread, and what the threads share.
template <typename L>
struct BackwardThread {
  const BackwardProblem<L>& p;
  const PackedPrefixes<L>& prefixes;
  const Partials<L>& partials;
  BackwardScratch<L>& s;

  KeyGradient dk() const { return {p.gradients.dk, p.gradients.dk_stride, p.k_dim}; }
  KeyGradient dv() const { return {p.gradients.dv, p.gradients.dv_stride, p.v_dim}; }

  // All gradients but that of the bias.
  void run_group(int64_t group, int64_t kv_head) const {
    const Plan& plan = *p.plan;
    Sums sums = partials.start(group, kv_head);
    for (int32_t i = 0; i < plan.groups[group].count; i++) {
      const Unit& unit = plan.units[plan.groups[group].first + i];
      const Target target{plan.sequences[unit.sequence], kv_head};
      if (p.needs.dk) sums.dk = partials.start_keys(unit, target, p.k_dim, s.dk, partials.dk);
      if (p.needs.dv) sums.dv = partials.start_keys(unit, target, p.v_dim, s.dv, partials.dv);
      backward_blocks(BackwardTask<L>{p, prefixes, s, target, sums}, unit.split, unit.splits);
      if (unit.splits > 1) continue;
      if (p.needs.dk) store_sequence(p, target, dk(), s.dk);
      if (p.needs.dv) store_sequence(p, target, dv(), s.dv);
    }
  }

  void sum_unit(const Unit& unit, int64_t kv_head) const {
    if (unit.splits == 1 || unit.split != 0) return;
    if (p.needs.dk) partials.sum_splits(unit, kv_head, partials.dk, dk());
    if (p.needs.dv) partials.sum_splits(unit, kv_head, partials.dv, dv());
  }

  void sum_prefix(int64_t prefix, int64_t kv_head) const {
    const peftkern_attention_backward& b = p.gradients;
    if (p.needs.dprefix_k) partials.sum_prefix(prefix, kv_head, p.k_dim, partials.dprefix_k, b.dprefix_k);
    if (p.needs.dprefix_v) partials.sum_prefix(prefix, kv_head, p.v_dim, partials.dprefix_v, b.dprefix_v);
  }
};

// dbias is summed over every dimension along which bias is broadcast, so its tasks are cut along the other dimensions.
// They recompute the weights and their gradients. Trained biases are rare, so the main pass does not pay for them.
template <typename L>
static void run_bias_tasks(const BackwardThread<L>& t) {
  const peftkern_attention& a = *t.p.args;
  const Plan& plan = *t.p.plan;
  Sums sums{};
  sums.dbias = t.p.gradients.dbias;
  const int64_t* size = t.p.gradients.bias_size;
  const bool by_row = size[2] > 1, by_head = size[1] > 1;
  const int64_t sequences = a.cu_seqlens ? plan.num_sequences : a.batch;
  const int64_t outer = by_row && a.cu_seqlens ? sequences : size[0];  // those that have a bias of their own
  const int64_t heads = by_head ? a.num_kv_heads : 1;
  int64_t most = 0;  // blocks of a sequence
  for (int64_t i = 0; i < plan.num_sequences; i++) most = max(most, num_position_blocks(plan, plan.sequences[i]));
  const int64_t blocks = by_row ? most : 1;
#pragma omp for schedule(dynamic, 1)
  for (int64_t task = 0; task < outer * heads * blocks; task++) {
    const int64_t block = task % blocks, head = task / blocks % heads, sample = task / blocks / heads;
    for (int64_t i = 0; i < sequences; i++) {
      if (outer > 1 && i != sample && outer == sequences) continue;
      for (int64_t h = by_head ? head : 0; h < (by_head ? head + 1 : a.num_kv_heads); h++)
        backward_blocks(BackwardTask<L>{t.p, t.prefixes, t.s, {plan.sequences[i], h}, sums}, block, by_row ? most : 1);
    }
  }
}

static Needs needs_of(const peftkern_attention_backward& b) {
  return {b.dq != nullptr,        b.dk != nullptr,           b.dv != nullptr,
          b.dprefix_k != nullptr, b.dprefix_v != nullptr,    b.dsinks != nullptr,
          b.dbias != nullptr,     b.dprefix_bias != nullptr, b.dgate != nullptr};
}

template <typename L>
static int backward(const peftkern_attention_backward& b, const Plan& plan) {
  const peftkern_attention& args = b.forward;
  const Needs needs = needs_of(b);
  Needs main_needs = needs, bias_needs{};
  main_needs.dbias = false;
  bias_needs.dbias = true;
  const BackwardProblem<L> problem(b, plan, needs), main(b, plan, main_needs), bias(b, plan, bias_needs);
  const int64_t kv_heads = args.num_kv_heads, num_tasks = plan.num_groups * kv_heads;
  const int num_threads = (int)max(1, args.num_threads);

  Arena size{nullptr, 0};
  BackwardScratch<L>().take(problem, size);
  const size_t per_thread = size.used;
  PackedPrefixes<L> prefixes;
  Partials<L> partials(main);
  prefixes.take(problem, size);
  partials.take(size);
  char* base = static_cast<char*>(acquire_scratch(size.used + per_thread * (num_threads - 1)));
  if (!base) return PEFTKERN_OUT_OF_MEMORY;
  Arena shared{base, 0};
  prefixes.take(problem, shared);
  partials.take(shared);
  int64_t bias_elements = 1;
  for (int i = 0; i < 4; i++) bias_elements *= b.bias_size[i];
  if (b.dbias) memset(b.dbias, 0, sizeof(float) * bias_elements);

  run_by_threads(num_threads, [&] {
    BackwardScratch<L> s;
    Arena own{base + shared.used + per_thread * omp_get_thread_num(), 0};
    s.take(problem, own);
    [[maybe_unused]] const typename L::Scope scope{};
    const BackwardThread<L> thread{main, prefixes, partials, s};
    prefixes.pack(problem);
#pragma omp for schedule(dynamic, 1)  // FAULT: partial-sums-read-early
    for (int64_t task = 0; task < num_tasks; task++) thread.run_group(task / kv_heads, task % kv_heads);
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < args.bank_size * kv_heads; i++) thread.sum_prefix(i / kv_heads, i % kv_heads);
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < plan.num_units * kv_heads; i++) thread.sum_unit(plan.units[i / kv_heads], i % kv_heads);
#pragma omp master
    partials.sum_small();
    if (needs.dbias) run_bias_tasks(BackwardThread<L>{bias, prefixes, partials, s});
  });
  return PEFTKERN_OK;
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif  // PEFTKERN_CPU_BACKWARD_REDUCE_H_
