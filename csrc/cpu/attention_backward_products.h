// SPDX-License-Identifier: Apache-2.0
// First walk of the backward of a block of rows: weights and their gradients.
#ifndef PEFTKERN_CPU_ATTENTION_BACKWARD_PRODUCTS_H_
#define PEFTKERN_CPU_ATTENTION_BACKWARD_PRODUCTS_H_

#include "attention_backward_scratch.h"

namespace peftkern {
namespace PEFTKERN_ISA {

// The separate softmax over the prefix of calls with a gate: writes its scores to `weights` and the logarithm of its
// denominator to `prefix_lse`.
static void prefix_scores(const Problem& p, const Sequence& seq, int64_t kv_head, BackwardScratch& s, TileRange range) {
  float m[kBlockM], sum[kBlockM];
  for (int64_t r = 0; r < kBlockM; r++) m[r] = -kInf, sum[r] = 0.0f;
  for (int64_t begin = range.begin; begin < range.end; begin += kBlockN) {
    const int64_t n = min(kBlockN, range.end - begin), at = tile_offset(0, range, begin);
    const RowRange rows = rows_of(s.block, kPrefix, begin, n);
    float* scores = s.weights + at;
    multiply_rows(p, prefix_tile(p, seq, kv_head, begin).k, 0, n, s.q_panel + rows.begin, rows.end - rows.begin,
                  Store{scores + rows.begin, kBlockM, false});
    const float factor = finish_scores(p, seq, s.block, kPrefix, begin, n, rows, scores,
                                       find(p.args->softcap != 0.0 ? s.slopes : nullptr, at));
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

static void weigh_products_by_lse(const Problem& p, const Sequence& seq, BackwardScratch& s, Part part,
                                  const Tile& tile, int64_t begin, int64_t n, RowRange rows, float* weights) {
  const Hidden hidden = hidden_of(p, seq, s.block, part, begin);
  for_key_groups(p, s.block, part, begin, n, rows, [&](int64_t key, int64_t count, int64_t first, bool some_hidden) {
    clear_keys(weights, key, count, RowRange{rows.begin, first});
    const float* panel = s.q_panel + first;
    if (some_hidden)
      multiply_rows(p, tile.k, key, count, panel, rows.end - first,
                    LseWeightEpilogue<true>{s.lse, s.total, weights, p.log2_scale, hidden, key, first});
    else
      multiply_rows(p, tile.k, key, count, panel, rows.end - first,
                    LseWeightEpilogue<false>{s.lse, s.total, weights, p.log2_scale, hidden, key, first});
  });
}

// Turns scores, up to `factor`, into weights relative to lse.
static void weigh_scores_by_lse(const float* lse, float* total, float* weights, int64_t n, RowRange rows,
                                float factor) {
  for (int64_t r = rows.begin; r < rows.end; r += kLanes) {
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
static void walk_products(const Problem& p, const Needs& needs, const Sequence& seq, int64_t kv_head,
                          BackwardScratch& s, Part part, int64_t first_tile) {
  const peftkern_attention& a = *p.args;
  const TileRange range = tiles_of(seq, s.block, part);
  const bool own_softmax = part == kPrefix && a.gate;
  if (own_softmax) prefix_scores(p, seq, kv_head, s, range);
  for (int64_t begin = range.begin; begin < range.end; begin += kBlockN) {
    const int64_t n = min(kBlockN, range.end - begin), at = tile_offset(first_tile, range, begin);
    const Tile tile = tile_at(p, seq, kv_head, s, part, begin);
    const RowRange rows = rows_of(s.block, part, begin, n);
    float *weights = s.weights + at, *grad = s.grads + at;
    if (own_softmax) {
      weigh_scores_by_lse(s.prefix_lse, s.prefix_total, weights, n, rows, 1.0f);
    } else if (!p.is_plain(part)) {
      multiply_rows(p, tile.k, 0, n, s.q_panel + rows.begin, rows.end - rows.begin,
                    Store{weights + rows.begin, kBlockM, false});
      const float factor = finish_scores(p, seq, s.block, part, begin, n, rows, weights,
                                         find(a.softcap != 0.0 ? s.slopes : nullptr, at));
      weigh_scores_by_lse(s.lse, s.total, weights, n, rows, factor);
    } else {
      weigh_products_by_lse(p, seq, s, part, tile, begin, n, rows, weights);
    }
    if (needs.scores())
      for_key_groups(p, s.block, part, begin, n, rows, [&](int64_t key, int64_t count, int64_t first, bool) {
        clear_keys(grad, key, count, RowRange{rows.begin, first});
        multiply_rows(p, tile.v, key, count, s.dout_panel + first, rows.end - first,
                      Store{grad + key * kBlockM + first, kBlockM, false});
      });
  }
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif  // PEFTKERN_CPU_ATTENTION_BACKWARD_PRODUCTS_H_
