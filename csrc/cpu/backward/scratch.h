// SPDX-License-Identifier: Apache-2.0
// What a backward needs and adds to, and the memory that a block of rows uses.
#ifndef PEFTKERN_CPU_BACKWARD_SCRATCH_H_
#define PEFTKERN_CPU_BACKWARD_SCRATCH_H_

#include "../layouts/fp32.h"
#include "../tiles.h"

namespace peftkern {
namespace PEFTKERN_ISA {

struct Needs {
  bool dq, dk, dv, dprefix_k, dprefix_v, dsinks, dbias, dprefix_bias, dgate;

  bool sequence() const { return dq || dk || dv || dbias; }
  bool scores() const { return dq || dk || dprefix_k || dsinks || dbias || dprefix_bias || dgate; }
  bool prefix() const { return sequence() || scores() || dprefix_v; }
};

// A backward in the layout L.
template <typename L>
struct BackwardProblem : Problem<L> {
  const peftkern_attention_backward& gradients;
  Needs needs;

  BackwardProblem(const peftkern_attention_backward& b, const Plan& p, const Needs& n)
      : Problem<L>(b.forward, p, true), gradients(b), needs(n) {}

  Tensor dout() const { return {gradients.dout, gradients.dout_stride, this->v_dim}; }
};

// The sums that a task adds to. Null: not needed.
struct Sums {
  float *dk, *dv;                // [kv_len, dim.padded] of the sequence at hand
  float *dprefix_k, *dprefix_v;  // [prefix_len, dim.padded]
  float* dprefix_bias;           // [group_size, prefix_len]
  double *dsinks, *dgate;        // [group_size]
  float* dbias;                  // of all tasks
};

template <typename L>
struct BackwardScratch {
  typedef typename L::Word Word;

  RowFactor<Word> q, dout;
  float *out, *dq;
  float* dq_sums;                   // to which L::sum_keys() adds; finish_sums() writes them to `dq`
  float *weights, *grads, *slopes;  // [tiles of prefix and sequence][kBlockN][kBlockM]
  float *factors, *applied;         // [kBlockN][kBlockM]: dropout's factors; the weights that multiply values
  typename L::Temporaries temporaries;
  float lse[kBlockM], prefix_lse[kBlockM];      // prefix_lse: that of the separate softmax of calls with a gate
  float total[kBlockM], prefix_total[kBlockM];  // sums of the weights relative to them: 1 up to rounding
  float rowsum[2][kBlockM], part_scale[2][kBlockM], dlse[2][kBlockM];  // by Part
  float *dk, *dv;
  Tiles<L> tiles;
  Block block;

  void take(const BackwardProblem<L>& p, Arena& arena) {
    const int64_t k_dim = p.k_dim.padded, v_dim = p.v_dim.padded, tile = kBlockN * kBlockM;
    const int64_t length = round_up(p.plan->max_kv_len, kBlockN);
    const int64_t tile_keys = round_up(p.plan->max_prefix_len, kBlockN) + (p.needs.sequence() ? length : 0);
    take_rows(arena, p.k_dim, q);
    take_rows(arena, p.v_dim, dout);
    out = arena.take<float>(kBlockM * v_dim);
    dq = arena.take<float>(kBlockM * k_dim);
    dq_sums = L::kSumsApart ? arena.take<float>(kBlockM * k_dim) : dq;
    weights = arena.take<float>(tile_keys * kBlockM);
    grads = arena.take<float>(tile_keys * kBlockM);
    slopes = arena.take<float>(p.args->softcap != 0.0 ? tile_keys * kBlockM : 0);
    factors = arena.take<float>(p.args->dropout_p > 0.0 ? tile : 0);
    applied = arena.take<float>(p.args->dropout_p > 0.0 || p.args->gate ? tile : 0);
    temporaries.take(arena);
    dk = arena.take<float>(p.needs.dk ? length * k_dim : 0);
    dv = arena.take<float>(p.needs.dv ? length * v_dim : 0);
    tiles.take(p, all_in_place<L>(p) ? 0 : length, p.plan->max_kv_len, arena);
    block.step = L::kRowStep;
  }

  // Where the weights, gradients and slopes of a tile lie.
  int64_t tile_offset(int64_t first_tile, TileRange range, int64_t begin) const {
    return (first_tile + (begin - range.begin) / kBlockN) * kBlockN * kBlockM;
  }

 private:
  static void take_rows(Arena& arena, HeadDim dim, RowFactor<Word>& x) {
    x.rows = arena.take<float>(kBlockM * dim.padded);
    x.panel = arena.take<Word>(kBlockM * dim.padded);
    x.pairs = arena.take<Word>(L::kPaired ? kBlockM * dim.padded / 2 : 0);
    x.dim = dim;
  }
};

// A block of rows and the part of its keys that a walk goes over. Their tiles are kept from `first_tile` on.
struct Walk {
  Part part;
  int64_t first_tile;
};

// The backward of the blocks of rows that read one kv head of a sequence.
template <typename L>
struct BackwardTask {
  const BackwardProblem<L>& p;
  const PackedPrefixes<L>& prefixes;
  BackwardScratch<L>& s;
  Target target;
  Sums sums;

  Tile<typename L::Word> tile(Part part, int64_t begin) const {
    return part == kPrefix ? prefixes.tile(p, target, begin) : s.tiles.get(p, begin);
  }
};

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif  // PEFTKERN_CPU_BACKWARD_SCRATCH_H_
