// SPDX-License-Identifier: Apache-2.0
// The online softmax of a block of rows (Milakov and Gimelshein 2018; Dao et al. 2022).
#ifndef PEFTKERN_CPU_FORWARD_SOFTMAX_H_
#define PEFTKERN_CPU_FORWARD_SOFTMAX_H_

#include <cmath>

#include "../tiles.h"
#include "../layouts/fp32.h"

namespace peftkern {
namespace PEFTKERN_ISA {

template <typename L>
struct ForwardScratch {
  typedef typename L::Word Word;

  float* rows;  // queries
  Word* panel;
  float *scores, *factors;  // [kBlockN][kBlockM]
  Word* weights;            // the memory of the scores, or pairs of keys
  float *out, *prefix_out;
  float* sums;                               // to which L::sum_keys() adds; finish_sums() writes them to `out`
  float m[kBlockM], sum[kBlockM];            // weights are 2^(score - m); their sum
  float base[kBlockM];                       // m, but 0 where m is -inf
  float alpha[kBlockM];                      // the factor that a change of m applies to earlier weights
  float tile_m[kBlockM], tile_sum[kBlockM];  // the current tile's largest score, before the factor, and sum of weights
  bool empty;                                // no tile has been added to out yet
  Tiles<L> tiles;
  Block block;

  // `length`: the number of keys that are packed at a time.
  void take(const Problem<L>& p, int64_t length, Arena& arena) {
    const int64_t k_dim = p.k_dim.padded, v_dim = p.v_dim.padded;
    rows = arena.take<float>(kBlockM * k_dim);
    panel = arena.take<Word>(kBlockM * k_dim);
    scores = arena.take<float>(kBlockM * kBlockN);
    if constexpr (L::kPaired)
      weights = arena.take<Word>(kBlockM * kBlockN / 2);
    else
      weights = scores;
    factors = arena.take<float>(p.args->dropout_p > 0.0 ? kBlockM * kBlockN : 0);
    out = arena.take<float>(kBlockM * v_dim);
    sums = L::kSumsApart ? arena.take<float>(kBlockM * v_dim) : out;
    prefix_out = arena.take<float>(p.args->gate ? kBlockM * v_dim : 0);
    tiles.take(p, length, max(p.plan->max_kv_len, p.plan->max_prefix_len), arena);
    block.step = L::kRowStep;
  }
};

template <typename L>
static void reset_softmax(const Problem<L>& p, ForwardScratch<L>& s, bool with_sink) {
  for (int64_t r = 0; r < kBlockM; r++) {
    s.m[r] = -kInf;
    s.sum[r] = s.base[r] = 0.0f;
  }
  if (with_sink && p.args->sinks)
    for (int64_t r = 0; r < s.block.count; r++) {
      const float sink = sink_score(p.args->sinks[s.block.head[r]]);
      if (sink == -kInf) continue;
      s.m[r] = s.base[r] = sink;
      s.sum[r] = 1.0f;
    }
  s.empty = true;
}

// Raises those m that `tile_m` exceeds by more than 8. Weights stay below 2^8, and most tiles do not rescale out.
// Returns whether it raised any.
template <typename L>
static bool raise_m(const Problem<L>& p, ForwardScratch<L>& s, RowRange rows, float factor) {
  bool moved = false;
  for (int64_t r = rows.begin; r < rows.end; r += kLanes) {
    const vf tile_m = load(s.tile_m + r) * factor, m = load(s.m + r);
    if (!any_greater(tile_m, m + 8.0f)) {
      store(s.alpha + r, set1(1.0f));
      continue;
    }
    const vf new_m = max(m, tile_m), base = select(new_m == -kInf, zero(), new_m);
    const vf alpha = select(m == kInf, set1(1.0f), exp2(m - base));  // an infinite sink
    store(s.alpha + r, alpha);
    store(s.sum + r, load(s.sum + r) * alpha);
    store(s.m + r, new_m);
    store(s.base + r, base);
    moved = true;
  }
  if (moved && !s.empty) L::scale_sums(s.block, rows, p.v_dim, s.alpha, s.sums);
  return moved;
}

// Turns products into weights relative to the present m while they are in registers. `tile_m` then tells whether m must
// be raised.
template <typename L, bool kSomeHidden>
struct WeightEpilogue {
  const float* base;
  float *tile_m, *sum;
  typename L::Word* weights;
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
        L::store_weights(weights, i + n, r, c[n][v], n + 1 < kRows ? &c[n + 1][v] : nullptr);
      store(tile_m + r, max(new_m[0], new_m[1]));
      store(sum + r, total[0] + total[1]);
    }
  }
};

// The weights of a tile whose scores are plain and whose rows have an m.
template <typename L>
static void weigh_products(const Problem<L>& p, const Sequence& seq, ForwardScratch<L>& s, const Span& span,
                           const Tile<typename L::Word>& tile) {
  const RowRange rows = span.rows;
  const Hidden hidden = hidden_of(p, seq, s.block, span);
  do {
    for (int64_t r = rows.begin; r < rows.end; r += kLanes) {
      store(s.tile_m + r, set1(-kInf));
      store(s.tile_sum + r, zero());
    }
    for_key_groups(p, s.block, span, L::kDiagonalKeys, [&](const KeyGroup& group) {
      const int64_t key = group.key, first = group.row, end = key + group.count;
      for (int64_t r = rows.begin; r < first; r += kLanes)
        for (int64_t j = key; j < end; j += 2) {
          const vf none = zero();
          L::store_weights(s.weights, j, r, none, j + 1 < end ? &none : nullptr);
        }
      if (group.some_hidden)
        L::multiply_rows(
            tile.k, {key, end}, s.panel + first, rows.end - first,
            WeightEpilogue<L, true>{s.base, s.tile_m, s.tile_sum, s.weights, p.log2_scale, hidden, key, first});
      else
        L::multiply_rows(
            tile.k, {key, end}, s.panel + first, rows.end - first,
            WeightEpilogue<L, false>{s.base, s.tile_m, s.tile_sum, s.weights, p.log2_scale, hidden, key, first});
    });
  } while (raise_m(p, s, rows, p.log2_scale));
  for (int64_t r = rows.begin; r < rows.end; r += kLanes) store(s.sum + r, load(s.sum + r) + load(s.tile_sum + r));
}

// tile_m = the largest score of each row
template <typename L>
static void find_tile_m(ForwardScratch<L>& s, int64_t n, RowRange rows) {
  for (int64_t r = rows.begin; r < rows.end; r += kLanes) {
    const float* scores = s.scores + r;
    vf tile_m[4] = {load(scores), load(scores), load(scores), load(scores)};  // four, to hide the latency of a maximum
    int64_t k = 1;
    for (; k + 4 <= n; k += 4)
      for (int64_t i = 0; i < 4; i++) tile_m[i] = max(tile_m[i], load(scores + (k + i) * kBlockM));
    for (; k < n; k++) tile_m[0] = max(tile_m[0], load(scores + k * kBlockM));
    store(s.tile_m + r, max(max(tile_m[0], tile_m[1]), max(tile_m[2], tile_m[3])));
  }
}

// The weights of any tile, computed from its scores.
template <typename L>
static void weigh_scores(const Problem<L>& p, const Sequence& seq, ForwardScratch<L>& s, const Span& span,
                         const Tile<typename L::Word>& tile) {
  const RowRange rows = span.rows;
  const int64_t n = span.n;
  L::multiply_rows(tile.k, {0, n}, s.panel + rows.begin, rows.end - rows.begin,
                   Store{s.scores + rows.begin, kBlockM, false});
  const float factor = finish_scores(p, seq, s.block, span, s.scores, nullptr);
  find_tile_m(s, n, rows);
  raise_m(p, s, rows, factor);
  const bool dropout = p.args->dropout_p > 0.0;
  if (dropout) dropout_factors(p, seq, s.block, span, s.factors);
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
      L::store_weights(s.weights, j, r, w[0], j + 1 < n ? &w[1] : nullptr);
    }
    store(s.sum + r, load(s.sum + r) + (total[0] + total[1]));
  }
}

// Adds the keys of a span, which `tile` holds, to the softmax and its weighted sum of values.
template <typename L>
static void add_tile(const Problem<L>& p, const Sequence& seq, ForwardScratch<L>& s, const Span& span,
                     const Tile<typename L::Word>& tile) {
  if (s.empty || !p.is_plain(span.part) || p.args->dropout_p > 0.0)
    weigh_scores(p, seq, s, span, tile);
  else
    weigh_products(p, seq, s, span, tile);
  if (s.empty && min(span.rows.end, s.block.count) - span.rows.begin < s.block.count) {
    L::clear_sums(s.block, p.v_dim, s.sums);
    s.empty = false;
  }
  L::sum_keys(s.block, span, s.weights, tile.by_key, {s.sums, p.v_dim, !s.empty});
  s.empty = false;
}

// lse[r] = ln(sum) + ln(2) m for the rows of a block.
static void log_sums(const Block& block, const float* m, const float* sum, float* lse) {
  for (int64_t r = 0; r < block.vectors * kLanes; r += kLanes) {
    const vf logarithm = log(load(sum + r)), shift = load(m + r) * (float)kLn2;
    store(lse + r, select(load(sum + r) == 0.0f, set1(-kInf), logarithm + shift));
  }
}

static float reciprocal(float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; }

static void store_row(const Call& p, const Block& block, int64_t r, const float* row, float factor, float lse) {
  const peftkern_attention& a = *p.args;
  void* out = const_cast<char*>(row_address(p, block, r, {a.out, a.out_stride, p.v_dim}));
  narrow_row(row, factor, p.v_dim.size, a.dtype, out);
  a.lse[(block.sample[r] * a.num_heads + block.head[r]) * a.q_len + block.row[r]] = lse;
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif  // PEFTKERN_CPU_FORWARD_SOFTMAX_H_
