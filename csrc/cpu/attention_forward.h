// SPDX-License-Identifier: Apache-2.0
// Forward: per block of rows one walk over the prefix's tiles and then the sequence's, with an online softmax (Milakov and
// Gimelshein 2018; Dao et al. 2022).
#ifndef PEFTKERN_CPU_ATTENTION_FORWARD_H_
#define PEFTKERN_CPU_ATTENTION_FORWARD_H_

#include <omp.h>

#include "attention.h"

namespace peftkern {
namespace PEFTKERN_ISA {

struct ForwardScratch {
  float *q, *q_panel, *scores, *factors, *out, *prefix_out;
  uint32_t *q_pairs, *weight_pairs;
  float pivot[kBlockM], sum[kBlockM], alpha[kBlockM];  // weights are 2^(score - pivot); their sum
  bool empty;  // no tile has been added to out
  SequenceTiles tiles;
  Block block;
};

// `length`: keys that are widened at a time.
static void take_forward_scratch(const Problem& p, int64_t length, Arena& arena, ForwardScratch& s) {
  const int64_t dim = p.padded_dim;
  s.q = arena.take<float>(kBlockM * dim);
  s.q_panel = arena.take<float>(kBlockM * dim);
  s.scores = arena.take<float>(kBlockM * kBlockN);
  s.factors = arena.take<float>(kBlockM * kBlockN);
  s.out = arena.take<float>(kBlockM * dim);
  s.prefix_out = arena.take<float>(p.args->gate ? kBlockM * dim : 0);
  s.q_pairs = arena.take<uint32_t>(p.pairs ? kBlockM * dim / 2 : 0);
  s.weight_pairs = arena.take<uint32_t>(p.pairs ? kBlockM * kBlockN / 2 : 0);
  s.tiles.k = arena.take<float>(length * dim);
  s.tiles.v = arena.take<float>(length * dim);
  s.tiles.ready = arena.take<uint8_t>(p.plan->max_kv_len / kBlockN + 1);
  s.tiles.sequence = nullptr;
}

static void reset_softmax(const Problem& p, ForwardScratch& s, bool with_sink) {
  for (int64_t r = 0; r < kBlockM; r++) {
    s.pivot[r] = -kInf;
    s.sum[r] = 0.0f;
  }
  if (with_sink && p.args->sinks)
    for (int64_t r = 0; r < s.block.count; r++) {
      s.pivot[r] = p.args->sinks[s.block.head[r]] * (float)kLog2e;
      s.sum[r] = s.pivot[r] == -kInf ? 0.0f : 1.0f;
    }
  s.empty = true;
}

// scores -> weights in place; pivot, sum and out follow. The pivot moves only when a score exceeds it by 8, so that most
// tiles leave out untouched: weights stay below 2^8.
static void online_softmax(const Problem& p, ForwardScratch& s, int64_t n, RowRange rows, float factor) {
  bool moved = false;
  for (int64_t r = rows.begin; r < rows.end; r += kLanes) {
    float* scores = s.scores + r;
    vf top[4] = {load(scores), load(scores), load(scores), load(scores)};  // four, for the latency of a maximum
    int64_t k = 1;
    for (; k + 4 <= n; k += 4)
      for (int64_t i = 0; i < 4; i++) top[i] = max(top[i], load(scores + (k + i) * kBlockM));
    for (; k < n; k++) top[0] = max(top[0], load(scores + k * kBlockM));
    const vf best = max(max(top[0], top[1]), max(top[2], top[3])) * factor;
    vf pivot = load(s.pivot + r), sum = load(s.sum + r), alpha = set1(1.0f);
    if (any_greater(best, pivot + 8.0f)) {
      const vf higher = max(pivot, best);
      alpha = exp2(pivot - select(higher == -kInf, zero(), higher));
      sum *= alpha;
      pivot = higher;
      moved = true;
      store(s.pivot + r, pivot);
    }
    store(s.alpha + r, alpha);
    const vf base = select(pivot == -kInf, zero(), pivot);
    vf even = zero(), odd = zero();
    int64_t j = 0;
    for (; j + 2 <= n; j += 2) {
      const vf w0 = exp2(load(scores + j * kBlockM) * factor - base);
      const vf w1 = exp2(load(scores + (j + 1) * kBlockM) * factor - base);
      even += w0;
      odd += w1;
      store(scores + j * kBlockM, w0);
      store(scores + (j + 1) * kBlockM, w1);
    }
    if (j < n) {
      const vf w = exp2(load(scores + j * kBlockM) * factor - base);
      even += w;
      store(scores + j * kBlockM, w);
    }
    store(s.sum + r, sum + (even + odd));
  }
  if (moved && !s.empty)
    for (int64_t r = rows.begin; r < least(rows.end, s.block.count); r++)
      if (s.alpha[r] != 1.0f)
        for (int64_t d = 0; d < p.padded_dim; d += kLanes)
          store(s.out + r * p.padded_dim + d, load(s.out + r * p.padded_dim + d) * s.alpha[r]);
}

// scores [n, rows] = k q^T
static void multiply_keys(const Problem& p, ForwardScratch& s, RowRange rows, const Tile& tile, int64_t n) {
  gemm<false>(n, rows.end - rows.begin, p.head_dim, tile.k, tile.k_stride, s.q_panel + rows.begin, kBlockM,
              s.scores + rows.begin, kBlockM, false);
}

// out (+)= weights^T v
static void multiply_values(const Problem& p, ForwardScratch& s, RowRange rows, const Tile& tile, int64_t n) {
  gemm<true>(least(rows.end, s.block.count) - rows.begin, p.padded_dim, n, s.scores + rows.begin, kBlockM, tile.v,
             tile.v_stride, s.out + rows.begin * p.padded_dim, p.padded_dim, !s.empty);
}

#if PEFTKERN_HAS_PAIRS
static void multiply_keys(const Problem& p, ForwardScratch& s, RowRange rows, const PairTile& tile, int64_t n) {
  gemm<false>(n, rows.end - rows.begin, p.head_dim / 2, tile.k, tile.k_stride, s.q_pairs + rows.begin, kBlockM,
              s.scores + rows.begin, kBlockM, false);
}

static void multiply_values(const Problem& p, ForwardScratch& s, RowRange rows, const PairTile& tile, int64_t n) {
  pair_weights(s.scores, n, rows, s.weight_pairs);
  gemm<true>(least(rows.end, s.block.count) - rows.begin, p.padded_dim, (n + 1) / 2, s.weight_pairs + rows.begin, kBlockM,
             tile.v, tile.v_stride, s.out + rows.begin * p.padded_dim, p.padded_dim, !s.empty);
}
#endif

template <typename AnyTile>
static void add_tile(const Problem& p, const Sequence& seq, ForwardScratch& s, Part part, const AnyTile& tile,
                     int64_t begin, int64_t n) {
  const RowRange rows = rows_of(s.block, part, begin, n);
  const int64_t dim = p.padded_dim, count = least(rows.end, s.block.count) - rows.begin;
  multiply_keys(p, s, rows, tile, n);
  const float factor = finish_scores(p, seq, s.block, part, begin, n, rows, s.scores, nullptr);
  online_softmax(p, s, n, rows, factor);
  if (p.args->dropout_p > 0.0) {
    dropout_factors(p, seq, s.block, part, begin, n, rows, s.factors);
    for (int64_t i = 0; i < n * kBlockM; i += kBlockM)
      for (int64_t r = rows.begin; r < rows.end; r += kLanes)
        store(s.scores + i + r, load(s.scores + i + r) * load(s.factors + i + r));
  }
  if (s.empty && count < s.block.count) {
    memset(s.out, 0, sizeof(float) * s.block.count * dim);
    s.empty = false;
  }
  multiply_values(p, s, rows, tile, n);
  s.empty = false;
}

static void walk(const Problem& p, const Sequence& seq, int64_t kv_head, ForwardScratch& s, Part part) {
  const TileRange range = tiles_of(seq, s.block, part);
  for (int64_t begin = range.begin; begin < range.end; begin += kBlockN) {
    const int64_t n = least(kBlockN, range.end - begin);
    const int64_t all = least(kBlockN, seq.kv_len - begin);
#if PEFTKERN_HAS_PAIRS
    if (p.pairs) {
      const PairTile tile =
          part == kPrefix ? prefix_pairs(p, seq, kv_head, begin) : get_pairs(p, s.tiles, begin, all);
      add_tile(p, seq, s, part, tile, begin, n);
      continue;
    }
#endif
    add_tile(p, seq, s, part, part == kPrefix ? prefix_tile(p, seq, kv_head, begin) : s.tiles.get(p, begin, all), begin,
             n);
  }
}

static void load_queries(const Problem& p, ForwardScratch& s) {
  gather_rows(p, s.block, p.args->q, p.args->q_stride, s.q);
  transpose_rows(p, s.block, s.q, s.q_panel);
#if PEFTKERN_HAS_PAIRS
  if (p.pairs) pair_panel(p, s.block, s.q_panel, s.q_pairs);
#endif
}

static void store_row(const Problem& p, const Block& block, int64_t r, const float* row, float factor, float pivot,
                      float sum) {
  const peftkern_attention& a = *p.args;
  const int64_t sample = block.sample[r], head = block.head[r], at = block.row[r];
  void* out = const_cast<char*>(
      offset(a.out, a.dtype, sample * a.out_stride[0] + head * a.out_stride[1] + at * a.out_stride[2]));
  narrow_row(row, factor, p.head_dim, a.dtype, out);
  a.lse[(sample * a.num_heads + head) * a.q_len + at] =
      sum == 0.0f ? -kInf : (float)((pivot + std::log2((double)sum)) * kLn2);
}

static float reciprocal(float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; }

static void forward_block(const Problem& p, const Sequence& seq, int64_t kv_head, ForwardScratch& s) {
  const peftkern_attention& a = *p.args;
  const int64_t dim = p.padded_dim;
  load_queries(p, s);
  reset_softmax(p, s, !a.gate);
  walk(p, seq, kv_head, s, kPrefix);
  if (a.gate) {
    for (int64_t r = 0; r < s.block.count; r++) {
      const float weight = s.empty ? 0.0f : std::tanh(a.gate[s.block.head[r]]) * reciprocal(s.sum[r]);
      for (int64_t d = 0; d < dim; d += kLanes)
        store(s.prefix_out + r * dim + d, s.empty ? zero() : load(s.out + r * dim + d) * weight);
    }
    reset_softmax(p, s, true);
  }
  walk(p, seq, kv_head, s, kSequence);
  if (s.empty) memset(s.out, 0, sizeof(float) * s.block.count * dim);
  for (int64_t r = 0; r < s.block.count; r++) {
    float* row = s.out + r * dim;
    float factor = reciprocal(s.sum[r]);
    if (a.gate) {
      for (int64_t d = 0; d < dim; d += kLanes)
        store(row + d, load(row + d) * factor + load(s.prefix_out + r * dim + d));
      factor = 1.0f;
    }
    store_row(p, s.block, r, row, factor, s.pivot[r], s.sum[r]);
  }
}

// The prefixes, packed by all threads of the team; a barrier follows.
static void pack_prefixes(const Problem& p, float* packed_k, float* packed_v) {
#pragma omp for schedule(static)
  for (int64_t i = 0; i < p.args->bank_size * p.args->num_kv_heads; i++) {
    const int64_t at = i * p.args->prefix_len * p.padded_dim;
    widen_prefix(p, i / p.args->num_kv_heads, i % p.args->num_kv_heads, 0, p.args->prefix_len, packed_k + at,
                 packed_v + at);
#if PEFTKERN_HAS_PAIRS
    if (p.pairs) pair_rows(p, p.args->prefix_len, packed_k + at, packed_v + at);
#endif
  }
}

int attention_decode(const peftkern_attention& args, const Plan& plan);

int attention_forward(const peftkern_attention& args, const Plan& plan) {
  if (plan.decode) return attention_decode(args, plan);
  Problem problem = make_problem(args, plan);
#if PEFTKERN_HAS_PAIRS
  use_pairs(problem);
#endif
  const int64_t num_tasks = plan.num_units * args.num_kv_heads;
  const int num_threads = (int)most(1, least(args.num_threads, num_tasks));
  const int64_t packed_size = args.bank_size * args.num_kv_heads * args.prefix_len * problem.padded_dim;

  float *packed_k = nullptr, *packed_v = nullptr;
  ForwardScratch unused;
  Arena size{nullptr, 0};
  const int64_t length = problem.always_in_place ? 0 : round_up(plan.max_kv_len, kBlockN);
  take_forward_scratch(problem, length, size, unused);
  const size_t per_thread = size.used;
  size.take<float>(2 * packed_size + 64);
  char* base = static_cast<char*>(acquire_scratch(size.used + per_thread * (num_threads - 1)));
  if (!base) return PEFTKERN_OUT_OF_MEMORY;
  Arena shared{base, 0};
  packed_k = shared.take<float>(packed_size);
  packed_v = shared.take<float>(packed_size);
  problem.prefix_k = packed_k;
  problem.prefix_v = packed_v;

#pragma omp parallel num_threads(num_threads)
  {
    ForwardScratch s;
    Arena own{base + shared.used + per_thread * omp_get_thread_num(), 0};
    take_forward_scratch(problem, length, own, s);
    pack_prefixes(problem, packed_k, packed_v);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < num_tasks; task++) {
      const Unit& unit = plan.units[task / args.num_kv_heads];
      const Sequence& seq = plan.sequences[unit.sequence];
      const int64_t kv_head = task % args.num_kv_heads, blocks = num_position_blocks(plan, seq);
      s.tiles.open(seq, kv_head, blocks * (plan.group_size / plan.heads_per_block) > unit.parts);
      for (int64_t b = unit.part; b < blocks; b += unit.parts) {
        prefetch_rows(problem, seq, kv_head, b + unit.parts, args.q, args.q_stride);
        for (int64_t head = 0; head < plan.group_size; head += plan.heads_per_block) {
          make_block(problem, seq, kv_head, b, head, s.block);
          forward_block(problem, seq, kv_head, s);
        }
      }
    }
  }
  return PEFTKERN_OK;
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif  // PEFTKERN_CPU_ATTENTION_FORWARD_H_
