// SPDX-License-Identifier: Apache-2.0
// The third walk of the backward of a block of rows: see block.h.
#ifndef PEFTKERN_CPU_BACKWARD_SCORE_GRADS_H_
#define PEFTKERN_CPU_BACKWARD_SCORE_GRADS_H_

#include "scratch.h"

namespace peftkern {
namespace PEFTKERN_ISA {

// Adds a tile's ds to the gradient of the prefix's bias.
template <typename L>
static void add_prefix_bias_gradient(const BackwardTask<L>& t, const Span& span, const float* ds) {
  const Block& block = t.s.block;
  for (int64_t r = span.rows.begin; r < min(span.rows.end, block.count); r++) {
    const int64_t head = block.head[r] % t.p.plan->group_size;
    float* row = t.sums.dprefix_bias + head * t.p.args->prefix_len + span.begin;
    for (int64_t j = 0; j < span.n; j++) row[j] += ds[j * kBlockM + r];
  }
}

// Adds a tile's ds to the gradient of the sequence's bias.
template <typename L>
static void add_bias_gradient(const BackwardTask<L>& t, const Span& span, const float* ds) {
  const Block& block = t.s.block;
  const Sequence& seq = t.target.seq;
  const int64_t* size = t.p.gradients.bias_size;
  for (int64_t r = span.rows.begin; r < min(span.rows.end, block.count); r++) {
    const int64_t index[3] = {seq.batch, block.head[r], block.row[r]};
    int64_t row = 0;
    for (int i = 0; i < 3; i++) row = row * size[i] + (size[i] == 1 ? 0 : index[i]);
    float* at_row = t.sums.dbias + row * size[3];
    float sum = 0.0f;
    for (int64_t j = 0; j < span.n; j++) {
      if (size[3] > 1) at_row[seq.start + span.begin + j] += ds[j * kBlockM + r];
      sum += ds[j * kBlockM + r];
    }
    if (size[3] == 1) *at_row += sum;
  }
}

// Of each row of a block: ds = w (g + minus_delta) factor.
struct ScoreGradients {
  alignas(64) float minus_delta[kBlockM];
  alignas(64) float factor[kBlockM];
};

// ds of a tile, in the place of its g.
static void score_gradients(const ScoreGradients& x, const Span& span, const float* weights, float* grad) {
  const int64_t n = span.n, end = span.rows.end;
  for (int64_t r = span.rows.begin; r < end; r += kLanes) {
    const vf minus = load(x.minus_delta + r), factor = load(x.factor + r);
    for (int64_t j = 0; j < n; j++) {
      const int64_t i = j * kBlockM + r;
      store(grad + i, load(weights + i) * (load(grad + i) + minus) * factor);
    }
  }
}

// ds of a tile, written directly as pairs of rows and of keys.
template <typename L>
static void score_gradient_pairs(const ScoreGradients& x, const Span& span, const float* weights, const float* grad,
                                 const typename L::Temporaries& to) {
  const RowRange rows = span.rows;
  const int64_t n = span.n;
  typename L::Word *row_pairs = to.row_pairs, *key_pairs = to.key_pairs;
  for (int64_t r = rows.begin; r < rows.end; r += 2 * kLanes) {
    const int vectors = r + kLanes < rows.end ? 2 : 1;
    for (int64_t j = 0; j < n; j += 2) {
      vf ds[2][2] = {{zero(), zero()}, {zero(), zero()}};
      for (int v = 0; v < vectors; v++)
        for (int64_t i = 0; i < min(2, n - j); i++) {
          const int64_t at = (j + i) * kBlockM + r + v * kLanes, row = r + v * kLanes;
          ds[i][v] = load(weights + at) * (load(grad + at) + load(x.minus_delta + row)) * load(x.factor + row);
        }
      for (int64_t i = 0; i < min(2, n - j); i++) L::store_row_pairs(row_pairs, j + i, r, ds[i][0], ds[i][1]);
      for (int v = 0; v < vectors; v++) L::store_weights(key_pairs, j, r + v * kLanes, ds[0][v], &ds[1][v]);
    }
  }
}

// Adds a tile's ds to dk and dq. A null `ds` stands for pairs, which are already in the temporaries.
template <typename L>
static void add_score_gradients(const BackwardTask<L>& t, const Span& span, float* ds) {
  BackwardScratch<L>& s = t.s;
  float* dk = span.part == kPrefix ? t.sums.dprefix_k : t.sums.dk;
  if (dk) {
    dk += span.begin * t.p.k_dim.padded;
    if (span.part == kPrefix)
      L::sum_rows_exactly(s.block, span, ds, s.q, s.temporaries, dk);
    else if (ds)
      L::sum_rows(s.block, span, ds, s.q, s.temporaries, dk);
    else if constexpr (L::kPaired)
      L::sum_row_pairs(s.block, span, s.q, s.temporaries, dk);
  }
  if (!t.p.needs.dq) return;
  typename L::Word* weights = nullptr;
  if constexpr (L::kPaired) weights = s.temporaries.key_pairs;
  if (ds) weights = L::key_weights(span, ds, s.temporaries);
  L::sum_keys(s.block, span, weights, t.tile(span.part, span.begin).by_key, {s.dq_sums, t.p.k_dim, true});
}

// Third walk: turns `grads` into the gradients of the products.
template <typename L>
static void walk_scores(const BackwardTask<L>& t, Walk walk) {
  BackwardScratch<L>& s = t.s;
  const Part part = walk.part;
  const TileRange range = tiles_of(t.target.seq, s.block, part);
  const float scale = (float)t.p.args->scale;
  const bool capped = t.p.args->softcap != 0.0;
  const bool through_scores = part == kPrefix ? t.sums.dprefix_bias != nullptr : t.sums.dbias != nullptr;
  ScoreGradients x;
  for (int64_t r = 0; r < kBlockM; r++) {
    x.minus_delta[r] = s.dlse[part][r] - s.rowsum[part][r];
    x.factor[r] = s.part_scale[part][r] * (through_scores ? 1.0f : scale);
  }
  for (int64_t begin = range.begin; begin < range.end; begin += kBlockN) {
    const Span span = tile_span(s.block, part, range, begin);
    const int64_t at = s.tile_offset(walk.first_tile, range, begin);
    float *weights = s.weights + at, *grad = s.grads + at;
    if constexpr (L::kPaired)
      if (part == kSequence && !through_scores && !capped) {
        score_gradient_pairs<L>(x, span, weights, grad, s.temporaries);
        add_score_gradients(t, span, nullptr);
        continue;
      }
    score_gradients(x, span, weights, grad);
    if (through_scores) {
      if (part == kPrefix)
        add_prefix_bias_gradient(t, span, grad);
      else
        add_bias_gradient(t, span, grad);
      for (int64_t i = 0; i < span.n * kBlockM; i += kLanes) store(grad + i, load(grad + i) * scale);
    }
    if (capped)
      for (int64_t i = 0; i < span.n * kBlockM; i += kLanes) store(grad + i, load(grad + i) * load(s.slopes + at + i));
    add_score_gradients(t, span, grad);
  }
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif  // PEFTKERN_CPU_BACKWARD_SCORE_GRADS_H_
