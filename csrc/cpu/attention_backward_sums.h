// SPDX-License-Identifier: Apache-2.0
// Sums over rows (dk, dv and the prefix's gradients) and over keys (dq) of a tile.
#ifndef PEFTKERN_CPU_ATTENTION_BACKWARD_SUMS_H_
#define PEFTKERN_CPU_ATTENTION_BACKWARD_SUMS_H_

#include "attention_backward_products.h"

namespace peftkern {
namespace PEFTKERN_ISA {

// The rows, counted from `first`, that see keys i, i + 1, ... of a tile on the diagonal: the range that is summed.
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

// Stores two vectors of rows r, r + 1, ... of key j as pairs of neighbouring rows, which add_over_rows() multiplies.
PEFTKERN_INLINE void store_row_pairs([[maybe_unused]] float* pairs, [[maybe_unused]] int64_t j,
                                     [[maybe_unused]] int64_t r, [[maybe_unused]] vf first,
                                     [[maybe_unused]] vf second) {
#if PEFTKERN_HAS_PAIRS
  const vu both = bf16_both(first, second);
  __builtin_memcpy(words(pairs) + (j * kBlockM + r) / 2, &both, sizeof both);
#endif
}

#if PEFTKERN_HAS_PAIRS
// Stores a tile x [n][kBlockM] as pairs of neighbouring rows.
static void pair_rows(const float* x, int64_t n, RowRange rows, float* pairs) {
  for (int64_t j = 0; j < n; j++)
    for (int64_t r = rows.begin; r < rows.end; r += 2 * kLanes)
      store_row_pairs(pairs, j, r, load(x + j * kBlockM + r),
                      r + kLanes < rows.end ? load(x + j * kBlockM + r + kLanes) : zero());
}

// Stores a tile as pairs of neighbouring keys, which add_over_keys() multiplies.
static void pair_keys(const float* x, int64_t n, RowRange rows, float* pairs) {
  for (int64_t j = 0; j < n; j += 2)
    for (int64_t r = rows.begin; r < rows.end; r += kLanes) {
      const vf second = j + 1 < n ? load(x + (j + 1) * kBlockM + r) : zero();
      store_weights(words(pairs), j, r, load(x + j * kBlockM + r), &second);
    }
}

// ds = w (g - delta) factor of a tile, written directly as pairs of rows and of keys.
static void pair_score_gradients(const BackwardScratch& s, const float* weights, const float* grad, int64_t n,
                                 RowRange rows, const float* minus_delta, const float* factor) {
  for (int64_t r = rows.begin; r < rows.end; r += 2 * kLanes) {
    const int vectors = r + kLanes < rows.end ? 2 : 1;
    for (int64_t j = 0; j < n; j += 2) {
      vf ds[2][2] = {{zero(), zero()}, {zero(), zero()}};
      for (int v = 0; v < vectors; v++)
        for (int64_t i = 0; i < min(2, n - j); i++) {
          const int64_t at = (j + i) * kBlockM + r + v * kLanes, row = r + v * kLanes;
          ds[i][v] = load(weights + at) * (load(grad + at) + load(minus_delta + row)) * load(factor + row);
        }
      for (int64_t i = 0; i < min(2, n - j); i++) store_row_pairs(s.row_pairs, j + i, r, ds[i][0], ds[i][1]);
      for (int v = 0; v < vectors; v++) store_weights(words(s.key_pairs), j, r + v * kLanes, ds[0][v], &ds[1][v]);
    }
  }
}
#endif

#if PEFTKERN_HAS_AMX
// Splits a tile x [n][kBlockM] into bf16 terms [kTerms][kBlockN][kBlockM] whose sum is x. Each term is the leading
// eight bits of the remainder. Products with bf16 are exact and sums are fp32, so the result is as if x were multiplied
// in fp32, except that infinity becomes NaN.
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

// sums [n keys, width] += x [n][kBlockM] times the block's rows. For the sequence, x is rounded to pairs of bf16; a
// null x means that `row_pairs` already holds them. For the prefix, whose gradients train parameters, x stays fp32.
static void add_over_rows(const Problem& p, BackwardScratch& s, Part part, int64_t begin, int64_t n, RowRange rows,
                          const float* x, HeadDim dim, const float* floats, [[maybe_unused]] const float* pairs,
                          float* sums) {
  const int64_t width = dim.padded, count = min(rows.end, s.block.count) - rows.begin;
  const bool paired = p.pairs && part == kSequence;
  const int32_t* high = on_diagonal(s.block, part, begin, n) ? s.block.high : nullptr;
  const SeeingRows seeing{high, begin, rows.begin, count, paired};
  const Store add{sums, width, true};
#if PEFTKERN_HAS_PAIRS
  if (paired) {
    if (x) pair_rows(x, n, rows, s.row_pairs);
#if PEFTKERN_HAS_AMX
    if (p.amx)
      return gemm_tiles(n, width, seeing, words(s.row_pairs) + rows.begin / 2, kBlockM / 2,
                        words(pairs) + rows.begin / 2 * width, width, add);
#endif
    return gemm<false>(n, width, seeing, words(s.row_pairs) + rows.begin / 2, kBlockM / 2,
                       words(pairs) + rows.begin / 2 * width, width, add);
  }
#endif
#if PEFTKERN_HAS_AMX
  if (p.amx) {
    split_rows(x, n, rows, s.row_terms);
    const SeeingRows all{nullptr, begin, rows.begin, count, true};
    return gemm_tiles<kTerms>(n, width, all, words(s.row_terms) + rows.begin / 2, kBlockM / 2,
                              words(pairs) + rows.begin / 2 * width, width, add, kBlockN * kBlockM / 2);
  }
#endif
  gemm<false>(n, width, seeing, x + rows.begin, kBlockM, floats + rows.begin * width, width, add);
}

// dq [rows, dim] += grad^T keys. A null grad means that `key_pairs` already holds it.
static void add_over_keys(const Problem& p, BackwardScratch& s, Part part, const Tile& tile, int64_t begin, int64_t n,
                          RowRange rows, const float* grad) {
  const int64_t width = p.k_dim.padded, count = min(rows.end, s.block.count) - rows.begin;
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
    return multiply_keys_in_tiles(VisibleKeys{high, begin, n, rows.begin, true}, rows.end - rows.begin,
                                  grad + rows.begin, tile.by_key, s.dq_sums + rows.begin, true);
  }
#endif
  multiply_keys(p, VisibleKeys{high, begin, n, rows.begin, p.pairs}, count, grad + rows.begin, tile.by_key,
                Store{s.dq + rows.begin * width, width, true});
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif  // PEFTKERN_CPU_ATTENTION_BACKWARD_SUMS_H_
