// SPDX-License-Identifier: Apache-2.0
// Forward: each block of rows walks the tiles of the prefix and then those of the sequence, with an online softmax
// (Milakov and Gimelshein 2018; Dao et al. 2022).
#ifndef PEFTKERN_CPU_ATTENTION_FORWARD_H_
#define PEFTKERN_CPU_ATTENTION_FORWARD_H_

#include <omp.h>

#include "products.h"
#include "tiles.h"

namespace peftkern {
namespace PEFTKERN_ISA {

struct ForwardScratch {
  float *rows, *panel;                // queries
  float *scores, *weights, *factors;  // [kBlockN][kBlockM]; weights: the memory of the scores, or pairs of keys
  float *out, *prefix_out;
  float* sums;                               // for AMX: out as [v_dim.padded][kBlockM]; else out itself
  float m[kBlockM], sum[kBlockM];            // weights are 2^(score - m); their sum
  float base[kBlockM];                       // m, but 0 where m is -inf
  float alpha[kBlockM];                      // the factor that a change of m applies to earlier weights
  float tile_m[kBlockM], tile_sum[kBlockM];  // the current tile's largest score, before the factor, and sum of weights
  bool empty;                                // no tile has been added to out yet
  SequenceTiles tiles;
  Block block;
};

// `length`: the number of keys that are widened at a time.
static void take_forward_scratch(const Problem& p, int64_t length, Arena& arena, ForwardScratch& s) {
  const int64_t k_dim = p.k_dim.padded, v_dim = p.v_dim.padded;
  s.rows = arena.take<float>(kBlockM * k_dim);
  s.panel = arena.take<float>(kBlockM * k_dim);
  s.scores = arena.take<float>(kBlockM * kBlockN);
  s.weights = p.pairs ? arena.take<float>(kBlockM * kBlockN / 2) : s.scores;
  s.factors = arena.take<float>(p.args->dropout_p > 0.0 ? kBlockM * kBlockN : 0);
  s.out = arena.take<float>(kBlockM * v_dim);
  s.sums = p.amx ? arena.take<float>(kBlockM * v_dim) : s.out;
  s.prefix_out = arena.take<float>(p.args->gate ? kBlockM * v_dim : 0);
  s.tiles.k = arena.take<float>(length * k_dim);
  s.tiles.v = arena.take<float>(length * v_dim);
  s.tiles.length = length;
  s.tiles.ready = arena.take<uint8_t>(p.plan->max_kv_len / kBlockN + 1);
  s.tiles.sequence = nullptr;
}

static void reset_softmax(const Problem& p, ForwardScratch& s, bool with_sink) {
  for (int64_t r = 0; r < kBlockM; r++) {
    s.m[r] = -kInf;
    s.sum[r] = s.base[r] = 0.0f;
  }
  if (with_sink && p.args->sinks)
    for (int64_t r = 0; r < s.block.count; r++) {
      const float sink = p.args->sinks[s.block.head[r]] * (float)kLog2e;
      if (sink == -kInf) continue;
      s.m[r] = s.base[r] = sink;
      s.sum[r] = 1.0f;
    }
  s.empty = true;
}

// Raises those m that `tile_m` exceeds by more than 8. Weights stay below 2^8, and most tiles do not rescale out.
// Returns whether it raised any.
static bool raise_m(const Problem& p, ForwardScratch& s, RowRange rows, float factor) {
  bool moved = false;
  for (int64_t r = rows.begin; r < rows.end; r += kLanes) {
    const vf tile_m = load(s.tile_m + r) * factor, m = load(s.m + r);
    if (!any_greater(tile_m, m + 8.0f)) {
      store(s.alpha + r, set1(1.0f));
      continue;
    }
    const vf new_m = max(m, tile_m), base = select(new_m == -kInf, zero(), new_m);
    const vf alpha = exp2(m - base);
    store(s.alpha + r, alpha);
    store(s.sum + r, load(s.sum + r) * alpha);
    store(s.m + r, new_m);
    store(s.base + r, base);
    moved = true;
  }
#if PEFTKERN_HAS_AMX
  if (p.amx) {
    for (int64_t r = rows.begin; r < rows.end && moved && !s.empty; r += kLanes) {
      const vf alpha = load(s.alpha + r);
      for (int64_t d = 0; d < p.v_dim.padded; d++)
        store(s.sums + d * kBlockM + r, load(s.sums + d * kBlockM + r) * alpha);
    }
    return moved;
  }
#endif
  const int64_t dim = p.v_dim.padded;
  if (moved && !s.empty)
    for (int64_t r = rows.begin; r < min(rows.end, s.block.count); r++)
      if (s.alpha[r] != 1.0f)
        for (int64_t d = 0; d < dim; d += kLanes) store(s.out + r * dim + d, load(s.out + r * dim + d) * s.alpha[r]);
  return moved;
}

// Stores the weights of keys i and i + 1 where multiply_keys() reads them.
PEFTKERN_INLINE void store_weights(float* weights, int64_t i, int64_t r, vf first, const vf* second) {
  store(weights + i * kBlockM + r, first);
  if (second) store(weights + (i + 1) * kBlockM + r, *second);
}
#if PEFTKERN_HAS_PAIRS
PEFTKERN_INLINE void store_weights(uint32_t* weights, int64_t i, int64_t r, vf first, const vf* second) {
  const vu pairs = bf16_pairs(first, second ? *second : zero());
  __builtin_memcpy(weights + i / 2 * kBlockM + r, &pairs, sizeof pairs);
}
#endif

// Turns products into weights relative to the present m while they are in registers. `tile_m` then tells whether m must
// be raised.
template <typename T, bool kSomeHidden>
struct WeightEpilogue {
  const float* base;
  float *tile_m, *sum;
  T* weights;
  float factor;
  Hidden hidden;
  int64_t key, row;  // of the first product

  template <int kRows, int kVectors>
  PEFTKERN_INLINE_MEMBER void operator()(int64_t i, int64_t j, vf (&c)[kRows][kVectors]) const {
    i += key;
    j += row;
    if (kSomeHidden) hidden.apply(i, j, c);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) {
      const int64_t r = j + v * kLanes;
      const vf origin = load(base + r);
      vf new_m[2] = {load(tile_m + r), c[0][v]}, total[2] = {load(sum + r), zero()};
#pragma GCC unroll 16
      for (int n = 0; n < kRows; n++) {
        new_m[n % 2] = max(new_m[n % 2], c[n][v]);
        c[n][v] = exp2(c[n][v] * factor - origin);
        total[n % 2] += c[n][v];
      }
#pragma GCC unroll 16
      for (int n = 0; n < kRows; n += 2)
        store_weights(weights, i + n, r, c[n][v], n + 1 < kRows ? &c[n + 1][v] : nullptr);
      store(tile_m + r, max(new_m[0], new_m[1]));
      store(sum + r, total[0] + total[1]);
    }
  }
};

// The weights of a tile whose scores are plain and whose rows have an m.
template <typename T>
static void weigh_products(const Problem& p, const Sequence& seq, ForwardScratch& s, Part part, const Tile& tile,
                           int64_t begin, int64_t n, RowRange rows) {
  T* weights = reinterpret_cast<T*>(s.weights);
  const Hidden hidden = hidden_of(p, seq, s.block, part, begin);
  do {
    for (int64_t r = rows.begin; r < rows.end; r += kLanes) {
      store(s.tile_m + r, set1(-kInf));
      store(s.tile_sum + r, zero());
    }
    for_key_groups(p, s.block, part, begin, n, rows, [&](int64_t key, int64_t count, int64_t first, bool some_hidden) {
      for (int64_t r = rows.begin; r < first; r += kLanes)
        for (int64_t j = key; j < key + count; j += 2) {
          const vf none = zero();
          store_weights(weights, j, r, none, j + 1 < key + count ? &none : nullptr);
        }
      const float* panel = s.panel + first;
      const int64_t columns = rows.end - first;
      if (some_hidden)
        multiply_rows(p, tile.k, key, count, panel, columns,
                      WeightEpilogue<T, true>{s.base, s.tile_m, s.tile_sum, weights, p.log2_scale, hidden, key, first});
      else
        multiply_rows(
            p, tile.k, key, count, panel, columns,
            WeightEpilogue<T, false>{s.base, s.tile_m, s.tile_sum, weights, p.log2_scale, hidden, key, first});
    });
  } while (raise_m(p, s, rows, p.log2_scale));
  for (int64_t r = rows.begin; r < rows.end; r += kLanes) store(s.sum + r, load(s.sum + r) + load(s.tile_sum + r));
}

// The weights of any tile, computed from its scores.
static void weigh_scores(const Problem& p, const Sequence& seq, ForwardScratch& s, Part part, const Tile& tile,
                         int64_t begin, int64_t n, RowRange rows) {
  multiply_rows(p, tile.k, 0, n, s.panel + rows.begin, rows.end - rows.begin,
                Store{s.scores + rows.begin, kBlockM, false});
  const float factor = finish_scores(p, seq, s.block, part, begin, n, rows, s.scores, nullptr);
  for (int64_t r = rows.begin; r < rows.end; r += kLanes) {
    const float* scores = s.scores + r;
    vf tile_m[4] = {load(scores), load(scores), load(scores), load(scores)};  // four, to hide the latency of a maximum
    int64_t k = 1;
    for (; k + 4 <= n; k += 4)
      for (int64_t i = 0; i < 4; i++) tile_m[i] = max(tile_m[i], load(scores + (k + i) * kBlockM));
    for (; k < n; k++) tile_m[0] = max(tile_m[0], load(scores + k * kBlockM));
    store(s.tile_m + r, max(max(tile_m[0], tile_m[1]), max(tile_m[2], tile_m[3])));
  }
  raise_m(p, s, rows, factor);
  const bool dropout = p.args->dropout_p > 0.0;
  if (dropout) dropout_factors(p, seq, s.block, part, begin, n, rows, s.factors);
  for (int64_t r = rows.begin; r < rows.end; r += kLanes) {
    const vf base = load(s.base + r);
    vf total[2] = {zero(), zero()};
    for (int64_t j = 0; j < n; j += 2) {
      vf w[2];
      for (int64_t i = 0; i < min(2, n - j); i++) {
        w[i] = exp2(load(s.scores + (j + i) * kBlockM + r) * factor - base);
        total[i] += w[i];
        if (dropout) w[i] *= load(s.factors + (j + i) * kBlockM + r);
      }
      const vf* second = j + 1 < n ? &w[1] : nullptr;
#if PEFTKERN_HAS_PAIRS
      if (p.pairs) {
        store_weights(words(s.weights), j, r, w[0], second);
        continue;
      }
#endif
      store_weights(s.weights, j, r, w[0], second);
    }
    store(s.sum + r, load(s.sum + r) + (total[0] + total[1]));
  }
}

static void add_tile(const Problem& p, const Sequence& seq, ForwardScratch& s, Part part, const Tile& tile,
                     int64_t begin, int64_t n) {
  const RowRange rows = rows_of(s.block, part, begin, n);
  const int64_t dim = p.v_dim.padded, count = min(rows.end, s.block.count) - rows.begin;
  if (s.empty || !p.is_plain(part) || p.args->dropout_p > 0.0) weigh_scores(p, seq, s, part, tile, begin, n, rows);
#if PEFTKERN_HAS_PAIRS
  else if (p.pairs)
    weigh_products<uint32_t>(p, seq, s, part, tile, begin, n, rows);
#endif
  else
    weigh_products<float>(p, seq, s, part, tile, begin, n, rows);
  if (s.empty && count < s.block.count) {
    memset(s.sums, 0, sizeof(float) * (p.amx ? kBlockM : s.block.count) * dim);
    s.empty = false;
  }
  const VisibleKeys visible{on_diagonal(s.block, part, begin, n) ? s.block.high : nullptr, begin, n, rows.begin,
                            p.pairs};
#if PEFTKERN_HAS_AMX
  if (p.amx) {
    pad_weights(s.weights, n, rows);
    multiply_keys_in_tiles(visible, rows.end - rows.begin, s.weights + rows.begin, tile.by_key, s.sums + rows.begin,
                           !s.empty);
    s.empty = false;
    return;
  }
#endif
  multiply_keys(p, visible, count, s.weights + rows.begin, tile.by_key, Store{s.out + rows.begin * dim, dim, !s.empty});
  s.empty = false;
}

static void walk(const Problem& p, const Sequence& seq, int64_t kv_head, ForwardScratch& s, Part part) {
  const TileRange range = tiles_of(seq, s.block, part);
  for (int64_t begin = range.begin; begin < range.end; begin += kBlockN) {
    const int64_t n = min(kBlockN, range.end - begin);
    const Tile tile =
        part == kPrefix ? prefix_tile(p, seq, kv_head, begin) : s.tiles.get(p, begin, min(kBlockN, seq.kv_len - begin));
    add_tile(p, seq, s, part, tile, begin, n);
  }
#if PEFTKERN_HAS_AMX
  if (p.amx && !s.empty && (part == kSequence || p.args->gate)) transpose_sums(s.block, p.v_dim, s.sums, s.out);
#endif
}

static void load_queries(const Problem& p, ForwardScratch& s) {
  load_panel(p, s.block, p.args->q, p.args->q_stride, p.k_dim, s.rows, s.panel);
}

// lse[r] = ln(sum) + ln(2) m for the rows of a block.
static void log_sums(const Block& block, const float* m, const float* sum, float* lse) {
  for (int64_t r = 0; r < block.vectors * kLanes; r += kLanes) {
    const vf logarithm = log(load(sum + r)), shift = load(m + r) * (float)kLn2;
    store(lse + r, select(load(sum + r) == 0.0f, set1(-kInf), logarithm + shift));
  }
}

static void store_row(const Problem& p, const Block& block, int64_t r, const float* row, float factor, float lse) {
  const peftkern_attention& a = *p.args;
  void* out = const_cast<char*>(row_address(p, block, r, a.out, a.out_stride));
  narrow_row(row, factor, p.v_dim.size, a.dtype, out);
  a.lse[(block.sample[r] * a.num_heads + block.head[r]) * a.q_len + block.row[r]] = lse;
}

static float reciprocal(float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; }

static void forward_block(const Problem& p, const Sequence& seq, int64_t kv_head, ForwardScratch& s) {
  const peftkern_attention& a = *p.args;
  const int64_t dim = p.v_dim.padded;
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

static void take_packed_prefixes(const Problem& p, Arena& arena, float*& packed_k, float*& packed_v) {
  const int64_t rows = p.args->bank_size * p.args->num_kv_heads * p.packed_len;
  packed_k = arena.take<float>(rows * p.k_dim.padded);
  packed_v = arena.take<float>(rows * p.v_dim.padded);
}

// Packs the prefixes with all threads of the team. A barrier follows.
static void pack_prefixes(const Problem& p, float* packed_k, float* packed_v) {
#pragma omp for schedule(static)  // FAULT: prefix-read-before-it-is-packed
  for (int64_t i = 0; i < p.args->bank_size * p.args->num_kv_heads; i++) {
    const int64_t prefix = i / p.args->num_kv_heads, kv_head = i % p.args->num_kv_heads;
    float *k = packed_k + i * p.packed_len * p.k_dim.padded, *v = packed_v + i * p.packed_len * p.v_dim.padded;
#if PEFTKERN_HAS_PAIRS
    if (p.pairs) {
      pair_prefix(p, prefix, kv_head, k, v);
      continue;
    }
#endif
    widen_prefix(p, prefix, kv_head, 0, p.args->prefix_len, k, v);
  }
}

int attention_decode(const peftkern_attention& args, const Plan& plan);

int attention_forward(const peftkern_attention& args, const Plan& plan) {
  if (plan.decode) return attention_decode(args, plan);
  Problem problem = make_problem(args, plan, false);
#if PEFTKERN_HAS_PAIRS
  use_pairs(problem);
#endif
  const int64_t num_tasks = plan.num_units * args.num_kv_heads;
  const int num_threads = (int)max(1, min(args.num_threads, num_tasks));

  float *packed_k = nullptr, *packed_v = nullptr;
  ForwardScratch unused;
  Arena size{nullptr, 0};
  const int64_t length = problem.always_in_place ? 0 : round_up(plan.max_kv_len, kBlockN);
  take_forward_scratch(problem, length, size, unused);
  const size_t per_thread = size.used;
  take_packed_prefixes(problem, size, packed_k, packed_v);
  char* base = static_cast<char*>(acquire_scratch(size.used + per_thread * (num_threads - 1)));
  if (!base) return PEFTKERN_OUT_OF_MEMORY;
  Arena shared{base, 0};
  take_packed_prefixes(problem, shared, packed_k, packed_v);
  problem.prefix_k = packed_k;
  problem.prefix_v = packed_v;

  run_by_threads(num_threads, [&] {
    ForwardScratch s;
    Arena own{base + shared.used + per_thread * omp_get_thread_num(), 0};
    take_forward_scratch(problem, length, own, s);
#if PEFTKERN_HAS_AMX
    const TileScope scope(problem.amx);
#endif
    pack_prefixes(problem, packed_k, packed_v);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < num_tasks; task++) {
      const Unit& unit = plan.units[task / args.num_kv_heads];
      const Sequence& seq = plan.sequences[unit.sequence];
      const int64_t kv_head = task % args.num_kv_heads, blocks = num_position_blocks(plan, seq);
      s.tiles.open(seq, kv_head, blocks * (plan.group_size / plan.heads_per_block) > unit.splits);
      for (int64_t b = unit.split; b < blocks; b += unit.splits) {
        prefetch_rows(problem, seq, kv_head, b + unit.splits, args.q, args.q_stride, problem.k_dim);
        for (int64_t head = 0; head < plan.group_size; head += plan.heads_per_block) {
          make_block(problem, seq, kv_head, b, head, s.block);
          forward_block(problem, seq, kv_head, s);
        }
      }
    }
  });
  return PEFTKERN_OK;
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif  // PEFTKERN_CPU_ATTENTION_FORWARD_H_
