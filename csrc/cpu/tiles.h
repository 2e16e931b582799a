// SPDX-License-Identifier: Apache-2.0
// Tiles of keys and values. Those of a sequence are widened or paired on first use, those of a prefix are packed once.
#ifndef PEFTKERN_CPU_TILES_H_
#define PEFTKERN_CPU_TILES_H_

#include "attention.h"

namespace peftkern {
namespace PEFTKERN_ISA {

// The keys and values of the current sequence, widened or paired on first use.
struct SequenceTiles {
  float *k, *v;  // [length, dim.padded] each; with pairs, rows fill half, and `by_key` follows those it is made of
  uint8_t* ready;
  int64_t length;
  const Sequence* sequence;
  int64_t kv_head;
  bool keep;  // every tile has memory of its own; else all share one

  void open(const Sequence& s, int64_t head, bool keep_tiles) {
    if (sequence == &s && kv_head == head && keep && keep_tiles) return;
    sequence = &s;
    kv_head = head;
    keep = keep_tiles;
    if (keep) memset(ready, 0, (s.kv_len + kBlockN - 1) / kBlockN);
  }

  // Prefetches the next tile. Its rows are far apart, so hardware prefetchers miss them.
  void prefetch(const Problem& p, int64_t base_k, int64_t base_v, int64_t begin) const {
    const peftkern_attention& a = *p.args;
    const int64_t end = min(sequence->kv_len, begin + kBlockN), line = a.dtype == PEFTKERN_FLOAT32 ? 16 : 32;
    for (int64_t t = sequence->start + begin; t < sequence->start + end; t++) {
      for (int64_t d = 0; d < p.k_dim.size; d += line)
        __builtin_prefetch(offset(a.k, a.dtype, base_k + t * a.k_stride[2] + d));
      for (int64_t d = 0; d < p.v_dim.size; d += line)
        __builtin_prefetch(offset(a.v, a.dtype, base_v + t * a.v_stride[2] + d));
    }
  }

  Tile get(const Problem& p, int64_t begin, int64_t n) {
    const peftkern_attention& a = *p.args;
    const int64_t base_k = sequence->batch * a.k_stride[0] + kv_head * a.k_stride[1];
    const int64_t base_v = sequence->batch * a.v_stride[0] + kv_head * a.v_stride[1];
    const int64_t first = sequence->start + begin, place = keep ? begin : 0;
    const bool make = !keep || !ready[begin / kBlockN];
    const auto k_row = [&](int64_t j) { return offset(a.k, a.dtype, base_k + (first + j) * a.k_stride[2]); };
    const auto v_row = [&](int64_t j) { return offset(a.v, a.dtype, base_v + (first + j) * a.v_stride[2]); };
    if (p.always_in_place || (p.in_place && !keep)) {
      if (!keep) prefetch(p, base_k, base_v, begin + n);
      return with_by_key(p, {reinterpret_cast<const float*>(k_row(0)), a.k_stride[2], p.k_dim},
                         {reinterpret_cast<const float*>(v_row(0)), a.v_stride[2], p.v_dim});
    }
    if (make) {
      if (keep) ready[begin / kBlockN] = 1;
      prefetch(p, base_k, base_v, begin + n);
    }
#if PEFTKERN_HAS_PAIRS
    if (p.pairs) return get_pairs(p, place, n, make, k_row, v_row);
#endif
    const int64_t k_width = p.k_dim.padded, v_width = p.v_dim.padded;
    for (int64_t j = 0; j < n && make; j++) {
      widen_row(k_row(j), a.dtype, p.k_dim.size, k + (place + j) * k_width);
      widen_row(v_row(j), a.dtype, p.v_dim.size, v + (place + j) * v_width);
    }
    return with_by_key(p, {k + place * k_width, k_width, p.k_dim}, {v + place * v_width, v_width, p.v_dim});
  }

  static Tile with_by_key(const Problem& p, Rows k_rows, Rows v_rows) {
    return {k_rows, v_rows, p.backward ? k_rows : v_rows};
  }

#if PEFTKERN_HAS_PAIRS
  template <typename KRow, typename VRow>
  Tile get_pairs(const Problem& p, int64_t place, int64_t n, bool make, const KRow& k_row, const VRow& v_row) {
    const HeadDim dim = p.by_key_dim();
    const int64_t k_width = p.k_dim.padded / 2, v_width = p.v_dim.padded / 2;
    float *k_rows = k + place * k_width, *v_rows = v + place * v_width;
    float* by_key = (p.backward ? k : v) + (length + place) * dim.padded / 2;
#if PEFTKERN_HAS_AMX
    if (p.amx) {
      if (make) {
        pad_rows(p.k_dim, n, k_row, k_rows);
        if (p.backward) pad_rows(p.v_dim, n, v_row, v_rows);
        for (int64_t j = 0; j < n; j += kTileStep) {
          const auto summed = [&](int64_t i) { return p.backward ? k_row(j + i) : v_row(j + i); };
          transpose_pairs(dim, min(kTileStep, n - j), summed, words(by_key) + j / 2, kBlockN / 2);
        }
      }
      return {{k_rows, k_width, p.k_dim}, {v_rows, v_width, p.v_dim}, {by_key, kBlockN / 2, dim}};
    }
#endif
    if (make) {
      for (int64_t j = 0; j < n && !p.k_pairs_in_place; j++) memcpy(k_rows + j * k_width, k_row(j), 2 * p.k_dim.size);
      for (int64_t j = 0; j < n && p.backward && !p.v_pairs_in_place; j++)
        memcpy(v_rows + j * v_width, v_row(j), 2 * p.v_dim.size);
      for (int64_t j = 0; j < n; j += 2) {
        const bool two = j + 1 < n;
        uint32_t* pairs = words(by_key) + j / 2 * dim.padded;
        if (p.backward)
          interleave_rows(k_row(j), two ? k_row(j + 1) : nullptr, dim.size, pairs);
        else
          interleave_rows(v_row(j), two ? v_row(j + 1) : nullptr, dim.size, pairs);
      }
    }
    Tile tile{{k_rows, k_width, p.k_dim}, {v_rows, v_width, p.v_dim}, {by_key, dim.padded, dim}};
    if (p.k_pairs_in_place) tile.k = {reinterpret_cast<const float*>(k_row(0)), p.args->k_stride[2] / 2, p.k_dim};
    if (p.v_pairs_in_place) tile.v = {reinterpret_cast<const float*>(v_row(0)), p.args->v_stride[2] / 2, p.v_dim};
    return tile;
  }
#endif

#if PEFTKERN_HAS_AMX
  // Copies n rows and pads them with zeros to kTileStep rows of dim.padded.
  template <typename Row>
  static void pad_rows(HeadDim dim, int64_t n, const Row& row, float* out) {
    const int64_t width = dim.padded / 2, bytes = 2 * dim.size, padding = 2 * dim.padded - bytes;
    for (int64_t j = 0; j < n; j++) {
      memcpy(out + j * width, row(j), bytes);
      if (padding) memset(reinterpret_cast<char*>(out + j * width) + bytes, 0, padding);
    }
    memset(out + n * width, 0, sizeof(float) * width * (round_up(n, kTileStep) - n));
  }
#endif
};

static Tile prefix_tile(const Problem& p, const Sequence& s, int64_t kv_head, int64_t begin) {
  const int64_t rows = (s.prefix * p.args->num_kv_heads + kv_head) * p.packed_len;  // of the heads before this one
  const float *k = p.prefix_k + rows * p.k_dim.padded, *v = p.prefix_v + rows * p.v_dim.padded;
  // a pair is one word
  const int64_t k_width = p.pairs ? p.k_dim.padded / 2 : p.k_dim.padded;
  const int64_t v_width = p.pairs ? p.v_dim.padded / 2 : p.v_dim.padded;
  const Rows k_rows{k + begin * k_width, k_width, p.k_dim}, v_rows{v + begin * v_width, v_width, p.v_dim};
  if (!p.pairs) return SequenceTiles::with_by_key(p, k_rows, v_rows);
  const HeadDim dim = p.by_key_dim();
  const float* by_key = (p.backward ? k : v) + (p.packed_len + begin) * dim.padded / 2;
  return {k_rows, v_rows, {by_key, p.amx ? kBlockN / 2 : dim.padded, dim}};
}

// Widens tokens [begin, begin + n) of one head of one prefix, rounded to q's dtype.
// Token j of a prefix. Null behind the end of a prefix of which prefix_rows says where its tokens lie.
struct PrefixRow {
  const void *k, *v;
  int64_t dtype;
};

static PrefixRow prefix_row(const Problem& p, int64_t prefix, int64_t kv_head, int64_t j) {
  const peftkern_attention& a = *p.args;
  int64_t entry = prefix;
  if (a.prefix_rows) {
    if (a.prefix_lens && j >= read_index(a.prefix_lens, a.prefix_lens_dtype, prefix))
      return {nullptr, nullptr, a.dtype};
    const int64_t* at = a.prefix_rows + 2 * (prefix * a.prefix_len + j);
    entry = at[0];
    j = at[1];
  }
  if (entry < 0)
    return {offset(a.k, a.dtype, kv_head * a.k_stride[1] + j * a.k_stride[2]),
            offset(a.v, a.dtype, kv_head * a.v_stride[1] + j * a.v_stride[2]), a.dtype};
  const int64_t *k = a.prefix_k_stride, *v = a.prefix_v_stride;
  return {offset(a.prefix_k, a.prefix_dtype, entry * k[0] + kv_head * k[1] + j * k[2]),
          offset(a.prefix_v, a.prefix_dtype, entry * v[0] + kv_head * v[1] + j * v[2]), a.prefix_dtype};
}

static void widen_prefix(const Problem& p, int64_t prefix, int64_t kv_head, int64_t begin, int64_t n, float* out_k,
                         float* out_v) {
  const int64_t dtype = p.args->dtype;
  for (int64_t j = begin; j < begin + n; j++) {
    float* k = out_k + (j - begin) * p.k_dim.padded;
    float* v = out_v + (j - begin) * p.v_dim.padded;
    const PrefixRow row = prefix_row(p, prefix, kv_head, j);
    if (!row.k) {
      memset(k, 0, sizeof(float) * p.k_dim.padded);
      memset(v, 0, sizeof(float) * p.v_dim.padded);
      continue;
    }
    widen_row(row.k, row.dtype, p.k_dim.size, k);
    widen_row(row.v, row.dtype, p.v_dim.size, v);
    if (row.dtype != dtype) {
      round_row(k, p.k_dim.padded, dtype);
      round_row(v, p.v_dim.padded, dtype);
    }
  }
}

#if PEFTKERN_HAS_PAIRS
// Stores tokens j and, if n is 2, j + 1 of a prefix as rows and, if they are `summed` over keys, as pairs of keys.
static void store_prefix_pairs(const Problem& p, float* rows, HeadDim dim, int64_t j, int64_t n, bool summed,
                               float* out) {
  if (n < 2) memset(rows + dim.padded, 0, sizeof(float) * dim.padded);
  uint32_t* by_key = words(out) + (p.packed_len + j) * dim.padded / 2;
  for (int64_t d = 0; d < dim.padded; d += kLanes) {
    const vu pairs = bf16_pairs(load(rows + d), load(rows + dim.padded + d));
    if (summed && !p.amx) __builtin_memcpy(by_key + d, &pairs, sizeof pairs);
    for (int64_t i = 0; i < n; i++) {
      const vh row = to_bf16(load(rows + i * dim.padded + d));
      __builtin_memcpy(reinterpret_cast<uint16_t*>(out) + (j + i) * dim.padded + d, &row, sizeof row);
    }
  }
}

#if PEFTKERN_HAS_AMX
// Pads the rows of a prefix with zeros to whole steps and, if they are `summed` over keys, transposes them.
static void finish_prefix_tiles(const Problem& p, HeadDim dim, bool summed, float* out) {
  const int64_t length = p.args->prefix_len, padding = round_up(length, kTileStep) - length;
  uint16_t* rows = reinterpret_cast<uint16_t*>(out);
  memset(rows + length * dim.padded, 0, sizeof(uint16_t) * dim.padded * padding);
  for (int64_t j = 0; j < length && summed; j += kTileStep) {
    uint32_t* by_key = words(out) + (p.packed_len + j / kBlockN * kBlockN) * dim.padded / 2 + j % kBlockN / 2;
    transpose_pairs(
        dim, min(kTileStep, length - j), [&](int64_t i) { return rows + (j + i) * dim.padded; }, by_key, kBlockN / 2);
  }
}
#endif

// Stores one head of one prefix as pairs, in the layout that prefix_tile() reads.
static void pair_prefix(const Problem& p, int64_t prefix, int64_t kv_head, float* out_k, float* out_v) {
  alignas(64) float k[2 * kMaxHeadDim] = {}, v[2 * kMaxHeadDim] = {};
  for (int64_t j = 0; j < p.args->prefix_len; j += 2) {
    const int64_t n = min(2, p.args->prefix_len - j);
    widen_prefix(p, prefix, kv_head, j, n, k, v);
    store_prefix_pairs(p, k, p.k_dim, j, n, p.backward, out_k);
    store_prefix_pairs(p, v, p.v_dim, j, n, !p.backward, out_v);
  }
#if PEFTKERN_HAS_AMX
  if (!p.amx) return;
  finish_prefix_tiles(p, p.k_dim, p.backward, out_k);
  finish_prefix_tiles(p, p.v_dim, !p.backward, out_v);
#endif
}
#endif

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif  // PEFTKERN_CPU_TILES_H_
