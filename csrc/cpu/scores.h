// SPDX-License-Identifier: Apache-2.0
// From products of queries and keys to scores: scale, softcap, biases, masks; and dropout.
#ifndef PEFTKERN_CPU_SCORES_H_
#define PEFTKERN_CPU_SCORES_H_

#include "block.h"
#include "elementary.h"
#include "philox.h"

namespace peftkern {
namespace PEFTKERN_ISA {

// A sink as a score, in units of ln 2. Finite ones stay finite: beyond 2.36e38 they count as that.
static float sink_score(float sink) {
  const float score = sink * (float)kLog2e;
  if (__builtin_fabsf(sink) == kInf || __builtin_fabsf(score) != kInf) return score;
  return sink > 0 ? __FLT_MAX__ : -__FLT_MAX__;
}

// Whether any key of a tile is hidden from any row of the block.
static bool some_hidden(const Call& p, const Block& block, const Span& span) {
  if (span.part == kPrefix) return span.begin < block.prefix_low_max;
  return p.args->key_mask || span.begin < block.low_max || on_diagonal(block, span);
}

// Replaces the hidden products of a tile by -inf while they are in registers.
struct Hidden {
  const int32_t *low, *high;  // as in Block; high null: no end
  const uint8_t* mask;        // of the tile's keys; null: none
  int64_t mask_stride, begin;

  // Rows i, i + 1, ... of the products are keys of the tile, columns j, j + 1, ... are rows of the block.
  template <int kRows, int kVectors>
  PEFTKERN_INLINE_MEMBER void apply(int64_t i, int64_t j, vf (&c)[kRows][kVectors]) const {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) {
      const int64_t r = j + v * kLanes;
      const vi from = load_as<vi>(low + r), to = high ? load_as<vi>(high + r) : seti(INT32_MAX);
#pragma GCC unroll 16
      for (int n = 0; n < kRows; n++) {
        const vi t = seti((int32_t)(begin + i + n));
        c[n][v] = select((t >= from) & (t < to), c[n][v], set1(-kInf));
      }
    }
    if (!mask) return;
#pragma GCC unroll 16
    for (int n = 0; n < kRows; n++)
      if (!mask[(i + n) * mask_stride])
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v++) c[n][v] = set1(-kInf);
  }
};

static Hidden hidden_of(const Call& p, const Sequence& s, const Block& block, const Span& span) {
  const peftkern_attention& a = *p.args;
  if (span.part == kPrefix) return {block.prefix_low, nullptr, nullptr, 0, span.begin};
  if (!a.key_mask) return {block.low, block.high, nullptr, 0, span.begin};
  const uint8_t* mask = a.key_mask + s.batch * a.key_mask_stride[0] + (s.start + span.begin) * a.key_mask_stride[1];
  return {block.low, block.high, mask, a.key_mask_stride[1], span.begin};
}

// Neighbouring keys of a span: `row` is the first row that may see them, `some_hidden` tells whether any of them is
// hidden from any row from there on.
struct KeyGroup {
  int64_t key, count, row;  // key: the first one, counted from the span's
  bool some_hidden;
};

// Calls f for each group of a span's keys. Groups have `step` keys on the causal diagonal.
template <typename F>
PEFTKERN_INLINE void for_key_groups(const Call& p, const Block& block, const Span& span, int64_t step, const F& f) {
  const RowRange rows = span.rows;
  if (!on_diagonal(block, span)) return f(KeyGroup{0, span.n, rows.begin, some_hidden(p, block, span)});
  const int64_t below = max(0, block.high_min - span.begin) / step * step;
  if (below) f(KeyGroup{0, below, rows.begin, some_hidden(p, block, {span.part, span.begin, below, rows})});
  for (int64_t key = below; key < span.n; key += step) {
    int64_t first = rows.begin;
    while (first + block.step < rows.end && block.high[first + block.step - 1] <= span.begin + key) first += block.step;
    f(KeyGroup{key, min(step, span.n - key), first, true});
  }
}

// Plain scores times scale, capped; or with the derivative of the cap in `slope`, unless that is null.
static void cap_scores(const Call& p, const Span& span, float* scores, float* slope) {
  const peftkern_attention& a = *p.args;
  const bool capped = a.softcap != 0.0;
  const float scale = (float)(capped ? a.scale / a.softcap : a.scale * kLog2e);
  const float cap = (float)(a.softcap * kLog2e);
  const int64_t n = span.n;
  const RowRange rows = span.rows;
  for (int64_t j = 0; j < n; j++)
    for (int64_t r = rows.begin; r < rows.end; r += kLanes) {
      vf x = load(scores + j * kBlockM + r) * scale;
      if (capped) {
        const Tanh t = tanh(x);
        x = t.value * cap;
        if (slope) store(slope + j * kBlockM + r, t.slope);
      }
      store(scores + j * kBlockM + r, x);
    }
}

static void add_bias(const Call& p, const Sequence& s, const Block& block, const Span& span, float* scores) {
  const peftkern_attention& a = *p.args;
  const int64_t end = min(span.rows.end, block.count);
  if (span.part == kPrefix && a.prefix_bias)
    for (int64_t r = span.rows.begin; r < end; r++)
      for (int64_t j = 0; j < span.n; j++)
        scores[j * kBlockM + r] +=
            (float)kLog2e *
            a.prefix_bias[block.head[r] * a.prefix_bias_stride[0] + (span.begin + j) * a.prefix_bias_stride[1]];
  if (span.part == kSequence && a.bias)
    for (int64_t r = span.rows.begin; r < end; r++) {
      const int64_t at = s.batch * a.bias_stride[0] + block.head[r] * a.bias_stride[1] +
                         block.row[r] * a.bias_stride[2] + (s.start + span.begin) * a.bias_stride[3];
      for (int64_t j = 0; j < span.n; j++)
        scores[j * kBlockM + r] += (float)kLog2e * load_scalar(a.bias, a.bias_dtype, at + j * a.bias_stride[3]);
    }
}

// Replaces the scores of hidden keys by -inf.
static void hide_scores(const Call& p, const Sequence& s, const Block& block, const Span& span, float* scores) {
  const peftkern_attention& a = *p.args;
  const RowRange rows = span.rows;
  const bool is_prefix = span.part == kPrefix;
  const int32_t *low = is_prefix ? block.prefix_low : block.low, *high = is_prefix ? nullptr : block.high;
  if (span.begin < (is_prefix ? block.prefix_low_max : block.low_max) || on_diagonal(block, span))
    for (int64_t r = rows.begin; r < rows.end; r += kLanes) {
      const vi from = load_as<vi>(low + r), to = high ? load_as<vi>(high + r) : seti(INT32_MAX);
      for (int64_t j = 0; j < span.n; j++) {
        const vi t = seti((int32_t)(span.begin + j));
        store(scores + j * kBlockM + r, select((t >= from) & (t < to), load(scores + j * kBlockM + r), set1(-kInf)));
      }
    }
  if (is_prefix || !a.key_mask) return;
  const uint8_t* mask = a.key_mask + s.batch * a.key_mask_stride[0] + (s.start + span.begin) * a.key_mask_stride[1];
  for (int64_t j = 0; j < span.n; j++)
    if (!mask[j * a.key_mask_stride[1]])
      for (int64_t r = rows.begin; r < rows.end; r += kLanes) store(scores + j * kBlockM + r, set1(-kInf));
}

// Turns products into scores[n][kBlockM] of a span, in units of ln 2, with -inf where a key is hidden. Returns the
// factor that the scores must still be multiplied by. `slope`, unless null, receives the derivative of the softcap if
// there is one.
static float finish_scores(const Call& p, const Sequence& s, const Block& block, const Span& span, float* scores,
                           float* slope) {
  const bool plain = p.is_plain(span.part);
  if (!plain) {
    cap_scores(p, span, scores, slope);
    add_bias(p, s, block, span, scores);
  }
  hide_scores(p, s, block, span, scores);
  return plain ? p.log2_scale : 1.0f;
}

// factors[n][kBlockM] = keep ? 1 / (1 - p) : 0 for keys begin, begin + 1, ... Dropout's counters count keys within the
// sample, as reference.py does.
static void dropout_factors(const Call& p, const Sequence& s, const Block& block, const Span& span, float* factors) {
  const peftkern_attention& a = *p.args;
  const uint32_t key[2] = {(uint32_t)(uint64_t)a.dropout_seed, (uint32_t)((uint64_t)a.dropout_seed >> 32)};
  const uint32_t threshold = (uint32_t)(uint64_t)(a.dropout_p * 4294967296.0);
  const float kept = (float)(1.0 / (1.0 - a.dropout_p));
  const int64_t first = span.begin + (span.part == kSequence ? s.start : 0);
  for (int64_t r = span.rows.begin; r < span.rows.end; r += kLanes) {
    uint32_t c0[kLanes], c1[kLanes], c2[kLanes], words[4][kLanes];
    for (int i = 0; i < kLanes; i++) {
      c1[i] = (uint32_t)block.row[r + i];
      c2[i] = (uint32_t)(s.batch * a.num_heads + block.head[r + i]);
    }
    for (int64_t j = 0; j < span.n; j++) {
      if (j == 0 || (first + j) % 4 == 0) {
        for (int i = 0; i < kLanes; i++) c0[i] = (uint32_t)((first + j) / 4);
        philox4x32<kLanes>(c0, c1, c2, (uint32_t)span.part, key, words);
      }
      for (int i = 0; i < kLanes; i++)
        factors[j * kBlockM + r + i] = words[(first + j) % 4][i] >= threshold ? kept : 0.0f;
    }
  }
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif  // PEFTKERN_CPU_SCORES_H_
