// SPDX-License-Identifier: Apache-2.0
// What a backward needs and adds to, and the memory that a block of rows uses.
#ifndef PEFTKERN_CPU_ATTENTION_BACKWARD_SCRATCH_H_
#define PEFTKERN_CPU_ATTENTION_BACKWARD_SCRATCH_H_

#include "attention_forward.h"

namespace peftkern {
namespace PEFTKERN_ISA {

struct Needs {
  bool dq, dk, dv, dprefix_k, dprefix_v, dsinks, dbias, dprefix_bias, dgate;

  bool sequence() const { return dq || dk || dv || dbias; }
  bool scores() const { return dq || dk || dprefix_k || dsinks || dbias || dprefix_bias || dgate; }
  bool prefix() const { return sequence() || scores() || dprefix_v; }
};

// The sums that a task adds to. Null: not needed.
struct Sums {
  float *dk, *dv;                // [kv_len, dim.padded] of the sequence at hand
  float *dprefix_k, *dprefix_v;  // [prefix_len, dim.padded]
  float* dprefix_bias;           // [group_size, prefix_len]
  double *dsinks, *dgate;        // [group_size]
};

constexpr int64_t kTerms = 3;  // the number of bf16 terms whose sum is a float

struct BackwardScratch {
  float *q, *dout;              // [kBlockM][dim.padded] floats, for sums over rows in fp32
  float *q_panel, *dout_panel;  // for products with keys and values
  float *q_pairs, *dout_pairs;  // pairs of neighbouring rows, for sums over rows
  float *out, *dq;
  float* dq_sums;                           // for AMX: dq as [k_dim.padded][kBlockM]; else dq itself
  float *weights, *grads, *slopes;          // [tiles of prefix and sequence][kBlockN][kBlockM]
  float *factors, *applied;                 // [kBlockN][kBlockM]: dropout's factors; the weights that multiply values
  float *row_pairs, *key_pairs;             // a tile of weights or gradients as pairs of rows, as pairs of keys
  float* row_terms;                         // for AMX and the prefix: see split_rows()
  float lse[kBlockM], prefix_lse[kBlockM];  // prefix_lse: that of the separate softmax of calls with a gate
  float total[kBlockM], prefix_total[kBlockM];  // sums of the weights relative to them: 1 up to rounding
  float rowsum[2][kBlockM], part_scale[2][kBlockM], dlse[2][kBlockM];  // by Part
  float *dk, *dv;
  SequenceTiles tiles;
  Block block;
};

static void take_backward_scratch(const Problem& p, const Needs& needs, Arena& arena, BackwardScratch& s) {
  const int64_t k_dim = p.k_dim.padded, v_dim = p.v_dim.padded, tile = kBlockN * kBlockM;
  const int64_t length = round_up(p.plan->max_kv_len, kBlockN);
  const int64_t tile_keys = round_up(p.plan->max_prefix_len, kBlockN) + (needs.sequence() ? length : 0);
  s.q = arena.take<float>(kBlockM * k_dim);
  s.q_panel = arena.take<float>(kBlockM * k_dim);
  s.q_pairs = arena.take<float>(p.pairs ? kBlockM * k_dim / 2 : 0);
  s.dout = arena.take<float>(kBlockM * v_dim);
  s.dout_panel = arena.take<float>(kBlockM * v_dim);
  s.dout_pairs = arena.take<float>(p.pairs ? kBlockM * v_dim / 2 : 0);
  s.out = arena.take<float>(kBlockM * v_dim);
  s.dq = arena.take<float>(kBlockM * k_dim);
  s.dq_sums = p.amx ? arena.take<float>(kBlockM * k_dim) : s.dq;
  s.weights = arena.take<float>(tile_keys * kBlockM);
  s.grads = arena.take<float>(tile_keys * kBlockM);
  s.slopes = arena.take<float>(p.args->softcap != 0.0 ? tile_keys * kBlockM : 0);
  s.factors = arena.take<float>(p.args->dropout_p > 0.0 ? tile : 0);
  s.applied = arena.take<float>(p.args->dropout_p > 0.0 || p.args->gate ? tile : 0);
  s.row_pairs = arena.take<float>(p.pairs ? tile / 2 + kLanes : 0);  // a vector of pairs may end beyond the last key
  s.key_pairs = arena.take<float>(p.pairs ? tile / 2 : 0);
  s.row_terms = arena.take<float>(p.amx ? kTerms * (tile / 2) + kLanes : 0);
  s.dk = arena.take<float>(needs.dk ? length * k_dim : 0);
  s.dv = arena.take<float>(needs.dv ? length * v_dim : 0);
  const int64_t widened = p.always_in_place ? 0 : length;
  s.tiles.k = arena.take<float>(widened * k_dim);
  s.tiles.v = arena.take<float>(widened * v_dim);
  s.tiles.length = widened;
  s.tiles.ready = arena.take<uint8_t>(p.plan->max_kv_len / kBlockN + 1);
  s.tiles.sequence = nullptr;
}

// The offset of a tile in weights, grads and slopes.
static int64_t tile_offset(int64_t first_tile, TileRange range, int64_t begin) {
  return (first_tile + (begin - range.begin) / kBlockN) * kBlockN * kBlockM;
}

static float* find(float* base, int64_t at) { return base ? base + at : nullptr; }

static Tile tile_at(const Problem& p, const Sequence& seq, int64_t kv_head, BackwardScratch& s, Part part,
                    int64_t begin) {
  return part == kPrefix ? prefix_tile(p, seq, kv_head, begin)
                         : s.tiles.get(p, begin, min(kBlockN, seq.kv_len - begin));
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif  // PEFTKERN_CPU_ATTENTION_BACKWARD_SCRATCH_H_
