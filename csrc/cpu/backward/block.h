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
#ifndef PEFTKERN_CPU_BACKWARD_BLOCK_H_
#define PEFTKERN_CPU_BACKWARD_BLOCK_H_

#include "score_grads.h"
#include "weights.h"

namespace peftkern {
namespace PEFTKERN_ISA {

// Whether a sink has all the weight of a row, as lse is the sink up to rounding. Beyond `huge`, rounding lse moves
// weights that are computed from it by more than other keys can.
static bool has_all_weight(float sink, float lse, float huge) {
  constexpr float kRounding = 5e-7f;
  const float seen = sink_score(sink) * (float)kLn2;
  return sink == kInf || (std::fabs(sink) > huge && std::fabs(lse - seen) < kRounding * std::fabs(seen));
}

// The weight of a sink relative to `base`, which is lse in units of ln 2, as those of the keys are.
static double sink_weight(float sink, float lse, float base) {
  constexpr float kHuge = 1 << 26;  // beyond, the power of two may overflow
  return has_all_weight(sink, lse, kHuge) ? 1.0 : std::exp2((double)sink * kLog2e - base);
}

// The share of a sink in the weights of a row.
static double sink_share(float sink, float lse) {
  constexpr float kHuge = 1 << 12;
  return has_all_weight(sink, lse, kHuge) ? 1.0 : std::exp2(((double)sink - lse) * kLog2e);
}

// Sets the sums and statistics of the block's rows that the walks start from.
template <typename L>
static void start_rows(const BackwardTask<L>& t) {
  const peftkern_attention& a = *t.p.args;
  const peftkern_attention_backward& b = t.p.gradients;
  BackwardScratch<L>& s = t.s;
  const Block& block = s.block;
  const int64_t batch = t.target.seq.batch;
  for (int64_t r = 0; r < block.vectors * kLanes; r++) {
    const int64_t head = block.head[r], at = block.row[r];
    const float lse = a.lse[(batch * a.num_heads + head) * a.q_len + at];
    s.lse[r] = lse == -kInf ? kInf : (float)(lse * kLog2e);  // rounded only once: an error here affects the whole row
    const float dlse = b.dlse && r < block.count
                           ? b.dlse[batch * b.dlse_stride[0] + head * b.dlse_stride[1] + at * b.dlse_stride[2]]
                           : 0.0f;
    s.dlse[kSequence][r] = dlse;
    s.dlse[kPrefix][r] = a.gate ? 0.0f : dlse;
    s.rowsum[kSequence][r] = s.rowsum[kPrefix][r] = s.prefix_total[r] = 0.0f;
    s.total[r] = a.sinks ? (float)sink_weight(a.sinks[head], lse, s.lse[r]) : 0.0f;
    s.part_scale[kSequence][r] = 1.0f;
    s.part_scale[kPrefix][r] = a.gate ? std::tanh(a.gate[head]) : 1.0f;
  }
}

// Completes rowsum after the second walk; adds to the gradients of the sinks and the gate. If the walk has not summed
// over the sequence, rowsum is computed from out.
template <typename L>
static void finish_rowsums(const BackwardTask<L>& t) {
  const peftkern_attention& a = *t.p.args;
  BackwardScratch<L>& s = t.s;
  const Block& block = s.block;
  const int64_t dim = t.p.v_dim.padded;
  const bool exact = t.p.needs.sequence();
  if (!exact) gather_rows(t.p, block, {a.out, a.out_stride, t.p.v_dim}, s.out);
  for (int64_t r = 0; r < block.vectors * kLanes; r++) {
    float& rowsum = s.rowsum[kSequence][r];
    const float prefix_rowsum = s.rowsum[kPrefix][r];
    if (exact && !a.gate) rowsum += prefix_rowsum;
    if (!exact) {
      vf sum = zero();
      for (int64_t d = 0; d < dim; d += kLanes) sum += load(s.out + r * dim + d) * load(s.dout.rows + r * dim + d);
      rowsum = reduce_add(sum) - (a.gate ? s.part_scale[kPrefix][r] * prefix_rowsum : 0.0f);
    }
    if (!a.gate) s.rowsum[kPrefix][r] = rowsum;
    if (r >= block.count) continue;
    const int64_t head = block.head[r] % t.p.plan->group_size;
    if (t.sums.dgate)
      t.sums.dgate[head] += (1.0 - (double)s.part_scale[kPrefix][r] * s.part_scale[kPrefix][r]) * prefix_rowsum;
    if (!t.sums.dsinks || s.lse[r] == kInf) continue;
    const float sink = a.sinks[block.head[r]];
    const float lse = a.lse[(block.sample[r] * a.num_heads + block.head[r]) * a.q_len + block.row[r]];
    const double share = exact ? sink_weight(sink, lse, s.lse[r]) / s.total[r] : sink_share(sink, lse);
    t.sums.dsinks[head] += share * (double)(s.dlse[kSequence][r] - rowsum);
  }
}

template <typename L>
static void store_dq(const BackwardTask<L>& t) {
  const peftkern_attention_backward& b = t.p.gradients;
  const Block& block = t.s.block;
  L::finish_sums(block, t.p.k_dim, t.s.dq_sums, t.s.dq);
  for (int64_t r = 0; r < block.count; r++) {
    const int64_t at =
        t.target.seq.batch * b.dq_stride[0] + block.head[r] * b.dq_stride[1] + block.row[r] * b.dq_stride[2];
    void* out = const_cast<char*>(offset(b.dq, t.p.args->dtype, at));
    narrow_row(t.s.dq + r * t.p.k_dim.padded, 1.0f, t.p.k_dim.size, t.p.args->dtype, out);
  }
}

template <typename L>
static void backward_block(const BackwardTask<L>& t) {
  const BackwardProblem<L>& p = t.p;
  BackwardScratch<L>& s = t.s;
  const Needs& needs = p.needs;
  const Sums& sums = t.sums;
  const int64_t prefix_tiles = needs.prefix() ? tiles_of(t.target.seq, s.block, kPrefix).tiles() : 0;
  const Walk prefix{kPrefix, 0}, sequence{kSequence, prefix_tiles};
  L::load_factor(p, s.block, p.q(), prefix_tiles && sums.dprefix_k, s.q);
  L::load_factor(p, s.block, p.dout(), prefix_tiles && sums.dprefix_v, s.dout);
  const bool exact = needs.sequence();
  if (L::kPaired && !exact) gather_rows(p, s.block, p.dout(), s.dout.rows);  // finish_rowsums() reads them
  start_rows(t);
  if (prefix_tiles) walk_products(t, prefix);
  if (exact) walk_products(t, sequence);
  if (prefix_tiles) walk_weights(t, prefix);
  if (exact) walk_weights(t, sequence);
  if (!needs.scores()) return;
  finish_rowsums(t);
  if (needs.dq) L::clear_sums(s.block, p.k_dim, s.dq_sums);
  if (prefix_tiles && (needs.dq || sums.dprefix_k || sums.dprefix_bias)) walk_scores(t, prefix);
  if (needs.dq || needs.dk || sums.dbias) walk_scores(t, sequence);
  if (needs.dq) store_dq(t);
}

// The backward of row blocks first, first + step, ... of a sequence.
template <typename L>
static void backward_blocks(const BackwardTask<L>& t, int64_t first, int64_t step) {
  const Plan& plan = *t.p.plan;
  t.s.tiles.open(t.p, t.target, true);
  for (int64_t block = first; block < num_position_blocks(plan, t.target.seq); block += step) {
    prefetch_rows(t.p, t.target, block + step, t.p.q());
    prefetch_rows(t.p, t.target, block + step, t.p.dout());
    for (int64_t head = 0; head < plan.group_size; head += plan.heads_per_block) {
      make_block(t.p, t.target, block, head, t.s.block);
      backward_block(t);
    }
  }
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif  // PEFTKERN_CPU_BACKWARD_BLOCK_H_
