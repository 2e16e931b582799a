// SPDX-License-Identifier: Apache-2.0
// What the layouts of bf16 pairs share. Products of bf16 numbers are exact and are summed in fp32. Weights and
// gradients of scores are rounded to bf16 before they are multiplied, as in every bf16 attention. The prefix's
// gradients, which train parameters, are summed in fp32.
#ifndef PEFTKERN_CPU_LAYOUTS_PAIRS_H_
#define PEFTKERN_CPU_LAYOUTS_PAIRS_H_

#include "fp32.h"

namespace peftkern {
namespace PEFTKERN_ISA {

struct Pairs {
  typedef uint32_t Word;
  static constexpr bool kPaired = true;

  // A tile of weights or gradients, [n][kBlockM].
  struct Temporaries {
    Word *row_pairs, *key_pairs;  // as pairs of neighbouring rows, as pairs of neighbouring keys

    void take(Arena& arena) {
      row_pairs = arena.take<Word>(kBlockN * kBlockM / 2 + kLanes);  // a vector of pairs may end beyond the last key
      key_pairs = arena.take<Word>(kBlockN * kBlockM / 2);
    }
  };

  static bool serves(const peftkern_attention& a) {
    return a.dtype == PEFTKERN_BFLOAT16 && a.head_dim % 2 == 0 && a.value_dim % 2 == 0;
  }

  // The row itself, or its numbers rounded to bf16 in `buffer`; zeros instead of a null row.
  static const uint16_t* bf16_row(const void* row, int64_t dtype, int64_t n, uint16_t* buffer) {
    if (row && dtype == PEFTKERN_BFLOAT16) return static_cast<const uint16_t*>(row);
    if (!row) {
      memset(buffer, 0, sizeof(uint16_t) * n);
      return buffer;
    }
    alignas(64) float floats[kMaxHeadDim];
    widen_row(row, dtype, n, floats);
    narrow_row(floats, 1.0f, n, PEFTKERN_BFLOAT16, buffer);
    return buffer;
  }

  static Word* by_key_memory(const Call& p, const TileMemory<Word>& memory, int64_t at) {
    return (p.backward ? memory.k : memory.v) + (memory.length + at) * p.by_key_dim().padded / 2;
  }

  // panel[d / 2][r] = (x[r][d], x[r][d + 1]) for a block's rows x.
  static void load_panel(const Call& p, const Block& block, const Tensor& x, float*, Word* panel) {
    const int64_t count = x.dim.size / 2;
    for (int64_t r = 0; r < block.vectors * kLanes; r += kLanes) {
      const float* row[kLanes];
      for (int64_t i = 0; i < kLanes; i++) row[i] = reinterpret_cast<const float*>(row_address(p, block, r + i, x));
      for (int64_t d = 0; d < count; d += kLanes) {
        vf square[kLanes];
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes; i++) square[i] = load_first(row[i] + d, count - d);
        transpose(square);
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes; i++) store_words(panel + (d + i) * kBlockM + r, (vu)square[i]);
      }
    }
  }

  // pairs[r / 2][d] = (x[r][d], x[r + 1][d])
  static void gather_row_pairs(const Call& p, const Block& block, const Tensor& x, Word* pairs) {
    const auto row = [&](int64_t r) { return reinterpret_cast<const uint16_t*>(row_address(p, block, r, x)); };
    for (int64_t r = 0; r < block.count; r += 2)
      interleave_rows(row(r), r + 1 < block.count ? row(r + 1) : nullptr, x.dim.size, pairs + r / 2 * x.dim.padded);
  }

  PEFTKERN_INLINE_MEMBER static void store_words(Word* to, vu words) { __builtin_memcpy(to, &words, sizeof words); }

  PEFTKERN_INLINE_MEMBER static void store_weights(Word* weights, int64_t i, int64_t r, vf first, const vf* second) {
    store_words(weights + i / 2 * kBlockM + r, bf16_pairs(first, second ? *second : zero()));
  }

  // Stores two vectors of rows r, r + 1, ... of key j as pairs of neighbouring rows.
  PEFTKERN_INLINE_MEMBER static void store_row_pairs(Word* pairs, int64_t j, int64_t r, vf first, vf second) {
    store_words(pairs + (j * kBlockM + r) / 2, bf16_both(first, second));
  }

  // Stores a tile as pairs of neighbouring rows.
  static void pair_rows(const float* x, int64_t n, RowRange rows, Word* pairs) {
    for (int64_t j = 0; j < n; j++)
      for (int64_t r = rows.begin; r < rows.end; r += 2 * kLanes)
        store_row_pairs(pairs, j, r, load(x + j * kBlockM + r),
                        r + kLanes < rows.end ? load(x + j * kBlockM + r + kLanes) : zero());
  }

  // Stores a tile as pairs of neighbouring keys.
  static Word* key_weights(const Span& span, float* x, const Temporaries& temporaries) {
    const int64_t n = span.n;
    const RowRange rows = span.rows;
    Word* pairs = temporaries.key_pairs;
    for (int64_t j = 0; j < n; j += 2)
      for (int64_t r = rows.begin; r < rows.end; r += kLanes) {
        const vf second = j + 1 < n ? load(x + (j + 1) * kBlockM + r) : zero();
        store_weights(pairs, j, r, load(x + j * kBlockM + r), &second);
      }
    return pairs;
  }
};

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif  // PEFTKERN_CPU_LAYOUTS_PAIRS_H_
