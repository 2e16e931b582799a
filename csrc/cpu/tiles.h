// SPDX-License-Identifier: Apache-2.0
// Tiles of keys and values. Those of a sequence are widened or paired on first use, those of a prefix are packed once.
#ifndef PEFTKERN_CPU_TILES_H_
#define PEFTKERN_CPU_TILES_H_

#include "attention.h"

namespace peftkern {
namespace PEFTKERN_ISA {

// The keys and values of the current sequence, widened or paired on first use.
struct SequenceTiles {
  float *k, *v;  // [length, padded_dim] each; with pairs, k holds rows and then `by_key`
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
    for (int64_t t = sequence->start + begin; t < sequence->start + end; t++)
      for (int64_t d = 0; d < p.head_dim; d += line) {
        __builtin_prefetch(offset(a.k, a.dtype, base_k + t * a.k_stride[2] + d));
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
      return with_by_key(p, {reinterpret_cast<const float*>(k_row(0)), a.k_stride[2]},
                         {reinterpret_cast<const float*>(v_row(0)), a.v_stride[2]});
    }
    if (make) {
      if (keep) ready[begin / kBlockN] = 1;
      prefetch(p, base_k, base_v, begin + n);
    }
#if PEFTKERN_HAS_PAIRS
    if (p.pairs) return get_pairs(p, place, n, make, k_row, v_row);
#endif
    const int64_t dim = p.padded_dim;
    for (int64_t j = 0; j < n && make; j++) {
      widen_row(k_row(j), a.dtype, p.head_dim, k + (place + j) * dim);
      widen_row(v_row(j), a.dtype, p.head_dim, v + (place + j) * dim);
    }
    return with_by_key(p, {k + place * dim, dim}, {v + place * dim, dim});
  }

  static Tile with_by_key(const Problem& p, Rows k_rows, Rows v_rows) {
    return {k_rows, v_rows, p.backward ? k_rows : v_rows};
  }

#if PEFTKERN_HAS_PAIRS
  template <typename KRow, typename VRow>
  Tile get_pairs(const Problem& p, int64_t place, int64_t n, bool make, const KRow& k_row, const VRow& v_row) {
    const int64_t dim = p.padded_dim, width = dim / 2, bytes = 2 * p.head_dim;
    float *k_rows = k + place * width, *by_key = k + (length + place) * width, *v_rows = v + place * width;
#if PEFTKERN_HAS_AMX
    if (p.amx) {
      if (make) {
        pad_rows(p, n, k_row, k_rows);
        if (p.backward) pad_rows(p, n, v_row, v_rows);
        for (int64_t j = 0; j < n; j += kTileStep) {
          const auto summed = [&](int64_t i) { return p.backward ? k_row(j + i) : v_row(j + i); };
          transpose_pairs(p, min(kTileStep, n - j), summed, words(by_key) + j / 2, kBlockN / 2);
        }
      }
      return {{k_rows, width}, {v_rows, width}, {by_key, kBlockN / 2}};
    }
#endif
    if (make) {
      for (int64_t j = 0; j < n && !p.k_pairs_in_place; j++) memcpy(k_rows + j * width, k_row(j), bytes);
      for (int64_t j = 0; j < n && p.backward && !p.v_pairs_in_place; j++) memcpy(v_rows + j * width, v_row(j), bytes);
      for (int64_t j = 0; j < n; j += 2) {
        const bool two = j + 1 < n;
        uint32_t* pairs = words(by_key) + j / 2 * dim;
        if (p.backward)
          interleave_rows(k_row(j), two ? k_row(j + 1) : nullptr, p.head_dim, pairs);
        else
          interleave_rows(v_row(j), two ? v_row(j + 1) : nullptr, p.head_dim, pairs);
      }
    }
    Tile tile{{k_rows, width}, {v_rows, width}, {by_key, dim}};
    if (p.k_pairs_in_place) tile.k = {reinterpret_cast<const float*>(k_row(0)), p.args->k_stride[2] / 2};
    if (p.v_pairs_in_place) tile.v = {reinterpret_cast<const float*>(v_row(0)), p.args->v_stride[2] / 2};
    return tile;
  }
#endif

#if PEFTKERN_HAS_AMX
  // Copies n rows and pads them with zeros to kTileStep rows of padded_dim.
  template <typename Row>
  static void pad_rows(const Problem& p, int64_t n, const Row& row, float* out) {
    const int64_t width = p.padded_dim / 2, bytes = 2 * p.head_dim, padding = 2 * p.padded_dim - bytes;
    for (int64_t j = 0; j < n; j++) {
      memcpy(out + j * width, row(j), bytes);
      if (padding) memset(reinterpret_cast<char*>(out + j * width) + bytes, 0, padding);
    }
    memset(out + n * width, 0, sizeof(float) * width * (round_up(n, kTileStep) - n));
  }
#endif
};

static Tile prefix_tile(const Problem& p, const Sequence& s, int64_t kv_head, int64_t begin) {
  const int64_t dim = p.padded_dim;
  const int64_t at = (s.prefix * p.args->num_kv_heads + kv_head) * p.packed_len * dim;
  const float *k = p.prefix_k + at, *v = p.prefix_v + at;
  if (!p.pairs) return SequenceTiles::with_by_key(p, {k + begin * dim, dim}, {v + begin * dim, dim});
  const int64_t width = dim / 2;
  const float* by_key = k + (p.packed_len + begin) * width;
  return {{k + begin * width, width}, {v + begin * width, width}, {by_key, p.amx ? kBlockN / 2 : dim}};
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
    if (a.prefix_lens && j >= read_index(a.prefix_lens, a.prefix_lens_dtype, prefix)) return {nullptr, nullptr, a.dtype};
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
    float* k = out_k + (j - begin) * p.padded_dim;
    float* v = out_v + (j - begin) * p.padded_dim;
    const PrefixRow row = prefix_row(p, prefix, kv_head, j);
    if (!row.k) {
      memset(k, 0, sizeof(float) * p.padded_dim);
      memset(v, 0, sizeof(float) * p.padded_dim);
      continue;
    }
    widen_row(row.k, row.dtype, p.head_dim, k);
    widen_row(row.v, row.dtype, p.head_dim, v);
    if (row.dtype != dtype) {
      round_row(k, p.padded_dim, dtype);
      round_row(v, p.padded_dim, dtype);
    }
  }
}

#if PEFTKERN_HAS_PAIRS
// Stores one head of one prefix as pairs, in the layout that prefix_tile() reads.
static void pair_prefix(const Problem& p, int64_t prefix, int64_t kv_head, float* out_k, float* out_v) {
  const int64_t dim = p.padded_dim, length = p.args->prefix_len;
  alignas(64) float k[2 * kMaxHeadDim] = {}, v[2 * kMaxHeadDim] = {};
  for (int64_t j = 0; j < length; j += 2) {
    const int64_t n = min(2, length - j);
    widen_prefix(p, prefix, kv_head, j, n, k, v);
    if (n < 2) {
      memset(k + dim, 0, sizeof(float) * dim);
      memset(v + dim, 0, sizeof(float) * dim);
    }
    const float* summed = p.backward ? k : v;
    uint32_t* by_key = words(out_k) + (p.packed_len + j) * dim / 2;
    for (int64_t d = 0; d < dim; d += kLanes) {
      const vu pairs = bf16_pairs(load(summed + d), load(summed + dim + d));
      if (!p.amx) __builtin_memcpy(by_key + d, &pairs, sizeof pairs);
      for (int64_t i = 0; i < n; i++) {
        const vh k_row = to_bf16(load(k + i * dim + d)), v_row = to_bf16(load(v + i * dim + d));
        __builtin_memcpy(reinterpret_cast<uint16_t*>(out_k) + (j + i) * dim + d, &k_row, sizeof k_row);
        __builtin_memcpy(reinterpret_cast<uint16_t*>(out_v) + (j + i) * dim + d, &v_row, sizeof v_row);
      }
    }
  }
#if PEFTKERN_HAS_AMX
  if (!p.amx) return;
  const int64_t padding = sizeof(uint16_t) * dim * (round_up(length, kTileStep) - length);
  memset(reinterpret_cast<uint16_t*>(out_k) + length * dim, 0, padding);
  memset(reinterpret_cast<uint16_t*>(out_v) + length * dim, 0, padding);
  const uint16_t* summed = reinterpret_cast<const uint16_t*>(p.backward ? out_k : out_v);
  for (int64_t j = 0; j < length; j += kTileStep) {
    uint32_t* by_key = words(out_k) + (p.packed_len + j / kBlockN * kBlockN) * dim / 2 + j % kBlockN / 2;
    transpose_pairs(
        p, min(kTileStep, length - j), [&](int64_t i) { return summed + (j + i) * dim; }, by_key, kBlockN / 2);
  }
#endif
}
#endif

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif  // PEFTKERN_CPU_TILES_H_
