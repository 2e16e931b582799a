// SPDX-License-Identifier: Apache-2.0
// The layout Bf16Pairs: vectors of bf16 pairs, multiplied by instructions that sum both products of a pair.
#ifndef PEFTKERN_CPU_LAYOUTS_BF16_PAIRS_H_
#define PEFTKERN_CPU_LAYOUTS_BF16_PAIRS_H_

#include "pairs.h"

namespace peftkern {
namespace PEFTKERN_ISA {

struct Bf16Pairs : Pairs {
  static constexpr bool kSumsApart = false;
  static constexpr int64_t kPadding = kLanes, kRowStep = kLanes, kDiagonalKeys = 12, kPrefixStep = 2;
  struct Scope {};

  // Rows of which only single words are read.
  static InPlace in_place(const Call&, const Source& source, bool) {
    const auto pairs_lie = [&](const void* data, int64_t stride) {
      return source.first.dtype == PEFTKERN_BFLOAT16 && source.listed < 0 && stride % 2 == 0 &&
             reinterpret_cast<uintptr_t>(data) % 4 == 0;
    };
    return {pairs_lie(source.first.k, source.k_stride), pairs_lie(source.first.v, source.v_stride), false};
  }

  static void pack_tile(const Call& p, const Source& source, RowRange tokens, InPlace where, TileMemory<Word> to,
                        int64_t at) {
    uint16_t buffer[2][kMaxHeadDim];
    const HeadDim k_dim = p.k_dim, v_dim = p.v_dim, dim = p.by_key_dim();
    for (int64_t j = tokens.begin; j < tokens.end && !where.k; j++) {
      const Token token = source.token(j);
      memcpy(to.k + (at + j - tokens.begin) * k_dim.padded / 2, bf16_row(token.k, token.dtype, k_dim.size, buffer[0]),
             2 * k_dim.size);
    }
    for (int64_t j = tokens.begin; j < tokens.end && p.backward && !where.v; j++) {
      const Token token = source.token(j);
      memcpy(to.v + (at + j - tokens.begin) * v_dim.padded / 2, bf16_row(token.v, token.dtype, v_dim.size, buffer[0]),
             2 * v_dim.size);
    }
    Word* by_key = by_key_memory(p, to, at);
    const auto row = [&](int64_t j) -> const uint16_t* {
      if (j == tokens.end) return nullptr;
      const Token token = source.token(j);
      return bf16_row(p.backward ? token.k : token.v, token.dtype, dim.size, buffer[(j - tokens.begin) % 2]);
    };
    for (int64_t j = tokens.begin; j < tokens.end; j += 2, by_key += dim.padded)
      interleave_rows(row(j), row(j + 1), dim.size, by_key);
  }

  static Tile<Word> packed_tile(const Call& p, const TileMemory<Word>& from, int64_t at) {
    const int64_t k_width = p.k_dim.padded / 2, v_width = p.v_dim.padded / 2;
    const HeadDim dim = p.by_key_dim();
    return {{from.k + at * k_width, k_width, p.k_dim},
            {from.v + at * v_width, v_width, p.v_dim},
            {by_key_memory(p, from, at), dim.padded, dim}};
  }

  static void load_factor(const Call& p, const Block& block, const Tensor& x, bool in_fp32, const RowFactor<Word>& to) {
    load_panel(p, block, x, nullptr, to.panel);
    gather_row_pairs(p, block, x, to.pairs);
    if (in_fp32) gather_rows(p, block, x, to.rows);
  }

  template <typename Finish>
  PEFTKERN_INLINE_MEMBER static void multiply_rows(const Rows<Word>& keys, RowRange tokens, const Word* panel,
                                                   int64_t count, const Finish& finish) {
    gemm<false>(tokens.end - tokens.begin, count, All{keys.dim.size / 2}, keys.from(tokens.begin),
                Matrix<Word>{panel, kBlockM}, finish);
  }

  static void sum_keys(const Block& block, const Span& span, Word* weights, const Rows<Word>& by_key,
                       const KeySums& sums) {
    const int64_t first = span.rows.begin, count = min(span.rows.end, block.count) - first, width = by_key.dim.padded;
    gemm<true>(count, width, VisibleKeys<2>(block, span), Matrix<Word>{weights + first, kBlockM}, by_key.from(0),
               Store{sums.data + first * width, width, sums.accumulate});
  }

  // The same as sum_rows() for a tile that is already stored as pairs of rows.
  static void sum_row_pairs(const Block& block, const Span& span, const RowFactor<Word>& rows,
                            const Temporaries& temporaries, float* sums) {
    const int64_t first = span.rows.begin, width = rows.dim.padded;
    gemm<false>(span.n, width, SeeingRows<2>(block, span), Matrix<Word>{temporaries.row_pairs + first / 2, kBlockM / 2},
                Matrix<Word>{rows.pairs + first / 2 * width, width}, Store{sums, width, true});
  }
  static void sum_rows(const Block& block, const Span& span, const float* x, const RowFactor<Word>& rows,
                       const Temporaries& temporaries, float* sums) {
    pair_rows(x, span.n, span.rows, temporaries.row_pairs);
    sum_row_pairs(block, span, rows, temporaries, sums);
  }
  static void sum_rows_exactly(const Block& block, const Span& span, const float* x, const RowFactor<Word>& rows,
                               const Temporaries&, float* sums) {
    const int64_t first = span.rows.begin, width = rows.dim.padded;
    gemm<false>(span.n, width, SeeingRows<1>(block, span), Matrix<float>{x + first, kBlockM},
                Matrix<float>{rows.rows + first * width, width}, Store{sums, width, true});
  }

  static void clear_sums(const Block& block, HeadDim dim, float* sums) { Fp32::clear_sums(block, dim, sums); }
  static void scale_sums(const Block& block, RowRange rows, HeadDim dim, const float* factors, float* sums) {
    Fp32::scale_sums(block, rows, dim, factors, sums);
  }
  static void finish_sums(const Block&, HeadDim, const float*, float*) {}
};

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif  // PEFTKERN_CPU_LAYOUTS_BF16_PAIRS_H_
