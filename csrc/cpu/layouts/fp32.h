// SPDX-License-Identifier: Apache-2.0
// The layout Fp32, for any dtype: everything is widened to floats and multiplied in fp32. This file also defines what
// every layout has:
//
//   types     Word; RowFactor's words; Temporaries, the memory in which the backward converts a tile
//   numbers   kPadding: head dimensions are padded to it; kRowStep: rows of a block that are processed together;
//             kDiagonalKeys: keys that are processed together on the causal diagonal; kPrefixStep
//   pack      in_place, pack_tile, packed_tile: keys and values; load_panel, load_factor: rows of queries and gradients
//   gemm      multiply_rows: keys or values times rows, over the head dimension; sum_keys: over the keys of a tile;
//             sum_rows, sum_rows_exactly: over the rows of a block
//   reduce    store_weights, key_weights: weights as a factor of sum_keys; clear_sums, scale_sums, finish_sums: what
//             sum_keys adds to
#ifndef PEFTKERN_CPU_LAYOUTS_FP32_H_
#define PEFTKERN_CPU_LAYOUTS_FP32_H_

#include "../scores.h"
#include "../tokens.h"

namespace peftkern {
namespace PEFTKERN_ISA {

// The keys of a span that rows i, i + 1, ..., counted from the span's first row, see: the range that is summed, in
// words of kPerWord keys.
template <int kPerWord>
struct VisibleKeys {
  const int32_t* high;  // null: all
  int64_t begin, n, first;

  VisibleKeys(const Block& block, const Span& span)
      : high(on_diagonal(block, span) ? block.high : nullptr), begin(span.begin), n(span.n), first(span.rows.begin) {}

  Range operator()(int64_t i, int64_t rows) const {
    const int64_t count = high ? max(0, min(n, high[first + i + rows - 1] - begin)) : n;
    return {0, (count + kPerWord - 1) / kPerWord};
  }
};

// The rows, counted from the span's first row, that see keys i, i + 1, ... of it: the range that is summed, in words of
// kPerWord rows.
template <int kPerWord>
struct SeeingRows {
  const int32_t* high;  // null: all
  int64_t begin, first, count;

  SeeingRows(const Block& block, const Span& span)
      : high(on_diagonal(block, span) ? block.high : nullptr),
        begin(span.begin),
        first(span.rows.begin),
        count(min(span.rows.end, block.count) - span.rows.begin) {}

  Range operator()(int64_t i, int64_t) const {
    int64_t row = 0;
    while (high && row < count && high[first + row] <= begin + i) row++;
    return {row / kPerWord, (count + kPerWord - 1) / kPerWord};
  }
};

// What sum_keys() adds to, or overwrites: a row of `dim` sums for each row of the block.
struct KeySums {
  float* data;
  HeadDim dim;
  bool accumulate;
};

// The rows of q or dout, in the forms in which the backward multiplies them.
template <typename Word>
struct RowFactor {
  float* rows;  // [kBlockM][dim.padded] floats, for sums over rows in fp32
  Word* panel;  // for products with keys and values
  Word* pairs;  // pairs of neighbouring rows, for sums over rows
  HeadDim dim;
};

struct Fp32 {
  typedef float Word;
  static constexpr bool kPaired = false, kSumsApart = false;  // see Pairs, finish_sums
  static constexpr int64_t kPadding = kLanes, kRowStep = kLanes, kDiagonalKeys = 12, kPrefixStep = 1;

  struct Temporaries {
    void take(Arena&) {}
  };
  struct Scope {};  // of a thread that multiplies

  static bool serves(const peftkern_attention&) { return true; }

  // Rows far apart share too few cache sets, so those that are read repeatedly (`keep`) are packed. Of the rows that
  // sums over keys multiply, whole vectors are read; of the others, single numbers.
  static InPlace in_place(const Call& p, const Source& source, bool keep) {
    const bool floats = source.first.dtype == PEFTKERN_FLOAT32 && p.args->dtype == PEFTKERN_FLOAT32;
    const bool even = floats && source.listed < 0;
    const bool k = even && !(keep && source.k_stride != p.k_dim.size);
    const bool v = even && !(keep && source.v_stride != p.v_dim.size);
    const HeadDim dim = p.by_key_dim();
    const bool by_key = (p.backward ? k : v) && dim.padded == dim.size;
    return {p.backward ? by_key : k, p.backward ? v : by_key, by_key};
  }

  // Widens tokens first, first + 1, ..., rounded to q's dtype.
  static void pack_tile(const Call& p, const Source& source, RowRange tokens, InPlace where, TileMemory<Word> to,
                        int64_t at) {
    if (source.listed < 0 && source.first.dtype == p.args->dtype) {
      const TileMemory<Word> begin{to.k + at * p.k_dim.padded, to.v + at * p.v_dim.padded, to.length};
      switch (p.args->dtype) {
        case PEFTKERN_FLOAT16: return widen_tokens<PEFTKERN_FLOAT16>(p, source, tokens, where, begin);
        case PEFTKERN_BFLOAT16: return widen_tokens<PEFTKERN_BFLOAT16>(p, source, tokens, where, begin);
        default: return widen_tokens<PEFTKERN_FLOAT32>(p, source, tokens, where, begin);
      }
    }
    for (int64_t j = tokens.begin; j < tokens.end; j++, at++) {
      const Token token = source.token(j);
      if (!where.k) widen_token(p, token.k, token.dtype, p.k_dim, to.k + at * p.k_dim.padded);
      if (!where.v) widen_token(p, token.v, token.dtype, p.v_dim, to.v + at * p.v_dim.padded);
    }
  }

  // The same for evenly spaced tokens of q's dtype.
  template <int64_t kDtype>
  static void widen_tokens(const Call& p, const Source& source, RowRange tokens, InPlace where, TileMemory<Word> to) {
    constexpr int64_t kSize = kDtype == PEFTKERN_FLOAT32 ? 4 : 2;
    const Token first = source.token(tokens.begin);
    const char *k = static_cast<const char*>(first.k), *v = static_cast<const char*>(first.v);
    for (int64_t j = tokens.begin; j < tokens.end; j++) {
      if (!where.k) widen_row_as<kDtype>(k, p.k_dim.size, to.k);
      if (!where.v) widen_row_as<kDtype>(v, p.v_dim.size, to.v);
      k += source.k_stride * kSize;
      v += source.v_stride * kSize;
      to.k += p.k_dim.padded;
      to.v += p.v_dim.padded;
    }
  }

  static void widen_token(const Call& p, const void* row, int64_t dtype, HeadDim dim, float* out) {
    if (!row) {
      memset(out, 0, sizeof(float) * dim.padded);
      return;
    }
    widen_row(row, dtype, dim.size, out);
    if (dtype != p.args->dtype) round_row(out, dim.padded, p.args->dtype);
  }

  static Tile<Word> packed_tile(const Call& p, const TileMemory<Word>& from, int64_t at) {
    const Rows<Word> k{from.k + at * p.k_dim.padded, p.k_dim.padded, p.k_dim};
    const Rows<Word> v{from.v + at * p.v_dim.padded, p.v_dim.padded, p.v_dim};
    return {k, v, p.backward ? k : v};
  }

  // Writes a block's rows as floats and as the second factor of products with keys, panel[d][r].
  static void load_panel(const Call& p, const Block& block, const Tensor& x, float* rows, Word* panel) {
    gather_rows(p, block, x, rows);
    for (int64_t r = 0; r < block.vectors * kLanes; r += kLanes)
      for (int64_t d = 0; d < x.dim.padded; d += kLanes) {
        vf square[kLanes];
        for (int i = 0; i < kLanes; i++) square[i] = load(rows + (r + i) * x.dim.padded + d);
        transpose(square);
        for (int i = 0; i < kLanes; i++) store(panel + (d + i) * kBlockM + r, square[i]);
      }
  }

  static void load_factor(const Call& p, const Block& block, const Tensor& x, bool, const RowFactor<Word>& to) {
    load_panel(p, block, x, to.rows, to.panel);
  }

  // C [n keys, count rows] = keys or values first, first + 1, ... times a panel, summed over their head dimension.
  template <typename Finish>
  PEFTKERN_INLINE_MEMBER static void multiply_rows(const Rows<Word>& keys, RowRange tokens, const Word* panel,
                                                   int64_t count, const Finish& finish) {
    gemm<false>(tokens.end - tokens.begin, count, All{keys.dim.size}, keys.from(tokens.begin),
                Matrix<Word>{panel, kBlockM}, finish);
  }

  // sums [rows, dim] (+)= weights^T times keys or values, summed over a span's keys. `weights` is [n][kBlockM].
  static void sum_keys(const Block& block, const Span& span, Word* weights, const Rows<Word>& by_key,
                       const KeySums& sums) {
    const int64_t first = span.rows.begin, count = min(span.rows.end, block.count) - first, width = by_key.dim.padded;
    gemm<true>(count, width, VisibleKeys<1>(block, span), Matrix<Word>{weights + first, kBlockM}, by_key.from(0),
               Store{sums.data + first * width, width, sums.accumulate});
  }

  // sums [n keys, dim] += x [n][kBlockM] times the block's rows.
  static void sum_rows(const Block& block, const Span& span, const float* x, const RowFactor<Word>& rows,
                       const Temporaries&, float* sums) {
    const int64_t first = span.rows.begin, width = rows.dim.padded;
    gemm<false>(span.n, width, SeeingRows<1>(block, span), Matrix<float>{x + first, kBlockM},
                Matrix<float>{rows.rows + first * width, width}, Store{sums, width, true});
  }
  static void sum_rows_exactly(const Block& block, const Span& span, const float* x, const RowFactor<Word>& rows,
                               const Temporaries& temporaries, float* sums) {
    sum_rows(block, span, x, rows, temporaries, sums);
  }

  // Stores the weights of keys i and i + 1 where sum_keys() reads them.
  PEFTKERN_INLINE_MEMBER static void store_weights(Word* weights, int64_t i, int64_t r, vf first, const vf* second) {
    store(weights + i * kBlockM + r, first);
    if (second) store(weights + (i + 1) * kBlockM + r, *second);
  }

  // A tile of floats [n][kBlockM] as weights of sum_keys().
  static Word* key_weights(const Span&, float* x, const Temporaries&) { return x; }

  static void clear_sums(const Block& block, HeadDim dim, float* sums) {
    memset(sums, 0, sizeof(float) * block.count * dim.padded);
  }
  // Multiplies the sums of each row by the row's factor.
  static void scale_sums(const Block& block, RowRange rows, HeadDim dim, const float* factors, float* sums) {
    for (int64_t r = rows.begin; r < min(rows.end, block.count); r++)
      if (factors[r] != 1.0f)
        for (int64_t d = 0; d < dim.padded; d += kLanes)
          store(sums + r * dim.padded + d, load(sums + r * dim.padded + d) * factors[r]);
  }
  // Writes the sums to rows[r][dim.padded], which may be the same memory.
  static void finish_sums(const Block&, HeadDim, const float*, float*) {}
};

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif  // PEFTKERN_CPU_LAYOUTS_FP32_H_
