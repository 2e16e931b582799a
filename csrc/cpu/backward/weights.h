// SPDX-License-Identifier: Apache-2.0
// The first two walks of the backward of a block of rows: see block.h.
#ifndef PEFTKERN_CPU_BACKWARD_WEIGHTS_H_
#define PEFTKERN_CPU_BACKWARD_WEIGHTS_H_

#include <cmath>

#include "scratch.h"

namespace peftkern {
namespace PEFTKERN_ISA {

// The slopes of a tile, if there are any.
template <typename L>
static float* slopes_at(const BackwardTask<L>& t, int64_t at) {
  return t.p.args->softcap != 0.0 ? t.s.slopes + at : nullptr;
}

// The separate softmax over the prefix of calls with a gate: writes its scores to `weights` and the logarithm of its
// denominator to `prefix_lse`.
template <typename L>
static void prefix_scores(const BackwardTask<L>& t, TileRange range) {
  BackwardScratch<L>& s = t.s;
  float m[kBlockM], sum[kBlockM];
  for (int64_t r = 0; r < kBlockM; r++) m[r] = -kInf, sum[r] = 0.0f;
  for (int64_t begin = range.begin; begin < range.end; begin += kBlockN) {
    const Span span = tile_span(s.block, kPrefix, range, begin);
    const RowRange rows = span.rows;
    const int64_t n = span.n, at = s.tile_offset(0, range, begin);
    float* scores = s.weights + at;
    L::multiply_rows(t.tile(kPrefix, begin).k, {0, n}, s.q.panel + rows.begin, rows.end - rows.begin,
                     Store{scores + rows.begin, kBlockM, false});
    const float factor = finish_scores(t.p, t.target.seq, s.block, span, scores, slopes_at(t, at));
    for (int64_t r = rows.begin; r < rows.end; r += kLanes) {
      vf new_m = load(m + r);
      for (int64_t j = 0; j < n; j++) {
        const vf score = load(scores + j * kBlockM + r) * factor;
        store(scores + j * kBlockM + r, score);
        new_m = max(new_m, score);
      }
      const vf base = select(new_m == -kInf, zero(), new_m);
      vf total = load(sum + r) * exp2(load(m + r) - base);
      for (int64_t j = 0; j < n; j++) total += exp2(load(scores + j * kBlockM + r) - base);
      store(m + r, new_m);
      store(sum + r, total);
    }
  }
  for (int64_t r = 0; r < kBlockM; r++) s.prefix_lse[r] = sum[r] == 0.0f ? kInf : m[r] + std::log2(sum[r]);
}

static void clear_keys(float* x, int64_t key, int64_t count, RowRange rows) {
  for (int64_t j = key; j < key + count; j++)
    for (int64_t r = rows.begin; r < rows.end; r += kLanes) store(x + j * kBlockM + r, zero());
}

// Turns products into weights relative to lse while they are in registers.
template <bool kSomeHidden>
struct LseWeightEpilogue {
  const float* lse;
  float *total, *weights;
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
      const vf base = load(lse + r);
      vf sum[2] = {load(total + r), zero()};
#pragma GCC unroll 16
      for (int n = 0; n < kRows; n++) {
        const vf w = exp2(c[n][v] * factor - base);
        store(weights + (i + n) * kBlockM + r, w);
        sum[n % 2] += w;
      }
      store(total + r, sum[0] + sum[1]);
    }
  }
};

template <typename L>
static void weigh_products_by_lse(const BackwardTask<L>& t, const Span& span, const Rows<typename L::Word>& keys,
                                  float* weights) {
  BackwardScratch<L>& s = t.s;
  const RowRange rows = span.rows;
  const Hidden hidden = hidden_of(t.p, t.target.seq, s.block, span);
  for_key_groups(t.p, s.block, span, L::kDiagonalKeys, [&](const KeyGroup& group) {
    const int64_t key = group.key, first = group.row, columns = rows.end - first;
    const RowRange tokens{key, key + group.count};
    const float factor = t.p.log2_scale;
    clear_keys(weights, key, group.count, RowRange{rows.begin, first});
    if (group.some_hidden)
      L::multiply_rows(keys, tokens, s.q.panel + first, columns,
                       LseWeightEpilogue<true>{s.lse, s.total, weights, factor, hidden, key, first});
    else
      L::multiply_rows(keys, tokens, s.q.panel + first, columns,
                       LseWeightEpilogue<false>{s.lse, s.total, weights, factor, hidden, key, first});
  });
}

// Turns scores, up to `factor`, into weights relative to lse.
static void weigh_scores_by_lse(const float* lse, float* total, float* weights, const Span& span, float factor) {
  const int64_t n = span.n, end = span.rows.end;
  for (int64_t r = span.rows.begin; r < end; r += kLanes) {
    const vf base = load(lse + r);
    vf sum = zero();
    for (int64_t j = 0; j < n; j++) {
      const vf w = exp2(load(weights + j * kBlockM + r) * factor - base);
      store(weights + j * kBlockM + r, w);
      sum += w;
    }
    store(total + r, load(total + r) + sum);
  }
}

// First walk over a part: weights, relative to lse, and their gradients.
template <typename L>
static void walk_products(const BackwardTask<L>& t, Walk walk) {
  BackwardScratch<L>& s = t.s;
  const TileRange range = tiles_of(t.target.seq, s.block, walk.part);
  const bool own_softmax = walk.part == kPrefix && t.p.args->gate;
  if (own_softmax) prefix_scores(t, range);
  for (int64_t begin = range.begin; begin < range.end; begin += kBlockN) {
    const Span span = tile_span(s.block, walk.part, range, begin);
    const RowRange rows = span.rows;
    const int64_t at = s.tile_offset(walk.first_tile, range, begin);
    const Tile<typename L::Word> tile = t.tile(walk.part, begin);
    float *weights = s.weights + at, *grad = s.grads + at;
    if (own_softmax) {
      weigh_scores_by_lse(s.prefix_lse, s.prefix_total, weights, span, 1.0f);
    } else if (!t.p.is_plain(walk.part)) {
      L::multiply_rows(tile.k, {0, span.n}, s.q.panel + rows.begin, rows.end - rows.begin,
                       Store{weights + rows.begin, kBlockM, false});
      const float factor = finish_scores(t.p, t.target.seq, s.block, span, weights, slopes_at(t, at));
      weigh_scores_by_lse(s.lse, s.total, weights, span, factor);
    } else {
      weigh_products_by_lse(t, span, tile.k, weights);
    }
    if (t.p.needs.scores())
      for_key_groups(t.p, s.block, span, L::kDiagonalKeys, [&](const KeyGroup& group) {
        const int64_t key = group.key, first = group.row;
        clear_keys(grad, key, group.count, RowRange{rows.begin, first});
        L::multiply_rows(tile.v, {key, key + group.count}, s.dout.panel + first, rows.end - first,
                         Store{grad + key * kBlockM + first, kBlockM, false});
      });
  }
}

// What the second walk does with the weights of a tile.
struct Weighing {
  const float *total, *gate;  // of each row: sum of the weights; factor of the part's values
  float* rowsum;              // null: not needed
  const float* dropout;       // factors; null: none
  float* applied;             // the weights that multiply values, if they differ
  bool normalize;
};

// The weights of two vectors of rows, as many as a vector of pairs of rows holds. `finish(j, applied)` receives those
// of each key that multiply its value.
template <typename Finish>
PEFTKERN_INLINE void weigh_rows(const Weighing& x, RowRange rows, int64_t n, float* weights, float* grad,
                                const Finish& finish) {
  const int64_t r = rows.begin;
  const float* dropout = x.dropout;
  float* all_applied = x.applied;
  const bool normalize = x.normalize;
  const int vectors = rows.end - r > kLanes ? 2 : 1;
  vf sum[2], inverse[2], gate[2], rowsum[2] = {zero(), zero()}, applied[2] = {zero(), zero()};
  for (int u = 0; u < vectors; u++) {
    sum[u] = load(x.total + r + u * kLanes);
    inverse[u] = select(sum[u] == 0.0f, zero(), 1.0f / sum[u]);
    gate[u] = load(x.gate + r + u * kLanes);
  }
  for (int64_t j = 0; j < n; j++) {
    for (int u = 0; u < vectors; u++) {
      const int64_t i = j * kBlockM + r + u * kLanes;
      vf w = load(weights + i);
      if (normalize) {
        const vf quotient = w * inverse[u];
        w = quotient +
            (w - quotient * sum[u]) * inverse[u];  // as accurate as a division, and exactly 1 for a single key
        store(weights + i, w);
      }
      vf g = load(grad + i);
      applied[u] = w;
      if (dropout) {
        const vf keep = load(dropout + i);
        g *= keep;
        applied[u] *= keep;
        store(grad + i, g);
      }
      rowsum[u] += w * g;
      if (all_applied) store(all_applied + i, applied[u] * gate[u]);
    }
    finish(j, applied);
  }
  for (int u = 0; u < vectors && x.rowsum; u++) {
    float* at_row = x.rowsum + r + u * kLanes;
    store(at_row, load(at_row) + rowsum[u]);
  }
}

// Second walk: weights that sum to one, dropout, dv, rowsum.
template <typename L>
static void walk_weights(const BackwardTask<L>& t, Walk walk) {
  BackwardScratch<L>& s = t.s;
  const peftkern_attention& a = *t.p.args;
  const Part part = walk.part;
  const TileRange range = tiles_of(t.target.seq, s.block, part);
  const bool gated = part == kPrefix && a.gate, dropout = a.dropout_p > 0.0;
  const bool exact = part == kSequence || t.p.needs.sequence() || a.gate;
  float* dv = part == kPrefix ? t.sums.dprefix_v : t.sums.dv;
  const Weighing weighing{gated ? s.prefix_total : s.total,       s.part_scale[part],
                          exact ? s.rowsum[part] : nullptr,       dropout ? s.factors : nullptr,
                          dropout || gated ? s.applied : nullptr, exact};
  const bool paired = L::kPaired && part == kSequence && !dropout && dv;
  for (int64_t begin = range.begin; begin < range.end; begin += kBlockN) {
    const Span span = tile_span(s.block, part, range, begin);
    const int64_t at = s.tile_offset(walk.first_tile, range, begin);
    float *weights = s.weights + at, *grad = s.grads + at;
    if (dropout) dropout_factors(t.p, t.target.seq, s.block, span, s.factors);
    for (int64_t r = span.rows.begin; r < span.rows.end; r += 2 * kLanes) {
      const auto store_pairs = [&](int64_t j, const vf(&applied)[2]) {
        if constexpr (L::kPaired)
          if (paired) L::store_row_pairs(s.temporaries.row_pairs, j, r, applied[0], applied[1]);
      };
      weigh_rows(weighing, {r, span.rows.end}, span.n, weights, grad, store_pairs);
    }
    if (!dv) continue;
    float* sums = dv + begin * t.p.v_dim.padded;
    if constexpr (L::kPaired)
      if (paired) {
        L::sum_row_pairs(s.block, span, s.dout, s.temporaries, sums);
        continue;
      }
    const float* x = weighing.applied ? weighing.applied : weights;
    if (part == kPrefix)
      L::sum_rows_exactly(s.block, span, x, s.dout, s.temporaries, sums);
    else
      L::sum_rows(s.block, span, x, s.dout, s.temporaries, sums);
  }
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif  // PEFTKERN_CPU_BACKWARD_WEIGHTS_H_
