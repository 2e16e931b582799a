// SPDX-License-Identifier: Apache-2.0
// Forward: each block of rows walks the tiles of the prefix and then those of the sequence.
#ifndef PEFTKERN_CPU_FORWARD_FORWARD_H_
#define PEFTKERN_CPU_FORWARD_FORWARD_H_

#include <omp.h>

#include "softmax.h"

namespace peftkern {
namespace PEFTKERN_ISA {

// A task of the forward: the blocks of a unit's rows that read one kv head.
template <typename L>
struct ForwardTask {
  const Problem<L>& p;
  const PackedPrefixes<L>& prefixes;
  ForwardScratch<L>& s;
  Target target;

  void walk(Part part) const {
    const TileRange range = tiles_of(target.seq, s.block, part);
    for (int64_t begin = range.begin; begin < range.end; begin += kBlockN)
      add_tile(p, target.seq, s, tile_span(s.block, part, range, begin),
               part == kPrefix ? prefixes.tile(p, target, begin) : s.tiles.get(p, begin));
    if (!s.empty && (part == kSequence || p.args->gate)) L::finish_sums(s.block, p.v_dim, s.sums, s.out);
  }

  void block() const {
    const peftkern_attention& a = *p.args;
    const int64_t dim = p.v_dim.padded;
    L::load_panel(p, s.block, p.q(), s.rows, s.panel);
    reset_softmax(p, s, !a.gate);
    walk(kPrefix);
    if (a.gate) {
      for (int64_t r = 0; r < s.block.count; r++) {
        const float weight = s.empty ? 0.0f : std::tanh(a.gate[s.block.head[r]]) * reciprocal(s.sum[r]);
        for (int64_t d = 0; d < dim; d += kLanes)
          store(s.prefix_out + r * dim + d, s.empty ? zero() : load(s.out + r * dim + d) * weight);
      }
      reset_softmax(p, s, true);
    }
    walk(kSequence);
    if (s.empty) memset(s.out, 0, sizeof(float) * s.block.count * dim);
    float lse[kBlockM];
    log_sums(s.block, s.m, s.sum, lse);
    for (int64_t r = 0; r < s.block.count; r++) {
      float* row = s.out + r * dim;
      float factor = reciprocal(s.sum[r]);
      if (a.gate) {
        for (int64_t d = 0; d < dim; d += kLanes)
          store(row + d, load(row + d) * factor + load(s.prefix_out + r * dim + d));
        factor = 1.0f;
      }
      store_row(p, s.block, r, row, factor, lse[r]);
    }
  }

  void run(const Unit& unit) const {
    const Plan& plan = *p.plan;
    const int64_t blocks = num_position_blocks(plan, target.seq);
    s.tiles.open(p, target, blocks * (plan.group_size / plan.heads_per_block) > unit.splits);
    for (int64_t b = unit.split; b < blocks; b += unit.splits) {
      prefetch_rows(p, target, b + unit.splits, p.q());
      for (int64_t head = 0; head < plan.group_size; head += plan.heads_per_block) {
        make_block(p, target, b, head, s.block);
        block();
      }
    }
  }
};

// Runs a body that shares its loops among the threads of a team. One thread runs it without a team: the barriers of a
// team make a system call each, which takes as long as a small kernel.
template <typename Body>
static void run_by_threads(int num_threads, const Body& body) {
  if (num_threads == 1 && !omp_in_parallel()) {
    body();
    return;
  }
#pragma omp parallel num_threads(num_threads)
  body();
}

template <typename L>
static int forward(const peftkern_attention& args, const Plan& plan) {
  const Problem<L> problem(args, plan, false);
  const int64_t num_tasks = plan.num_units * args.num_kv_heads;
  const int num_threads = (int)max(1, min(args.num_threads, num_tasks));

  const int64_t length = all_in_place(problem) ? 0 : round_up(plan.max_kv_len, kBlockN);
  Arena size{nullptr, 0};
  ForwardScratch<L>().take(problem, length, size);
  const size_t per_thread = size.used;
  PackedPrefixes<L> prefixes;
  prefixes.take(problem, size);
  char* base = static_cast<char*>(acquire_scratch(size.used + per_thread * (num_threads - 1)));
  if (!base) return PEFTKERN_OUT_OF_MEMORY;
  Arena shared{base, 0};
  prefixes.take(problem, shared);

  run_by_threads(num_threads, [&] {
    ForwardScratch<L> s;
    Arena own{base + shared.used + per_thread * omp_get_thread_num(), 0};
    s.take(problem, length, own);
    [[maybe_unused]] const typename L::Scope scope{};
    prefixes.pack(problem);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < num_tasks; task++) {
      const Unit& unit = plan.units[task / args.num_kv_heads];
      const Target target{plan.sequences[unit.sequence], task % args.num_kv_heads};
      ForwardTask<L>{problem, prefixes, s, target}.run(unit);
    }
  });
  return PEFTKERN_OK;
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif  // PEFTKERN_CPU_FORWARD_FORWARD_H_
