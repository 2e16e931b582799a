// SPDX-License-Identifier: Apache-2.0
// Backward of a block of rows, three walks over the tiles:
//
//   products  w = 2^(score - lse), g = dout . v
//   weights   w /= sum over keys of w, delta = sum over keys of w g; dv += w^T dout
//   scores    ds = w (g - delta + dlse) slope scale; dk += ds^T q, dq += ds k
//
// w and g of all tiles are kept between the walks. So neither the rounding of lse nor that of a half-precision out is in
// the gradients, and those of the prefix are right to fp32. Where only the prefix's gradient is wanted (a model's first
// layer), lse and delta = dout . out serve as they are and the sequence's keys are not looked at.
#ifndef PEFTKERN_CPU_ATTENTION_BACKWARD_BLOCK_H_
#define PEFTKERN_CPU_ATTENTION_BACKWARD_BLOCK_H_

#include "attention_forward.h"

namespace peftkern {
namespace PEFTKERN_ISA {

struct Needs {
  bool dq, dk, dv, dprefix_k, dprefix_v, dsinks, dbias, dprefix_bias, dgate;

  bool sequence() const { return dq || dk || dv || dbias; }
  bool scores() const { return dq || dk || dprefix_k || dsinks || dbias || dprefix_bias || dgate; }
  bool prefix() const { return sequence() || scores() || dprefix_v; }
};

// What a task adds to. Null where not needed.
struct Sums {
  float *dk, *dv;                // [kv_len, padded_dim] of the sequence at hand
  float *dprefix_k, *dprefix_v;  // [prefix_len, padded_dim]
  float* dprefix_bias;           // [group_size, prefix_len]
  double *dsinks, *dgate;        // [group_size]
};

constexpr int64_t kTerms = 3;  // bf16 numbers whose sum is a float

struct BackwardScratch {
  float *q, *dout;              // [kBlockM][padded_dim] floats, for sums over rows that are made in fp32
  float *q_panel, *dout_panel;  // for products with keys and values
  float *q_pairs, *dout_pairs;  // pairs of neighbouring rows, for sums over rows
  float *out, *dq;
  float* dq_sums;               // dq as sums over keys are made for AMX, [padded_dim][kBlockM]; else dq
  float *weights, *grads, *slopes;  // [tiles of prefix and sequence][kBlockN][kBlockM]
  float *factors, *applied;         // [kBlockN][kBlockM]: of dropout; weights as values see them
  float *row_pairs, *key_pairs;     // a tile of weights or gradients in pairs of rows, of keys
  float* row_terms;                 // of the prefix, for AMX: see split_rows
  float lse[kBlockM], prefix_lse[kBlockM];  // prefix_lse: of the prefix's own softmax (gate)
  float total[kBlockM], prefix_total[kBlockM];  // sums of weights relative to them, 1 but for rounding
  float delta[2][kBlockM], part_scale[2][kBlockM], dlse[2][kBlockM];  // by Part
  float *dk, *dv;
  SequenceTiles tiles;
  Block block;
};

static void take_backward_scratch(const Problem& p, const Needs& needs, Arena& arena, BackwardScratch& s) {
  const int64_t dim = p.padded_dim, rows = kBlockM * dim, tile = kBlockN * kBlockM;
  const int64_t length = round_up(p.plan->max_kv_len, kBlockN);
  const int64_t tile_keys = round_up(p.plan->max_prefix_len, kBlockN) + (needs.sequence() ? length : 0);
  s.q = arena.take<float>(rows);
  s.q_panel = arena.take<float>(rows);
  s.q_pairs = arena.take<float>(p.pairs ? rows / 2 : 0);
  s.dout = arena.take<float>(rows);
  s.dout_panel = arena.take<float>(rows);
  s.dout_pairs = arena.take<float>(p.pairs ? rows / 2 : 0);
  s.out = arena.take<float>(rows);
  s.dq = arena.take<float>(rows);
  s.dq_sums = p.amx ? arena.take<float>(rows) : s.dq;
  s.weights = arena.take<float>(tile_keys * kBlockM);
  s.grads = arena.take<float>(tile_keys * kBlockM);
  s.slopes = arena.take<float>(p.args->softcap != 0.0 ? tile_keys * kBlockM : 0);
  s.factors = arena.take<float>(p.args->dropout_p > 0.0 ? tile : 0);
  s.applied = arena.take<float>(p.args->dropout_p > 0.0 || p.args->gate ? tile : 0);
  s.row_pairs = arena.take<float>(p.pairs ? tile / 2 + kLanes : 0);  // vectors of pairs may end behind the last key
  s.key_pairs = arena.take<float>(p.pairs ? tile / 2 : 0);
  s.row_terms = arena.take<float>(p.amx ? kTerms * (tile / 2) + kLanes : 0);
  s.dk = arena.take<float>(needs.dk ? length * dim : 0);
  s.dv = arena.take<float>(needs.dv ? length * dim : 0);
  const int64_t widened = p.always_in_place ? 0 : length;
  s.tiles.k = arena.take<float>(widened * dim);
  s.tiles.v = arena.take<float>(widened * dim);
  s.tiles.length = widened;
  s.tiles.ready = arena.take<uint8_t>(p.plan->max_kv_len / kBlockN + 1);
  s.tiles.sequence = nullptr;
}

// Where a tile's weights, grads and slopes lie.
static int64_t tile_offset(int64_t first_tile, TileRange range, int64_t begin) {
  return (first_tile + (begin - range.begin) / kBlockN) * kBlockN * kBlockM;
}

static float* find(float* base, int64_t at) { return base ? base + at : nullptr; }

static Tile tile_at(const Problem& p, const Sequence& seq, int64_t kv_head, BackwardScratch& s, Part part,
                    int64_t begin) {
  return part == kPrefix ? prefix_tile(p, seq, kv_head, begin)
                         : s.tiles.get(p, begin, least(kBlockN, seq.kv_len - begin));
}

// The prefix's own softmax (gate): its scores are left in `weights`, the logarithm of its denominator in
// `prefix_lse`.
static void prefix_scores(const Problem& p, const Sequence& seq, int64_t kv_head, BackwardScratch& s,
                          TileRange range) {
  float pivot[kBlockM], sum[kBlockM];
  for (int64_t r = 0; r < kBlockM; r++) pivot[r] = -kInf, sum[r] = 0.0f;
  for (int64_t begin = range.begin; begin < range.end; begin += kBlockN) {
    const int64_t n = least(kBlockN, range.end - begin), at = tile_offset(0, range, begin);
    const RowRange rows = rows_of(s.block, kPrefix, begin, n);
    float* scores = s.weights + at;
    multiply_rows(p, prefix_tile(p, seq, kv_head, begin).k, 0, n, s.q_panel + rows.begin, rows.end - rows.begin,
                  Store{scores + rows.begin, kBlockM, false});
    const float factor = finish_scores(p, seq, s.block, kPrefix, begin, n, rows, scores,
                                       find(p.args->softcap != 0.0 ? s.slopes : nullptr, at));
    for (int64_t r = rows.begin; r < rows.end; r += kLanes) {
      vf best = load(pivot + r);
      for (int64_t j = 0; j < n; j++) {
        const vf score = load(scores + j * kBlockM + r) * factor;
        store(scores + j * kBlockM + r, score);
        best = max(best, score);
      }
      const vf base = select(best == -kInf, zero(), best);
      vf total = load(sum + r) * exp2(load(pivot + r) - base);
      for (int64_t j = 0; j < n; j++) total += exp2(load(scores + j * kBlockM + r) - base);
      store(pivot + r, best);
      store(sum + r, total);
    }
  }
  for (int64_t r = 0; r < kBlockM; r++) s.prefix_lse[r] = sum[r] == 0.0f ? kInf : pivot[r] + std::log2(sum[r]);
}

static void clear_keys(float* x, int64_t key, int64_t count, RowRange rows) {
  for (int64_t j = key; j < key + count; j++)
    for (int64_t r = rows.begin; r < rows.end; r += kLanes) store(x + j * kBlockM + r, zero());
}

// Products to weights relative to lse while they are in registers.
template <bool kSomeHidden>
struct Relate {
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

static void relate_products(const Problem& p, const Sequence& seq, BackwardScratch& s, Part part, const Tile& tile,
                            int64_t begin, int64_t n, RowRange rows, float* weights) {
  const Hidden hidden = hidden_of(p, seq, s.block, part, begin);
  for_key_groups(p, s.block, part, begin, n, rows, [&](int64_t key, int64_t count, int64_t first, bool some_hidden) {
    clear_keys(weights, key, count, RowRange{rows.begin, first});
    const float* panel = s.q_panel + first;
    if (some_hidden)
      multiply_rows(p, tile.k, key, count, panel, rows.end - first,
                    Relate<true>{s.lse, s.total, weights, p.log2_scale, hidden, key, first});
    else
      multiply_rows(p, tile.k, key, count, panel, rows.end - first,
                    Relate<false>{s.lse, s.total, weights, p.log2_scale, hidden, key, first});
  });
}

// Scores, but for `factor`, to weights relative to lse.
static void relate_scores(const float* lse, float* total, float* weights, int64_t n, RowRange rows, float factor) {
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

// First walk over a part: weights, still relative to lse, and their gradients.
static void walk_products(const Problem& p, const Needs& needs, const Sequence& seq, int64_t kv_head, BackwardScratch& s,
                          Part part, int64_t first_tile) {
  const peftkern_attention& a = *p.args;
  const TileRange range = tiles_of(seq, s.block, part);
  const bool own_softmax = part == kPrefix && a.gate;
  if (own_softmax) prefix_scores(p, seq, kv_head, s, range);
  for (int64_t begin = range.begin; begin < range.end; begin += kBlockN) {
    const int64_t n = least(kBlockN, range.end - begin), at = tile_offset(first_tile, range, begin);
    const Tile tile = tile_at(p, seq, kv_head, s, part, begin);
    const RowRange rows = rows_of(s.block, part, begin, n);
    float *weights = s.weights + at, *grad = s.grads + at;
    if (own_softmax) {
      relate_scores(s.prefix_lse, s.prefix_total, weights, n, rows, 1.0f);
    } else if (!p.is_plain(part)) {
      multiply_rows(p, tile.k, 0, n, s.q_panel + rows.begin, rows.end - rows.begin,
                    Store{weights + rows.begin, kBlockM, false});
      const float factor = finish_scores(p, seq, s.block, part, begin, n, rows, weights,
                                         find(a.softcap != 0.0 ? s.slopes : nullptr, at));
      relate_scores(s.lse, s.total, weights, n, rows, factor);
    } else {
      relate_products(p, seq, s, part, tile, begin, n, rows, weights);
    }
    if (needs.scores())
      for_key_groups(p, s.block, part, begin, n, rows, [&](int64_t key, int64_t count, int64_t first, bool) {
        clear_keys(grad, key, count, RowRange{rows.begin, first});
        multiply_rows(p, tile.v, key, count, s.dout_panel + first, rows.end - first,
                      Store{grad + key * kBlockM + first, kBlockM, false});
      });
  }
}

// The rows that see keys i, i + 1, ... of a tile on the diagonal, counted from `first`: the range that their sums take.
struct SeeingRows {
  const int32_t* high;  // null: all
  int64_t begin, first, count;
  bool pairs;

  Range operator()(int64_t i, int64_t) const {
    int64_t row = 0;
    while (high && row < count && high[first + row] <= begin + i) row++;
    return pairs ? Range{row / 2, (count + 1) / 2} : Range{row, count};
  }
};

// Two vectors of rows r, r + 1, ... of key j, as pairs of neighbouring rows: what `add_over_rows` multiplies.
PEFTKERN_INLINE void store_row_pairs([[maybe_unused]] float* pairs, [[maybe_unused]] int64_t j,
                                     [[maybe_unused]] int64_t r, [[maybe_unused]] vf first, [[maybe_unused]] vf second) {
#if PEFTKERN_HAS_PAIRS
  const vu both = bf16_both(first, second);
  __builtin_memcpy(words(pairs) + (j * kBlockM + r) / 2, &both, sizeof both);
#endif
}

#if PEFTKERN_HAS_PAIRS
// A tile x [n][kBlockM] in pairs of neighbouring rows.
static void pair_rows(const float* x, int64_t n, RowRange rows, float* pairs) {
  for (int64_t j = 0; j < n; j++)
    for (int64_t r = rows.begin; r < rows.end; r += 2 * kLanes)
      store_row_pairs(pairs, j, r, load(x + j * kBlockM + r),
                      r + kLanes < rows.end ? load(x + j * kBlockM + r + kLanes) : zero());
}

// Pairs of neighbouring keys, as `add_over_keys` multiplies them.
static void pair_keys(const float* x, int64_t n, RowRange rows, float* pairs) {
  for (int64_t j = 0; j < n; j += 2)
    for (int64_t r = rows.begin; r < rows.end; r += kLanes) {
      const vf second = j + 1 < n ? load(x + (j + 1) * kBlockM + r) : zero();
      store_weights(words(pairs), j, r, load(x + j * kBlockM + r), &second);
    }
}

// ds = w (g + shift) factor of a tile, straight to pairs of rows and of keys.
static void pair_score_gradients(const BackwardScratch& s, const float* weights, const float* grad, int64_t n,
                                 RowRange rows, const float* shift, const float* factor) {
  for (int64_t r = rows.begin; r < rows.end; r += 2 * kLanes) {
    const int vectors = r + kLanes < rows.end ? 2 : 1;
    for (int64_t j = 0; j < n; j += 2) {
      vf ds[2][2] = {{zero(), zero()}, {zero(), zero()}};
      for (int v = 0; v < vectors; v++)
        for (int64_t i = 0; i < least(2, n - j); i++) {
          const int64_t at = (j + i) * kBlockM + r + v * kLanes, row = r + v * kLanes;
          ds[i][v] = load(weights + at) * (load(grad + at) + load(shift + row)) * load(factor + row);
        }
      for (int64_t i = 0; i < least(2, n - j); i++) store_row_pairs(s.row_pairs, j + i, r, ds[i][0], ds[i][1]);
      for (int v = 0; v < vectors; v++) store_weights(words(s.key_pairs), j, r + v * kLanes, ds[0][v], &ds[1][v]);
    }
  }
}
#endif

#if PEFTKERN_HAS_AMX
// A tile x [n][kBlockM] as terms [kTerms][kBlockN][kBlockM], bf16: each the leading eight bits of what the former leave, so
// that their sum is x. Products with bf16 are exact and sums are fp32, as if x were multiplied in fp32; but infinity
// becomes NaN.
static void split_rows(const float* x, int64_t n, RowRange rows, float* terms) {
  const __m512i upper = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25,
                                         23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  for (int64_t j = 0; j < n; j++)
    for (int64_t r = rows.begin; r < rows.end; r += 2 * kLanes) {
      vf first = load(x + j * kBlockM + r), second = load(x + j * kBlockM + r + kLanes);
      for (int64_t t = 0; t < kTerms; t++) {
        const __m512i both = _mm512_permutex2var_epi16((__m512i)first, upper, (__m512i)second);
        _mm512_store_si512(words(terms) + ((t * kBlockN + j) * kBlockM + r) / 2, both);
        first -= (vf)((vu)first & 0xffff0000u);
        second -= (vf)((vu)second & 0xffff0000u);
      }
    }
}
#endif

// sums [n keys, dim] += x times a block's rows, over the rows; x is [n][kBlockM]. In pairs, which round x to bf16, for the
// sequence (x null: `row_pairs` holds them); in fp32 for the prefix, whose gradients are what is trained.
static void add_over_rows(const Problem& p, BackwardScratch& s, Part part, int64_t begin, int64_t n, RowRange rows,
                          const float* x, const float* floats, [[maybe_unused]] const float* pairs, float* sums) {
  const int64_t dim = p.padded_dim, count = least(rows.end, s.block.count) - rows.begin;
  const bool paired = p.pairs && part == kSequence;
  const int32_t* high = on_diagonal(s.block, part, begin, n) ? s.block.high : nullptr;
  const SeeingRows seeing{high, begin, rows.begin, count, paired};
  const Store add{sums, dim, true};
#if PEFTKERN_HAS_PAIRS
  if (paired) {
    if (x) pair_rows(x, n, rows, s.row_pairs);
#if PEFTKERN_HAS_AMX
    if (p.amx)
      return gemm_tiles(n, dim, seeing, words(s.row_pairs) + rows.begin / 2, kBlockM / 2,
                        words(pairs) + rows.begin / 2 * dim, dim, add);
#endif
    return gemm<false>(n, dim, seeing, words(s.row_pairs) + rows.begin / 2, kBlockM / 2,
                       words(pairs) + rows.begin / 2 * dim, dim, add);
  }
#endif
#if PEFTKERN_HAS_AMX
  if (p.amx) {
    split_rows(x, n, rows, s.row_terms);
    const SeeingRows all{nullptr, begin, rows.begin, count, true};
    return gemm_tiles<kTerms>(n, dim, all, words(s.row_terms) + rows.begin / 2, kBlockM / 2,
                              words(pairs) + rows.begin / 2 * dim, dim, add, kBlockN * kBlockM / 2);
  }
#endif
  gemm<false>(n, dim, seeing, x + rows.begin, kBlockM, floats + rows.begin * dim, dim, add);
}

// dq [rows, dim] += grad^T keys (grad null: `key_pairs` holds it)
static void add_over_keys(const Problem& p, BackwardScratch& s, Part part, const Tile& tile, int64_t begin, int64_t n,
                          RowRange rows, const float* grad) {
  const int64_t dim = p.padded_dim, count = least(rows.end, s.block.count) - rows.begin;
  const int32_t* high = on_diagonal(s.block, part, begin, n) ? s.block.high : nullptr;
#if PEFTKERN_HAS_PAIRS
  if (p.pairs) {
    if (grad) pair_keys(grad, n, rows, s.key_pairs);
    grad = s.key_pairs;
  }
#endif
#if PEFTKERN_HAS_AMX
  if (p.amx) {
    pad_weights(s.key_pairs, n, rows);
    return multiply_keys_in_tiles(p, VisibleKeys{high, begin, n, rows.begin, true}, rows.end - rows.begin,
                                  grad + rows.begin, tile.by_key, s.dq_sums + rows.begin, true);
  }
#endif
  multiply_keys(p, VisibleKeys{high, begin, n, rows.begin, p.pairs}, count, grad + rows.begin, tile.by_key,
                Store{s.dq + rows.begin * dim, dim, true});
}

// Second walk: weights that sum to one, dropout, dv, delta.
static void walk_weights(const Problem& p, const Sequence& seq, BackwardScratch& s, Part part,
                         int64_t first_tile, float* dv, bool normalize, bool sum_delta) {
  const peftkern_attention& a = *p.args;
  const TileRange range = tiles_of(seq, s.block, part);
  const float* total = part == kPrefix && a.gate ? s.prefix_total : s.total;
  const bool gated = part == kPrefix && a.gate;
  for (int64_t begin = range.begin; begin < range.end; begin += kBlockN) {
    const int64_t n = least(kBlockN, range.end - begin), at = tile_offset(first_tile, range, begin);
    float *weights = s.weights + at, *grad = s.grads + at;
    const RowRange rows = rows_of(s.block, part, begin, n);
    const bool dropout = a.dropout_p > 0.0;
    if (dropout) dropout_factors(p, seq, s.block, part, begin, n, rows, s.factors);
    // Two vectors of rows at a time: that is what a vector of pairs of rows holds.
    const bool paired = p.pairs && part == kSequence && !dropout && dv;
    for (int64_t r = rows.begin; r < rows.end; r += 2 * kLanes) {
      const int vectors = r + kLanes < rows.end ? 2 : 1;
      vf sum[2], inverse[2], gate[2], delta[2] = {zero(), zero()}, applied[2] = {zero(), zero()};
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
            w = quotient + (w - quotient * sum[u]) * inverse[u];  // as good as a division, exactly 1 for a lone key
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
          delta[u] += w * g;
          if (dropout || gated) store(s.applied + i, applied[u] * gate[u]);
        }
        if (paired) store_row_pairs(s.row_pairs, j, r, applied[0], applied[1]);
      }
      for (int u = 0; u < vectors && sum_delta; u++) {
        float* at_row = s.delta[part] + r + u * kLanes;
        store(at_row, load(at_row) + delta[u]);
      }
    }
    if (dv)
      add_over_rows(p, s, part, begin, n, rows, paired ? nullptr : dropout || gated ? s.applied : weights, s.dout, s.dout_pairs,
                    dv + begin * p.padded_dim);
  }
}

// Third walk: grads become the gradients of the products.
static void walk_scores(const Problem& p, const Needs& needs, const Sequence& seq, int64_t kv_head, BackwardScratch& s,
                        Part part, int64_t first_tile, float* dk, const Sums& sums, float* dbias,
                        const peftkern_attention_backward& b) {
  const peftkern_attention& a = *p.args;
  const TileRange range = tiles_of(seq, s.block, part);
  const float scale = (float)a.scale;
  const bool through_scores = (part == kPrefix && sums.dprefix_bias) || (part == kSequence && dbias);
  alignas(64) float shifts[kBlockM], factors[kBlockM];
  for (int64_t r = 0; r < kBlockM; r++) {
    shifts[r] = s.dlse[part][r] - s.delta[part][r];
    factors[r] = s.part_scale[part][r] * (through_scores ? 1.0f : scale);
  }
  for (int64_t begin = range.begin; begin < range.end; begin += kBlockN) {
    const int64_t n = least(kBlockN, range.end - begin), at = tile_offset(first_tile, range, begin);
    const RowRange rows = rows_of(s.block, part, begin, n);
    const int64_t last = least(rows.end, s.block.count);
    float *weights = s.weights + at, *grad = s.grads + at;
#if PEFTKERN_HAS_PAIRS
    if (p.pairs && part == kSequence && !through_scores && a.softcap == 0.0) {
      pair_score_gradients(s, weights, grad, n, rows, shifts, factors);
      if (dk) add_over_rows(p, s, part, begin, n, rows, nullptr, s.q, s.q_pairs, dk + begin * p.padded_dim);
      if (needs.dq)
        add_over_keys(p, s, part, tile_at(p, seq, kv_head, s, part, begin), begin, n, rows, nullptr);
      continue;
    }
#endif
    for (int64_t r = rows.begin; r < rows.end; r += kLanes) {
      const vf shift = load(shifts + r), factor = load(factors + r);
      for (int64_t j = 0; j < n; j++) {
        const int64_t i = j * kBlockM + r;
        store(grad + i, load(weights + i) * (load(grad + i) + shift) * factor);
      }
    }
    if (through_scores) {
      for (int64_t r = rows.begin; r < last; r++) {
        const int64_t head = s.block.head[r];
        if (part == kPrefix) {
          float* row = sums.dprefix_bias + (head % p.plan->group_size) * a.prefix_len + begin;
          for (int64_t j = 0; j < n; j++) row[j] += grad[j * kBlockM + r];
        } else {
          const int64_t* size = b.bias_size;
          const int64_t index[3] = {seq.batch, head, s.block.row[r]};
          int64_t row = 0;
          for (int i = 0; i < 3; i++) row = row * size[i] + (size[i] == 1 ? 0 : index[i]);
          float* at_row = dbias + row * size[3];
          float sum = 0.0f;
          for (int64_t j = 0; j < n; j++) {
            if (size[3] > 1) at_row[seq.start + begin + j] += grad[j * kBlockM + r];
            sum += grad[j * kBlockM + r];
          }
          if (size[3] == 1) *at_row += sum;
        }
      }
      for (int64_t i = 0; i < n * kBlockM; i += kLanes) store(grad + i, load(grad + i) * scale);
    }
    if (a.softcap != 0.0)
      for (int64_t i = 0; i < n * kBlockM; i += kLanes) store(grad + i, load(grad + i) * load(s.slopes + at + i));
    if (dk) add_over_rows(p, s, part, begin, n, rows, grad, s.q, s.q_pairs, dk + begin * p.padded_dim);
    if (needs.dq) add_over_keys(p, s, part, tile_at(p, seq, kv_head, s, part, begin), begin, n, rows, grad);
  }
}

// Rows of q or dout in all the forms that the walks read.
static void load_rows(const Problem& p, const Block& block, const void* data, const int64_t* stride,
                      [[maybe_unused]] bool in_fp32, float* rows, float* panel, [[maybe_unused]] float* pairs) {
  load_panel(p, block, data, stride, rows, panel);
#if PEFTKERN_HAS_PAIRS
  if (!p.pairs) return;
  gather_row_pairs(p, block, data, stride, pairs);
  if (in_fp32) gather_rows(p, block, data, stride, rows);
#endif
}

static void backward_block(const Problem& p, const Needs& needs, const peftkern_attention_backward& b,
                           const Sequence& seq, int64_t kv_head, BackwardScratch& s, const Sums& sums, float* dbias) {
  const peftkern_attention& a = *p.args;
  const Plan& plan = *p.plan;
  const Block& block = s.block;
  const int64_t dim = p.padded_dim, rows = block.vectors * kLanes;
  const int64_t prefix_tiles = needs.prefix() ? num_tiles(tiles_of(seq, block, kPrefix)) : 0;
  const bool floats = prefix_tiles && !p.amx;  // what sums of the prefix's gradients multiply
  load_rows(p, block, a.q, a.q_stride, floats && sums.dprefix_k, s.q, s.q_panel, s.q_pairs);
  load_rows(p, block, b.dout, b.dout_stride, !needs.sequence() || (floats && sums.dprefix_v), s.dout, s.dout_panel,
            s.dout_pairs);
  for (int64_t r = 0; r < rows; r++) {
    const int64_t head = block.head[r], at = block.row[r];
    const float lse = a.lse[(seq.batch * a.num_heads + head) * a.q_len + at];
    s.lse[r] = lse == -kInf ? kInf : (float)(lse * kLog2e);  // rounded once: an error here is one of the whole row
    const float dlse =
        b.dlse && r < block.count
            ? b.dlse[seq.batch * b.dlse_stride[0] + head * b.dlse_stride[1] + at * b.dlse_stride[2]]
            : 0.0f;
    s.dlse[kSequence][r] = dlse;
    s.dlse[kPrefix][r] = a.gate ? 0.0f : dlse;
    s.delta[kSequence][r] = s.delta[kPrefix][r] = s.prefix_total[r] = 0.0f;
    s.total[r] = a.sinks ? (float)std::exp2((double)a.sinks[head] * kLog2e - s.lse[r]) : 0.0f;
    s.part_scale[kSequence][r] = 1.0f;
    s.part_scale[kPrefix][r] = a.gate ? std::tanh(a.gate[head]) : 1.0f;
  }
  const bool exact = needs.sequence();
  if (prefix_tiles) walk_products(p, needs, seq, kv_head, s, kPrefix, 0);
  if (exact) walk_products(p, needs, seq, kv_head, s, kSequence, prefix_tiles);
  const bool prefix_exact = exact || a.gate;
  if (prefix_tiles) walk_weights(p, seq, s, kPrefix, 0, sums.dprefix_v, prefix_exact, prefix_exact);
  if (exact) walk_weights(p, seq, s, kSequence, prefix_tiles, sums.dv, true, true);
  if (!needs.scores()) return;

  if (!exact) gather_rows(p, block, a.out, a.out_stride, s.out);
  for (int64_t r = 0; r < rows; r++) {
    float& delta = s.delta[kSequence][r];
    const float prefix_delta = s.delta[kPrefix][r];
    if (exact && !a.gate) delta += prefix_delta;
    if (!exact) {
      vf sum = zero();
      for (int64_t d = 0; d < dim; d += kLanes) sum += load(s.out + r * dim + d) * load(s.dout + r * dim + d);
      delta = reduce_add(sum) - (a.gate ? s.part_scale[kPrefix][r] * prefix_delta : 0.0f);
    }
    if (!a.gate) s.delta[kPrefix][r] = delta;
    if (r >= block.count) continue;
    const int64_t head = block.head[r] % plan.group_size;
    if (sums.dgate)
      sums.dgate[head] += (1.0 - (double)s.part_scale[kPrefix][r] * s.part_scale[kPrefix][r]) * prefix_delta;
    if (sums.dsinks && s.lse[r] != kInf)
      sums.dsinks[head] += std::exp2((double)a.sinks[block.head[r]] * kLog2e - s.lse[r]) / (exact ? s.total[r] : 1.0f) *
                           (double)(s.dlse[kSequence][r] - delta);
  }

  const bool prefix_scores_needed = needs.dq || sums.dprefix_k || sums.dprefix_bias;
  if (needs.dq) memset(s.dq_sums, 0, sizeof(float) * (p.amx ? kBlockM : block.count) * dim);
  if (prefix_tiles && prefix_scores_needed)
    walk_scores(p, needs, seq, kv_head, s, kPrefix, 0, sums.dprefix_k, sums, nullptr, b);
  if (needs.dq || needs.dk || dbias)
    walk_scores(p, needs, seq, kv_head, s, kSequence, prefix_tiles, sums.dk, sums, dbias, b);
#if PEFTKERN_HAS_AMX
  if (p.amx && needs.dq) transpose_sums(p, block, s.dq_sums, s.dq);
#endif
  if (needs.dq)
    for (int64_t r = 0; r < block.count; r++) {
      const int64_t at = seq.batch * b.dq_stride[0] + block.head[r] * b.dq_stride[1] +
                         block.row[r] * b.dq_stride[2];
      narrow_row(s.dq + r * dim, 1.0f, p.head_dim, a.dtype, const_cast<char*>(offset(b.dq, a.dtype, at)));
    }
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif  // PEFTKERN_CPU_ATTENTION_BACKWARD_BLOCK_H_
