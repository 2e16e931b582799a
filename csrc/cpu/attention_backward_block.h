// SPDX-License-Identifier: Apache-2.0
// Backward of a block of rows, three walks over the tiles:
//
//   products  w = 2^(score - lse), g = dout . v
//   weights   w /= sum over keys of w, rowsum = sum over keys of w g; dv += w^T dout
//   scores    ds = w (g - delta) slope scale, delta = rowsum - dlse; dk += ds^T q, dq += ds k
//
// w and g of all tiles are kept between the walks. So the gradients contain neither the rounding of lse nor that of a
// half-precision out, and those of the prefix are accurate to fp32. If only the prefix's gradient is needed (in a
// model's first layer), lse and rowsum = dout . out are used as they are and the sequence's keys are not read.
#ifndef PEFTKERN_CPU_ATTENTION_BACKWARD_BLOCK_H_
#define PEFTKERN_CPU_ATTENTION_BACKWARD_BLOCK_H_

#include "attention_backward_sums.h"

namespace peftkern {
namespace PEFTKERN_ISA {

// Second walk: weights that sum to one, dropout, dv, rowsum.
static void walk_weights(const Problem& p, const Sequence& seq, BackwardScratch& s, Part part, int64_t first_tile,
                         float* dv, bool normalize, bool sum_rows) {
  const peftkern_attention& a = *p.args;
  const TileRange range = tiles_of(seq, s.block, part);
  const float* total = part == kPrefix && a.gate ? s.prefix_total : s.total;
  const bool gated = part == kPrefix && a.gate;
  for (int64_t begin = range.begin; begin < range.end; begin += kBlockN) {
    const int64_t n = min(kBlockN, range.end - begin), at = tile_offset(first_tile, range, begin);
    float *weights = s.weights + at, *grad = s.grads + at;
    const RowRange rows = rows_of(s.block, part, begin, n);
    const bool dropout = a.dropout_p > 0.0;
    if (dropout) dropout_factors(p, seq, s.block, part, begin, n, rows, s.factors);
    // Two vectors of rows at a time, as many as a vector of pairs of rows holds.
    const bool paired = p.pairs && part == kSequence && !dropout && dv;
    for (int64_t r = rows.begin; r < rows.end; r += 2 * kLanes) {
      const int vectors = r + kLanes < rows.end ? 2 : 1;
      vf sum[2], inverse[2], gate[2], rowsum[2] = {zero(), zero()}, applied[2] = {zero(), zero()};
      for (int u = 0; u < vectors; u++) {
        sum[u] = load(total + r + u * kLanes);
        inverse[u] = select(sum[u] == 0.0f, zero(), 1.0f / sum[u]);
        gate[u] = load(s.part_scale[part] + r + u * kLanes);
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
            const vf keep = load(s.factors + i);
            g *= keep;
            applied[u] *= keep;
            store(grad + i, g);
          }
          rowsum[u] += w * g;
          if (dropout || gated) store(s.applied + i, applied[u] * gate[u]);
        }
        if (paired) store_row_pairs(s.row_pairs, j, r, applied[0], applied[1]);
      }
      for (int u = 0; u < vectors && sum_rows; u++) {
        float* at_row = s.rowsum[part] + r + u * kLanes;
        store(at_row, load(at_row) + rowsum[u]);
      }
    }
    if (dv)
      add_over_rows(p, s, part, begin, n, rows,
                    paired             ? nullptr
                    : dropout || gated ? s.applied
                                       : weights,
                    p.v_dim, s.dout, s.dout_pairs, dv + begin * p.v_dim.padded);
  }
}

// Adds a tile's ds to the gradient of the prefix's or the sequence's bias.
static void add_bias_gradients(const Problem& p, const Sequence& seq, const Block& block, Part part, int64_t begin,
                               int64_t n, RowRange rows, const float* ds, const Sums& sums, float* dbias,
                               const int64_t* size) {
  for (int64_t r = rows.begin; r < min(rows.end, block.count); r++) {
    const int64_t head = block.head[r];
    if (part == kPrefix) {
      float* row = sums.dprefix_bias + (head % p.plan->group_size) * p.args->prefix_len + begin;
      for (int64_t j = 0; j < n; j++) row[j] += ds[j * kBlockM + r];
      continue;
    }
    const int64_t index[3] = {seq.batch, head, block.row[r]};
    int64_t row = 0;
    for (int i = 0; i < 3; i++) row = row * size[i] + (size[i] == 1 ? 0 : index[i]);
    float* at_row = dbias + row * size[3];
    float sum = 0.0f;
    for (int64_t j = 0; j < n; j++) {
      if (size[3] > 1) at_row[seq.start + begin + j] += ds[j * kBlockM + r];
      sum += ds[j * kBlockM + r];
    }
    if (size[3] == 1) *at_row += sum;
  }
}

// Third walk: turns `grads` into the gradients of the products.
static void walk_scores(const Problem& p, const Needs& needs, const Sequence& seq, int64_t kv_head, BackwardScratch& s,
                        Part part, int64_t first_tile, float* dk, const Sums& sums, float* dbias,
                        const peftkern_attention_backward& b) {
  const peftkern_attention& a = *p.args;
  const TileRange range = tiles_of(seq, s.block, part);
  const float scale = (float)a.scale;
  const bool through_scores = (part == kPrefix && sums.dprefix_bias) || (part == kSequence && dbias);
  alignas(64) float minus_delta[kBlockM], factors[kBlockM];
  for (int64_t r = 0; r < kBlockM; r++) {
    minus_delta[r] = s.dlse[part][r] - s.rowsum[part][r];
    factors[r] = s.part_scale[part][r] * (through_scores ? 1.0f : scale);
  }
  for (int64_t begin = range.begin; begin < range.end; begin += kBlockN) {
    const int64_t n = min(kBlockN, range.end - begin), at = tile_offset(first_tile, range, begin);
    const RowRange rows = rows_of(s.block, part, begin, n);
    float *weights = s.weights + at, *grad = s.grads + at;
#if PEFTKERN_HAS_PAIRS
    if (p.pairs && part == kSequence && !through_scores && a.softcap == 0.0) {
      pair_score_gradients(s, weights, grad, n, rows, minus_delta, factors);
      if (dk) add_over_rows(p, s, part, begin, n, rows, nullptr, p.k_dim, s.q, s.q_pairs, dk + begin * p.k_dim.padded);
      if (needs.dq) add_over_keys(p, s, part, tile_at(p, seq, kv_head, s, part, begin), begin, n, rows, nullptr);
      continue;
    }
#endif
    for (int64_t r = rows.begin; r < rows.end; r += kLanes) {
      const vf minus = load(minus_delta + r), factor = load(factors + r);
      for (int64_t j = 0; j < n; j++) {
        const int64_t i = j * kBlockM + r;
        store(grad + i, load(weights + i) * (load(grad + i) + minus) * factor);
      }
    }
    if (through_scores) {
      add_bias_gradients(p, seq, s.block, part, begin, n, rows, grad, sums, dbias, b.bias_size);
      for (int64_t i = 0; i < n * kBlockM; i += kLanes) store(grad + i, load(grad + i) * scale);
    }
    if (a.softcap != 0.0)
      for (int64_t i = 0; i < n * kBlockM; i += kLanes) store(grad + i, load(grad + i) * load(s.slopes + at + i));
    if (dk) add_over_rows(p, s, part, begin, n, rows, grad, p.k_dim, s.q, s.q_pairs, dk + begin * p.k_dim.padded);
    if (needs.dq) add_over_keys(p, s, part, tile_at(p, seq, kv_head, s, part, begin), begin, n, rows, grad);
  }
}

// Loads rows of q or dout in all forms that the walks read.
static void load_rows(const Problem& p, const Block& block, const void* data, const int64_t* stride, HeadDim dim,
                      [[maybe_unused]] bool in_fp32, float* rows, float* panel, [[maybe_unused]] float* pairs) {
  load_panel(p, block, data, stride, dim, rows, panel);
#if PEFTKERN_HAS_PAIRS
  if (!p.pairs) return;
  gather_row_pairs(p, block, data, stride, dim, pairs);
  if (in_fp32) gather_rows(p, block, data, stride, dim, rows);
#endif
}

// Sets the sums and statistics of the block's rows that the walks start from.
static void start_rows(const peftkern_attention& a, const peftkern_attention_backward& b, const Sequence& seq,
                       BackwardScratch& s) {
  const Block& block = s.block;
  for (int64_t r = 0; r < block.vectors * kLanes; r++) {
    const int64_t head = block.head[r], at = block.row[r];
    const float lse = a.lse[(seq.batch * a.num_heads + head) * a.q_len + at];
    s.lse[r] = lse == -kInf ? kInf : (float)(lse * kLog2e);  // rounded only once: an error here affects the whole row
    const float dlse = b.dlse && r < block.count
                           ? b.dlse[seq.batch * b.dlse_stride[0] + head * b.dlse_stride[1] + at * b.dlse_stride[2]]
                           : 0.0f;
    s.dlse[kSequence][r] = dlse;
    s.dlse[kPrefix][r] = a.gate ? 0.0f : dlse;
    s.rowsum[kSequence][r] = s.rowsum[kPrefix][r] = s.prefix_total[r] = 0.0f;
    s.total[r] = a.sinks ? (float)std::exp2((double)a.sinks[head] * kLog2e - s.lse[r]) : 0.0f;
    s.part_scale[kSequence][r] = 1.0f;
    s.part_scale[kPrefix][r] = a.gate ? std::tanh(a.gate[head]) : 1.0f;
  }
}

// Completes rowsum after the second walk; adds to the gradients of the sinks and the gate. `exact`: the walk has summed
// over the sequence; else rowsum is computed from out.
static void finish_rowsums(const Problem& p, BackwardScratch& s, const Sums& sums, bool exact) {
  const peftkern_attention& a = *p.args;
  const Block& block = s.block;
  const int64_t dim = p.v_dim.padded;
  if (!exact) gather_rows(p, block, a.out, a.out_stride, p.v_dim, s.out);
  for (int64_t r = 0; r < block.vectors * kLanes; r++) {
    float& rowsum = s.rowsum[kSequence][r];
    const float prefix_rowsum = s.rowsum[kPrefix][r];
    if (exact && !a.gate) rowsum += prefix_rowsum;
    if (!exact) {
      vf sum = zero();
      for (int64_t d = 0; d < dim; d += kLanes) sum += load(s.out + r * dim + d) * load(s.dout + r * dim + d);
      rowsum = reduce_add(sum) - (a.gate ? s.part_scale[kPrefix][r] * prefix_rowsum : 0.0f);
    }
    if (!a.gate) s.rowsum[kPrefix][r] = rowsum;
    if (r >= block.count) continue;
    const int64_t head = block.head[r] % p.plan->group_size;
    if (sums.dgate)
      sums.dgate[head] += (1.0 - (double)s.part_scale[kPrefix][r] * s.part_scale[kPrefix][r]) * prefix_rowsum;
    if (sums.dsinks && s.lse[r] != kInf)
      sums.dsinks[head] += std::exp2((double)a.sinks[block.head[r]] * kLog2e - s.lse[r]) / (exact ? s.total[r] : 1.0f) *
                           (double)(s.dlse[kSequence][r] - rowsum);
  }
}

static void backward_block(const Problem& p, const Needs& needs, const peftkern_attention_backward& b,
                           const Sequence& seq, int64_t kv_head, BackwardScratch& s, const Sums& sums, float* dbias) {
  const peftkern_attention& a = *p.args;
  const Block& block = s.block;
  const int64_t dim = p.k_dim.padded;  // of dq
  const int64_t prefix_tiles = needs.prefix() ? num_tiles(tiles_of(seq, block, kPrefix)) : 0;
  const bool floats = prefix_tiles && !p.amx;  // the prefix's gradients multiply floats, not terms
  load_rows(p, block, a.q, a.q_stride, p.k_dim, floats && sums.dprefix_k, s.q, s.q_panel, s.q_pairs);
  load_rows(p, block, b.dout, b.dout_stride, p.v_dim, !needs.sequence() || (floats && sums.dprefix_v), s.dout,
            s.dout_panel, s.dout_pairs);
  start_rows(a, b, seq, s);
  const bool exact = needs.sequence();
  if (prefix_tiles) walk_products(p, needs, seq, kv_head, s, kPrefix, 0);
  if (exact) walk_products(p, needs, seq, kv_head, s, kSequence, prefix_tiles);
  const bool prefix_exact = exact || a.gate;
  if (prefix_tiles) walk_weights(p, seq, s, kPrefix, 0, sums.dprefix_v, prefix_exact, prefix_exact);
  if (exact) walk_weights(p, seq, s, kSequence, prefix_tiles, sums.dv, true, true);
  if (!needs.scores()) return;
  finish_rowsums(p, s, sums, exact);
  const bool prefix_scores_needed = needs.dq || sums.dprefix_k || sums.dprefix_bias;
  if (needs.dq) memset(s.dq_sums, 0, sizeof(float) * (p.amx ? kBlockM : block.count) * dim);
  if (prefix_tiles && prefix_scores_needed)
    walk_scores(p, needs, seq, kv_head, s, kPrefix, 0, sums.dprefix_k, sums, nullptr, b);
  if (needs.dq || needs.dk || dbias)
    walk_scores(p, needs, seq, kv_head, s, kSequence, prefix_tiles, sums.dk, sums, dbias, b);
#if PEFTKERN_HAS_AMX
  if (p.amx && needs.dq) transpose_sums(block, p.k_dim, s.dq_sums, s.dq);
#endif
  if (needs.dq)
    for (int64_t r = 0; r < block.count; r++) {
      const int64_t at = seq.batch * b.dq_stride[0] + block.head[r] * b.dq_stride[1] + block.row[r] * b.dq_stride[2];
      narrow_row(s.dq + r * dim, 1.0f, p.k_dim.size, a.dtype, const_cast<char*>(offset(b.dq, a.dtype, at)));
    }
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif  // PEFTKERN_CPU_ATTENTION_BACKWARD_BLOCK_H_
