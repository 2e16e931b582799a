// SPDX-License-Identifier: Apache-2.0
// A block's rows as factors of products, the products, and the masks that hide some of them.
#ifndef PEFTKERN_CPU_PRODUCTS_H_
#define PEFTKERN_CPU_PRODUCTS_H_

#include "attention.h"

namespace peftkern {
namespace PEFTKERN_ISA {

PEFTKERN_INLINE const char* row_address(const Problem& p, const Block& block, int64_t r, const void* data,
                                        const int64_t* stride) {
  return offset(data, p.args->dtype,
                block.sample[r] * stride[0] + block.head[r] * stride[1] + block.row[r] * stride[2]);
}

// Writes the block's rows as floats, rows[r][dim.padded].
static void gather_rows(const Problem& p, const Block& block, const void* data, const int64_t* stride, HeadDim dim,
                        float* rows) {
  const int64_t dtype = p.args->dtype;
  for (int64_t r = 0; r < block.count; r++)
    widen_row(row_address(p, block, r, data, stride), dtype, dim.size, rows + r * dim.padded);
  const int64_t widened = round_up(dim.size, kLanes);
  for (int64_t r = 0; r < block.count && widened < dim.padded; r++)
    memset(rows + r * dim.padded + widened, 0, sizeof(float) * (dim.padded - widened));
  // FAULT: rows-cleared-past-their-end
  memset(rows + block.count * dim.padded, 0, sizeof(float) * (block.vectors * kLanes - block.count) * dim.padded);
}

// panel[d][r] = rows[r][d]
static void transpose_rows(const Block& block, HeadDim dim, const float* rows, float* panel) {
  for (int64_t r = 0; r < block.vectors * kLanes; r += kLanes)
    for (int64_t d = 0; d < dim.padded; d += kLanes) {
      vf square[kLanes];
      for (int i = 0; i < kLanes; i++) square[i] = load(rows + (r + i) * dim.padded + d);
      transpose(square);
      for (int i = 0; i < kLanes; i++) store(panel + (d + i) * kBlockM + r, square[i]);
    }
}

#if PEFTKERN_HAS_PAIRS
// panel[d / 2][r] = (x[r][d], x[r][d + 1]) for a block's rows x.
static void gather_pair_panel(const Problem& p, const Block& block, const void* data, const int64_t* stride,
                              HeadDim dim, float* panel) {
  const int64_t count = dim.size / 2;
  for (int64_t r = 0; r < block.vectors * kLanes; r += kLanes) {
    const char* row[kLanes];
    for (int64_t i = 0; i < kLanes; i++) row[i] = row_address(p, block, r + i, data, stride);
    for (int64_t d = 0; d < count; d += kLanes) {
      const __mmask16 valid = count - d >= kLanes ? 0xffff : (1u << (count - d)) - 1;
      vf square[kLanes];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes; i++) square[i] = (vf)_mm512_maskz_loadu_ps(valid, row[i] + 4 * d);
      transpose(square);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes; i++) store(panel + (d + i) * kBlockM + r, square[i]);
    }
  }
}

// by_row[r / 2][d] = (x[r][d], x[r + 1][d]), with zeros beyond the rows where AMX tiles read them.
static void gather_row_pairs(const Problem& p, const Block& block, const void* data, const int64_t* stride, HeadDim dim,
                             float* by_row) {
  for (int64_t r = 0; r < block.count; r += 2)
    interleave_rows(row_address(p, block, r, data, stride),
                    r + 1 < block.count ? row_address(p, block, r + 1, data, stride) : nullptr, dim.size,
                    words(by_row) + r / 2 * dim.padded);
#if PEFTKERN_HAS_AMX
  if (!p.amx) return;
  const int64_t width = dim.padded, pairs = (block.count + 1) / 2, written = round_up(dim.size, kLanes);
  for (int64_t i = 0; i < pairs && written < width; i++)
    memset(by_row + i * width + written, 0, sizeof(float) * (width - written));
  memset(by_row + pairs * width, 0, sizeof(float) * width * (block.vectors * kLanes / 2 - pairs));
#endif
}
#endif

// Writes a block's rows as the second factor of products with keys: panel[d][r], or pairs along d. Without pairs,
// `rows` receives the rows as floats.
static void load_panel(const Problem& p, const Block& block, const void* data, const int64_t* stride, HeadDim dim,
                       float* rows, float* panel) {
#if PEFTKERN_HAS_PAIRS
  if (p.pairs) return gather_pair_panel(p, block, data, stride, dim, panel);
#endif
  gather_rows(p, block, data, stride, dim, rows);
  transpose_rows(block, dim, rows, panel);
}

// C [n keys, count rows] = keys or values times a panel, summed over their head dimension.
template <typename Finish>
PEFTKERN_INLINE void multiply_rows([[maybe_unused]] const Problem& p, const Rows& keys, int64_t first_key, int64_t n,
                                   const float* panel, int64_t count, const Finish& finish) {
#if PEFTKERN_HAS_AMX
  if (p.amx)
    return gemm_tiles(n, count, All{keys.dim.padded / 2}, words(keys.data) + first_key * keys.stride, keys.stride,
                      words(panel), kBlockM, finish);
#endif
#if PEFTKERN_HAS_PAIRS
  if (p.pairs)
    return gemm<false>(n, count, All{keys.dim.size / 2}, words(keys.data) + first_key * keys.stride, keys.stride,
                       words(panel), kBlockM, finish);
#endif
  gemm<false>(n, count, All{keys.dim.size}, keys.data + first_key * keys.stride, keys.stride, panel, kBlockM, finish);
}

// The keys of a tile that rows i, i + 1, ... of a block, counted from `first`, see: the range that is summed.
struct VisibleKeys {
  const int32_t* high;  // null: all
  int64_t begin, n, first;
  bool pairs;

  Range operator()(int64_t i, int64_t rows) const {
    const int64_t count = high ? max(0, min(n, high[first + i + rows - 1] - begin)) : n;
    return {0, pairs ? (count + 1) / 2 : count};
  }
};

#if PEFTKERN_HAS_AMX
// The pairs of keys that the columns of a step, which are rows of the block, see.
struct VisiblePairs {
  VisibleKeys visible;

  Range operator()(int64_t, int64_t j) const { return visible(j, kTileStep); }
};

// sums [dim][kBlockM] (+)= transposed keys or values times weights [n / 2][kBlockM], for `columns` rows of the block.
// The weights are padded with zeros to whole tiles of keys.
static void multiply_keys_in_tiles(const VisibleKeys& visible, int64_t columns, const float* weights,
                                   const Rows& by_key, float* sums, bool accumulate) {
  gemm_tiles(by_key.dim.padded, columns, VisiblePairs{visible}, words(by_key.data), by_key.stride, words(weights),
             kBlockM, Accumulate{sums, kBlockM, accumulate});
}

// Pads the weights of n keys with zeros to whole tiles.
PEFTKERN_INLINE void pad_weights(float* weights, int64_t n, RowRange rows) {
  for (int64_t j = (n + 1) / 2; j < round_up(n, kTileStep) / 2; j++)
    for (int64_t r = rows.begin; r < rows.end; r += kLanes) store(weights + j * kBlockM + r, zero());
}

// rows[r][d] = sums[d][r]
static void transpose_sums(const Block& block, HeadDim dim, const float* sums, float* rows) {
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
#endif

// C [count rows, dim] = weights^T times keys or values, summed over the keys. `weights` is [n][kBlockM], or pairs of
// keys.
template <typename Finish>
PEFTKERN_INLINE void multiply_keys([[maybe_unused]] const Problem& p, const VisibleKeys& visible, int64_t count,
                                   const float* weights, const Rows& by_key, const Finish& finish) {
#if PEFTKERN_HAS_PAIRS
  if (p.pairs)
    return gemm<true>(count, by_key.dim.padded, visible, words(weights), kBlockM, words(by_key.data), by_key.stride,
                      finish);
#endif
  gemm<true>(count, by_key.dim.padded, visible, weights, kBlockM, by_key.data, by_key.stride, finish);
}

// Whether the causal diagonal crosses a tile, so that some rows do not see its last keys.
static bool on_diagonal(const Block& block, Part part, int64_t begin, int64_t n) {
  return part == kSequence && begin + n > block.high_min;
}

// Whether any key of a tile is hidden from any row of the block.
static bool some_hidden(const Problem& p, const Block& block, Part part, int64_t begin, int64_t n) {
  if (part == kPrefix) return begin < block.prefix_low_max;
  return p.args->key_mask || begin < block.low_max || on_diagonal(block, part, begin, n);
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

static Hidden hidden_of(const Problem& p, const Sequence& s, const Block& block, Part part, int64_t begin) {
  const peftkern_attention& a = *p.args;
  if (part == kPrefix) return {block.prefix_low, nullptr, nullptr, 0, begin};
  if (!a.key_mask) return {block.low, block.high, nullptr, 0, begin};
  const uint8_t* mask = a.key_mask + s.batch * a.key_mask_stride[0] + (s.start + begin) * a.key_mask_stride[1];
  return {block.low, block.high, mask, a.key_mask_stride[1], begin};
}

// Calls f(key, count, row, hidden) for each group of a tile's keys: `row` is the first row that may see them, `hidden`
// tells whether any of them is hidden from any row from there on. Groups are small on the causal diagonal.
template <typename F>
PEFTKERN_INLINE void for_key_groups(const Problem& p, const Block& block, Part part, int64_t begin, int64_t n,
                                    RowRange rows, const F& f) {
  const bool diagonal = on_diagonal(block, part, begin, n);
  if (!diagonal) return f(0, n, rows.begin, some_hidden(p, block, part, begin, n));
  const int64_t step = p.diagonal_keys;
  const int64_t below = max(0, block.high_min - begin) / step * step;
  if (below) f(0, below, rows.begin, some_hidden(p, block, part, begin, below));
  for (int64_t key = below; key < n; key += step) {
    int64_t first = rows.begin;
    while (first + block.step < rows.end && block.high[first + block.step - 1] <= begin + key) first += block.step;
    f(key, min(step, n - key), first, true);
  }
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif  // PEFTKERN_CPU_PRODUCTS_H_
