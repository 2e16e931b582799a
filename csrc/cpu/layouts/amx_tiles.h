// SPDX-License-Identifier: Apache-2.0
// The layout AmxTiles: bf16 pairs, multiplied in AMX tiles. Tiles are read whole, so everything is packed and padded.
// Sums over keys are transposed, [dim][kBlockM], and so is the tile that they multiply.
#ifndef PEFTKERN_CPU_LAYOUTS_AMX_TILES_H_
#define PEFTKERN_CPU_LAYOUTS_AMX_TILES_H_

#include "amx_gemm.h"
#include "pairs.h"

namespace peftkern {
namespace PEFTKERN_ISA {

struct AmxTiles : Pairs {
  static constexpr bool kSumsApart = true;
  static constexpr int64_t kPadding = kTileStep, kRowStep = kTileStep, kDiagonalKeys = kTileStep;
  static constexpr int64_t kPrefixStep = kBlockN;
  static constexpr int64_t kByKeyStride = kBlockN / 2;
  static constexpr int64_t kTerms = 3;  // the number of bf16 terms whose sum is a float
  typedef TileScope Scope;
  typedef Terms<kTerms, kBlockN * kBlockM / 2> RowTerms;

  struct Temporaries : Pairs::Temporaries {
    Word* row_terms;  // of a tile: see split_rows()

    void take(Arena& arena) {
      Pairs::Temporaries::take(arena);
      row_terms = arena.take<Word>(kTerms * (kBlockN * kBlockM / 2) + kLanes);
    }
  };

  static InPlace in_place(const Call&, const Source&, bool) { return {false, false, false}; }

  static void pack_tile(const Call& p, const Source& source, RowRange tokens, InPlace, TileMemory<Word> to,
                        int64_t at) {
    uint16_t buffer[2][kMaxHeadDim];
    const HeadDim dim = p.by_key_dim();
    const auto k_row = [&](int64_t j) {
      const Token token = source.token(tokens.begin + j);
      return bf16_row(token.k, token.dtype, p.k_dim.size, buffer[j % 2]);
    };
    const auto v_row = [&](int64_t j) {
      const Token token = source.token(tokens.begin + j);
      return bf16_row(token.v, token.dtype, p.v_dim.size, buffer[j % 2]);
    };
    const int64_t n = tokens.end - tokens.begin;
    pad_rows(p.k_dim, n, k_row, to.k + at * p.k_dim.padded / 2);
    if (p.backward) pad_rows(p.v_dim, n, v_row, to.v + at * p.v_dim.padded / 2);
    Word* by_key = by_key_memory(p, to, at);
    for (int64_t j = 0; j < n; j += kTileStep) {
      const auto summed = [&](int64_t i) { return p.backward ? k_row(j + i) : v_row(j + i); };
      transpose_pairs(dim, min(kTileStep, n - j), summed, by_key + j / 2);
    }
  }

  static Tile<Word> packed_tile(const Call& p, const TileMemory<Word>& from, int64_t at) {
    const int64_t k_width = p.k_dim.padded / 2, v_width = p.v_dim.padded / 2;
    return {{from.k + at * k_width, k_width, p.k_dim},
            {from.v + at * v_width, v_width, p.v_dim},
            {by_key_memory(p, from, at), kByKeyStride, p.by_key_dim()}};
  }

  static void load_factor(const Call& p, const Block& block, const Tensor& x, bool, const RowFactor<Word>& to) {
    load_panel(p, block, x, nullptr, to.panel);
    gather_row_pairs(p, block, x, to.pairs);
    const int64_t width = x.dim.padded, pairs = (block.count + 1) / 2, written = round_up(x.dim.size, kLanes);
    for (int64_t i = 0; i < pairs && written < width; i++)
      memset(to.pairs + i * width + written, 0, sizeof(Word) * (width - written));
    memset(to.pairs + pairs * width, 0, sizeof(Word) * width * (block.vectors * kLanes / 2 - pairs));
  }

  template <typename Finish>
  PEFTKERN_INLINE_MEMBER static void multiply_rows(const Rows<Word>& keys, RowRange tokens, const Word* panel,
                                                   int64_t count, const Finish& finish) {
    gemm_tiles(tokens.end - tokens.begin, count, All{keys.dim.padded / 2}, OneTerm{keys.from(tokens.begin)},
               Matrix<Word>{panel, kBlockM}, finish);
  }

  // The pairs of keys that the columns of a step, which are rows of the block, see.
  struct VisiblePairs {
    VisibleKeys<2> visible;

    Range operator()(int64_t, int64_t j) const { return visible(j, kTileStep); }
  };

  // The weights are padded with zeros to whole tiles of keys.
  static void sum_keys(const Block& block, const Span& span, Word* weights, const Rows<Word>& by_key,
                       const KeySums& sums) {
    const RowRange rows = span.rows;
    for (int64_t j = (span.n + 1) / 2; j < round_up(span.n, kTileStep) / 2; j++)
      for (int64_t r = rows.begin; r < rows.end; r += kLanes) store_words(weights + j * kBlockM + r, vu{});
    gemm_tiles(by_key.dim.padded, rows.end - rows.begin, VisiblePairs{VisibleKeys<2>(block, span)},
               OneTerm{by_key.from(0)}, Matrix<Word>{weights + rows.begin, kBlockM},
               Accumulate{sums.data + rows.begin, kBlockM, sums.accumulate});
  }

  // The same as sum_rows() for a tile that is already stored as pairs of rows.
  static void sum_row_pairs(const Block& block, const Span& span, const RowFactor<Word>& rows,
                            const Temporaries& temporaries, float* sums) {
    const int64_t first = span.rows.begin / 2, width = rows.dim.padded;
    const Matrix<Word> x{temporaries.row_pairs + first, kBlockM / 2};
    gemm_tiles(span.n, width, SeeingRows<2>(block, span), OneTerm{x}, Matrix<Word>{rows.pairs + first * width, width},
               Store{sums, width, true});
  }
  static void sum_rows(const Block& block, const Span& span, const float* x, const RowFactor<Word>& rows,
                       const Temporaries& temporaries, float* sums) {
    pair_rows(x, span.n, span.rows, temporaries.row_pairs);
    sum_row_pairs(block, span, rows, temporaries, sums);
  }
  static void sum_rows_exactly(const Block& block, const Span& span, const float* x, const RowFactor<Word>& rows,
                               const Temporaries& temporaries, float* sums) {
    const int64_t first = span.rows.begin / 2, width = rows.dim.padded;
    split_rows(x, span.n, span.rows, temporaries.row_terms);
    const RowTerms terms{{temporaries.row_terms + first, kBlockM / 2}};
    gemm_tiles(span.n, width, SeeingRows<2>(block, span), terms, Matrix<Word>{rows.pairs + first * width, width},
               Store{sums, width, true});
  }

  static void clear_sums(const Block&, HeadDim dim, float* sums) {
    memset(sums, 0, sizeof(float) * kBlockM * dim.padded);
  }
  static void scale_sums(const Block&, RowRange rows, HeadDim dim, const float* factors, float* sums) {
    for (int64_t r = rows.begin; r < rows.end; r += kLanes) {
      const vf factor = load(factors + r);
      for (int64_t d = 0; d < dim.padded; d++) store(sums + d * kBlockM + r, load(sums + d * kBlockM + r) * factor);
    }
  }
  static void finish_sums(const Block& block, HeadDim dim, const float* sums, float* rows) {
    for (int64_t r = 0; r < block.vectors * kLanes; r += kLanes)
      for (int64_t d = 0; d < dim.padded; d += kLanes) {
        vf square[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; i++) square[i] = load(sums + (d + i) * kBlockM + r);
        transpose(square);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; i++) store(rows + (r + i) * dim.padded + d, square[i]);
      }
  }

 private:
  // Copies n rows and pads them with zeros to kTileStep rows of dim.padded.
  template <typename Row>
  static void pad_rows(HeadDim dim, int64_t n, const Row& row, Word* out) {
    const int64_t width = dim.padded / 2, bytes = 2 * dim.size, padding = 2 * dim.padded - bytes;
    for (int64_t j = 0; j < n; j++) {
      memcpy(out + j * width, row(j), bytes);
      if (padding) memset(reinterpret_cast<char*>(out + j * width) + bytes, 0, padding);
    }
    memset(out + n * width, 0, sizeof(Word) * width * (round_up(n, kTileStep) - n));
  }

  // out[d][i] = (rows[2 i][d], rows[2 i + 1][d]) for n <= kTileStep rows, with zeros beyond n and dim.size.
  template <typename Row>
  static void transpose_pairs(HeadDim dim, int64_t n, const Row& row, Word* out) {
    alignas(64) Word pairs[kLanes * kMaxHeadDim];
    memset(pairs, 0, sizeof(Word) * kLanes * dim.padded);
    for (int64_t j = 0; j < n; j += 2)
      interleave_rows(row(j), j + 1 < n ? row(j + 1) : nullptr, dim.size, pairs + j / 2 * dim.padded);
    for (int64_t d = 0; d < dim.padded; d += kLanes) {
      vf square[kLanes];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes; i++) square[i] = load_as<vf>(pairs + i * dim.padded + d);
      transpose(square);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes; i++) store_words(out + (d + i) * kByKeyStride, (vu)square[i]);
    }
  }

  // Splits a tile x [n][kBlockM] into bf16 terms [kTerms][kBlockN][kBlockM] whose sum is x. Each term is the leading
  // eight bits of the remainder. Products with bf16 are exact and sums are fp32, so the result is as if x were
  // multiplied in fp32, except that infinity becomes NaN.
  static void split_rows(const float* x, int64_t n, RowRange rows, Word* terms) {
    for (int64_t j = 0; j < n; j++)
      for (int64_t r = rows.begin; r < rows.end; r += 2 * kLanes) {
        vf first = load(x + j * kBlockM + r), second = load(x + j * kBlockM + r + kLanes);
        for (int64_t t = 0; t < kTerms; t++) {
          store_words(terms + ((t * kBlockN + j) * kBlockM + r) / 2, upper_both(first, second));
          first -= (vf)((vu)first & 0xffff0000u);
          second -= (vf)((vu)second & 0xffff0000u);
        }
      }
  }
};

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif  // PEFTKERN_CPU_LAYOUTS_AMX_TILES_H_
