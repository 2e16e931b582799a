// SPDX-License-Identifier: Apache-2.0
// Forward of a few queries per sample against many keys. The rows of all samples that see one prefix are packed
// together against it, so that it is read once instead of once per sample. Keys are cut into chunks for the threads.
// The partial results are joined by their m and sums.
#ifndef PEFTKERN_CPU_FORWARD_DECODE_H_
#define PEFTKERN_CPU_FORWARD_DECODE_H_

#include "forward.h"

namespace peftkern {
namespace PEFTKERN_ISA {

// Partial results per row (sample, head, position) and chunk of keys. The prefix's chunks come first.
struct PartialRows {
  float *out, *m, *sum;
  int64_t prefix_chunks, chunks;

  int64_t index(const Call& p, const Block& block, int64_t r, int64_t chunk) const {
    const peftkern_attention& a = *p.args;
    return ((block.sample[r] * a.num_heads + block.head[r]) * a.q_len + block.row[r]) * chunks + chunk;
  }

  void take(const Call& p, Arena& arena) {
    const peftkern_attention& a = *p.args;
    prefix_chunks = (p.plan->max_prefix_len + kDecodeKeys - 1) / kDecodeKeys;
    chunks = prefix_chunks + (a.kv_len + kDecodeKeys - 1) / kDecodeKeys;
    const int64_t count = a.batch * a.num_heads * a.q_len * chunks;
    out = arena.take<float>(count * p.v_dim.padded);
    m = arena.take<float>(count);
    sum = arena.take<float>(count);
  }
};

// The tasks of one thread.
template <typename L>
struct Decoder {
  const Problem<L>& p;
  const PartialRows& partial;
  ForwardScratch<L>& s;

  // Attention of rows [first, first + kBlockM) of a group to one chunk of the group's prefix.
  void prefix_chunk(const Group& group, int64_t kv_head, int64_t first, int64_t chunk) {
    const Plan& plan = *p.plan;
    const int64_t G = plan.group_size, rows_each = p.args->q_len * G;
    start_block(s.block, min(kBlockM, group.count * rows_each - first));
    for (int64_t r = 0; r < s.block.vectors * kLanes; r++) {
      const int64_t row = first + min(r, s.block.count - 1), i = row % rows_each;
      const Sequence& seq = plan.sequences[plan.units[group.first + row / rows_each].sequence];
      set_row(p, seq, i / G, kv_head * G + i % G, r, s.block);
    }
    const Target target{plan.sequences[plan.units[group.first].sequence], kv_head};
    s.tiles.open_prefix(p, target);
    add_chunk(target.seq, kPrefix, chunk, chunk);
  }

  // Attention of all rows of a sequence to one chunk of its own keys.
  void sequence_chunk(const Target& target, int64_t chunk) {
    const int64_t G = p.plan->group_size;
    start_block(s.block, target.seq.q_len * G);
    for (int64_t r = 0; r < s.block.vectors * kLanes; r++) {
      const int64_t row = min(r, s.block.count - 1);
      set_row(p, target.seq, row / G, target.kv_head * G + row % G, r, s.block);
    }
    s.tiles.open(p, target, false);
    add_chunk(target.seq, kSequence, chunk, partial.prefix_chunks + chunk);
  }

  // Joins the chunks of the row; skips chunks of which it sees no key.
  void join(const Sequence& seq, int64_t position, int64_t head) {
    const int64_t dim = p.v_dim.padded;
    start_block(s.block, 1);
    set_row(p, seq, position, head, 0, s.block);
    const int64_t prefix_chunks = (seq.prefix_len + kDecodeKeys - 1) / kDecodeKeys;
    const float sink = p.args->sinks ? sink_score(p.args->sinks[head]) : -kInf;
    float m = sink;
    for (int64_t chunk = 0; chunk < partial.chunks; chunk++) {
      if (chunk >= prefix_chunks && chunk < partial.prefix_chunks) continue;
      const float other = partial.m[partial.index(p, s.block, 0, chunk)];
      m = other > m || other != other ? other : m;
    }
    float sum = sink == -kInf ? 0.0f : sink == kInf ? 1.0f : std::exp2(sink - m);
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

 private:
  // Attention of the block's rows to a chunk of a part, whose tiles are open. `at` is the index among all chunks.
  void add_chunk(const Sequence& seq, Part part, int64_t chunk, int64_t at) {
    finish_block(s.block);
    L::load_panel(p, s.block, p.q(), s.rows, s.panel);
    reset_softmax(p, s, false);
    const TileRange range = tiles_of(seq, s.block, part);
    const int64_t end = min(range.end, (chunk + 1) * kDecodeKeys);
    for (int64_t begin = max(range.begin, chunk * kDecodeKeys); begin < end; begin += kBlockN)
      add_tile(p, seq, s, tile_span(s.block, part, {0, end}, begin), s.tiles.get(p, begin));
    if (!s.empty) L::finish_sums(s.block, p.v_dim, s.sums, s.out);
    store_partial(at);
  }

  void store_partial(int64_t chunk) {
    const int64_t dim = p.v_dim.padded;
    for (int64_t r = 0; r < s.block.count; r++) {
      const int64_t at = partial.index(p, s.block, r, chunk);
      partial.m[at] = s.m[r];
      partial.sum[at] = s.sum[r];
      if (!s.empty) memcpy(partial.out + at * dim, s.out + r * dim, sizeof(float) * dim);
    }
  }
};

template <typename L>
static int decode(const peftkern_attention& args, const Plan& plan) {
  const Problem<L> problem(args, plan, false);
  const int64_t kv_heads = args.num_kv_heads, rows_each = args.q_len * plan.group_size;
  const int num_threads = (int)max(1, args.num_threads);
  Arena size{nullptr, 0};
  ForwardScratch<L>().take(problem, kBlockN, size);
  const size_t per_thread = size.used;
  PartialRows partial;
  partial.take(problem, size);
  char* base = static_cast<char*>(acquire_scratch(size.used + per_thread * (num_threads - 1)));
  if (!base) return PEFTKERN_OUT_OF_MEMORY;
  Arena shared{base, 0};
  partial.take(problem, shared);
  int64_t blocks = 0;
  for (int32_t g = 0; g < plan.num_groups; g++)
    blocks = max(blocks, (plan.groups[g].count * rows_each + kBlockM - 1) / kBlockM);
  const int64_t chunks = partial.chunks - partial.prefix_chunks;

  run_by_threads(num_threads, [&] {
    ForwardScratch<L> s;
    Arena own{base + shared.used + per_thread * omp_get_thread_num(), 0};
    s.take(problem, kBlockN, own);
    [[maybe_unused]] const typename L::Scope scope{};
    Decoder<L> decoder{problem, partial, s};
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t task = 0; task < plan.num_groups * kv_heads * partial.prefix_chunks * blocks; task++) {
      const int64_t block = task % blocks, chunk = task / blocks % partial.prefix_chunks;
      const int64_t at = task / blocks / partial.prefix_chunks;
      const Group& group = plan.groups[at / kv_heads];
      const Sequence& some = plan.sequences[plan.units[group.first].sequence];
      if (block * kBlockM < group.count * rows_each && chunk * kDecodeKeys < some.prefix_len)
        decoder.prefix_chunk(group, at % kv_heads, block * kBlockM, chunk);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < plan.num_units * kv_heads * chunks; task++) {
      const int64_t at = task / chunks;
      decoder.sequence_chunk({plan.sequences[plan.units[at / kv_heads].sequence], at % kv_heads}, task % chunks);
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < args.batch * args.num_heads * args.q_len; row++)
      decoder.join(plan.sequences[row / args.q_len / args.num_heads], row % args.q_len,
                   row / args.q_len % args.num_heads);
  });
  return PEFTKERN_OK;
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif  // PEFTKERN_CPU_FORWARD_DECODE_H_
