// SPDX-License-Identifier: Apache-2.0
// Forward of a few queries per sample against many keys. The rows of all samples that see one prefix are packed
// together against it, so that it is read once instead of once per sample. Keys are cut into chunks for the threads.
// The partial results are joined by their m and sums.
#ifndef PEFTKERN_CPU_ATTENTION_DECODE_H_
#define PEFTKERN_CPU_ATTENTION_DECODE_H_

#include "attention_forward.h"

namespace peftkern {
namespace PEFTKERN_ISA {

// Partial results per row (sample, head, position) and chunk of keys. The prefix's chunks come first.
struct PartialRows {
  float *out, *m, *sum;
  int64_t prefix_chunks, chunks;

  int64_t index(const Problem& p, const Block& block, int64_t r, int64_t chunk) const {
    const peftkern_attention& a = *p.args;
    return ((block.sample[r] * a.num_heads + block.head[r]) * a.q_len + block.row[r]) * chunks + chunk;
  }
};

static PartialRows take_partial_rows(const Problem& p, Arena& arena) {
  const peftkern_attention& a = *p.args;
  PartialRows x;
  x.prefix_chunks = (p.plan->max_prefix_len + kDecodeKeys - 1) / kDecodeKeys;
  x.chunks = x.prefix_chunks + (a.kv_len + kDecodeKeys - 1) / kDecodeKeys;
  const int64_t count = a.batch * a.num_heads * a.q_len * x.chunks;
  x.out = arena.take<float>(count * p.v_dim.padded);
  x.m = arena.take<float>(count);
  x.sum = arena.take<float>(count);
  return x;
}

static void store_partial_rows(const Problem& p, const ForwardScratch& s, int64_t chunk, const PartialRows& partial) {
  const int64_t dim = p.v_dim.padded;
  for (int64_t r = 0; r < s.block.count; r++) {
    const int64_t at = partial.index(p, s.block, r, chunk);
    partial.m[at] = s.m[r];
    partial.sum[at] = s.sum[r];
    if (!s.empty) memcpy(partial.out + at * dim, s.out + r * dim, sizeof(float) * dim);
  }
}

// Attention of rows [first, first + kBlockM) of a group to one chunk of the group's prefix.
static void decode_prefix(const Problem& p, const Group& group, int64_t kv_head, int64_t first, int64_t chunk,
                          ForwardScratch& s, const PartialRows& partial) {
  const peftkern_attention& a = *p.args;
  const int64_t G = p.plan->group_size, rows_each = a.q_len * G;
  const Sequence& some = p.plan->sequences[p.plan->units[group.first].sequence];
  start_block(s.block, min(kBlockM, group.count * rows_each - first), p.row_step);
  for (int64_t r = 0; r < s.block.vectors * kLanes; r++) {
    const int64_t row = first + min(r, s.block.count - 1), i = row % rows_each;
    const Sequence& seq = p.plan->sequences[p.plan->units[group.first + row / rows_each].sequence];
    set_row(p, seq, i / G, kv_head * G + i % G, r, s.block);
  }
  finish_block(s.block);
  load_queries(p, s);
  reset_softmax(p, s, false);
  const int64_t end = min(some.prefix_len, (chunk + 1) * kDecodeKeys);
  for (int64_t begin = chunk * kDecodeKeys; begin < end; begin += kBlockN) {
    const int64_t n = min(kBlockN, end - begin);
    if (begin + n <= s.block.prefix_low_min) continue;
    widen_prefix(p, some.prefix, kv_head, begin, n, s.tiles.k, s.tiles.v);
    const Rows k{s.tiles.k, p.k_dim.padded, p.k_dim}, v{s.tiles.v, p.v_dim.padded, p.v_dim};
    add_tile(p, some, s, kPrefix, SequenceTiles::with_by_key(p, k, v), begin, n);
  }
  store_partial_rows(p, s, chunk, partial);
}

// Attention of all rows of a sequence to one chunk of its own keys.
static void decode_sequence(const Problem& p, const Sequence& seq, int64_t kv_head, int64_t chunk, ForwardScratch& s,
                            const PartialRows& partial) {
  const int64_t G = p.plan->group_size;
  start_block(s.block, seq.q_len * G, p.row_step);
  for (int64_t r = 0; r < s.block.vectors * kLanes; r++) {
    const int64_t row = min(r, s.block.count - 1);
    set_row(p, seq, row / G, kv_head * G + row % G, r, s.block);
  }
  finish_block(s.block);
  load_queries(p, s);
  reset_softmax(p, s, false);
  s.tiles.open(seq, kv_head, false);
  const TileRange range = tiles_of(seq, s.block, kSequence);
  const int64_t end = min(range.end, (chunk + 1) * kDecodeKeys);
  for (int64_t begin = max(range.begin, chunk * kDecodeKeys); begin < end; begin += kBlockN) {
    const int64_t n = min(kBlockN, end - begin);
    add_tile(p, seq, s, kSequence, s.tiles.get(p, begin, n), begin, n);
  }
  store_partial_rows(p, s, partial.prefix_chunks + chunk, partial);
}

// Joins the chunks of the row in lane 0; skips chunks of which it sees no key.
static void join_row(const Problem& p, const Sequence& seq, ForwardScratch& s, const PartialRows& partial) {
  const peftkern_attention& a = *p.args;
  const int64_t dim = p.v_dim.padded, head = s.block.head[0];
  const int64_t prefix_chunks = (seq.prefix_len + kDecodeKeys - 1) / kDecodeKeys;
  const float sink = a.sinks ? a.sinks[head] * (float)kLog2e : -kInf;
  float m = sink;
  for (int64_t chunk = 0; chunk < partial.chunks; chunk++) {
    if (chunk >= prefix_chunks && chunk < partial.prefix_chunks) continue;
    const float other = partial.m[partial.index(p, s.block, 0, chunk)];
    m = other > m || other != other ? other : m;
  }
  float sum = sink == -kInf ? 0.0f : std::exp2(sink - m);
  memset(s.out, 0, sizeof(float) * dim);
  for (int64_t chunk = 0; chunk < partial.chunks; chunk++) {
    if (chunk >= prefix_chunks && chunk < partial.prefix_chunks) continue;
    const int64_t at = partial.index(p, s.block, 0, chunk);
    if (partial.sum[at] == 0.0f) continue;
    const float weight = std::exp2(partial.m[at] - m);
    sum += partial.sum[at] * weight;
    for (int64_t d = 0; d < dim; d += kLanes)
      store(s.out + d, load(s.out + d) + load(partial.out + at * dim + d) * weight);
  }
  s.m[0] = m;
  s.sum[0] = sum;
  float lse[kBlockM];
  log_sums(s.block, s.m, s.sum, lse);
  store_row(p, s.block, 0, s.out, reciprocal(sum), lse[0]);
}

int attention_decode(const peftkern_attention& args, const Plan& plan) {
  Problem problem = make_problem(args, plan, false);
  const int64_t kv_heads = args.num_kv_heads, rows_each = args.q_len * plan.group_size;
  const int num_threads = (int)max(1, args.num_threads);
  Arena size{nullptr, 0};
  ForwardScratch unused;
  take_forward_scratch(problem, kBlockN, size, unused);
  const size_t per_thread = size.used;
  take_partial_rows(problem, size);
  char* base = static_cast<char*>(acquire_scratch(size.used + per_thread * (num_threads - 1)));
  if (!base) return PEFTKERN_OUT_OF_MEMORY;
  Arena shared{base, 0};
  const PartialRows partial = take_partial_rows(problem, shared);
  int64_t blocks = 0;
  for (int32_t g = 0; g < plan.num_groups; g++)
    blocks = max(blocks, (plan.groups[g].count * rows_each + kBlockM - 1) / kBlockM);
  const int64_t chunks = partial.chunks - partial.prefix_chunks;

  run_by_threads(num_threads, [&] {
    ForwardScratch s;
    Arena own{base + shared.used + per_thread * omp_get_thread_num(), 0};
    take_forward_scratch(problem, kBlockN, own, s);
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t task = 0; task < plan.num_groups * kv_heads * partial.prefix_chunks * blocks; task++) {
      const int64_t block = task % blocks, chunk = task / blocks % partial.prefix_chunks;
      const int64_t at = task / blocks / partial.prefix_chunks;
      const Group& group = plan.groups[at / kv_heads];
      const Sequence& some = plan.sequences[plan.units[group.first].sequence];
      if (block * kBlockM < group.count * rows_each && chunk * kDecodeKeys < some.prefix_len)
        decode_prefix(problem, group, at % kv_heads, block * kBlockM, chunk, s, partial);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < plan.num_units * kv_heads * chunks; task++) {
      const int64_t at = task / chunks;
      decode_sequence(problem, plan.sequences[plan.units[at / kv_heads].sequence], at % kv_heads, task % chunks, s,
                      partial);
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < args.batch * args.num_heads * args.q_len; row++) {
      const Sequence& seq = plan.sequences[row / args.q_len / args.num_heads];
      start_block(s.block, 1, problem.row_step);
      set_row(problem, seq, row % args.q_len, row / args.q_len % args.num_heads, 0, s.block);
      join_row(problem, seq, s, partial);
    }
  });
  return PEFTKERN_OK;
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif  // PEFTKERN_CPU_ATTENTION_DECODE_H_
