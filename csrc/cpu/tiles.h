// SPDX-License-Identifier: Apache-2.0
// Tiles of keys and values. Those of a sequence are packed on first use, those of a prefix by all threads at the start.
#ifndef PEFTKERN_CPU_TILES_H_
#define PEFTKERN_CPU_TILES_H_

#include "tokens.h"

namespace peftkern {
namespace PEFTKERN_ISA {

// The tiles of one source at a time.
template <typename L>
struct Tiles {
  typedef typename L::Word Word;

  TileMemory<Word> memory;
  uint8_t* ready;  // of each tile: whether it is packed
  Source source;
  int64_t length;            // tokens of the source
  const Sequence* sequence;  // null: a prefix, which other tasks read as well
  bool keep;                 // every tile has memory of its own; else all share one
  InPlace where;

  // `tokens` that are packed at a time, and `all` of the longest source.
  void take(const Problem<L>& p, int64_t tokens, int64_t all, Arena& arena) {
    memory.k = arena.take<Word>(tokens * p.k_dim.padded);
    memory.v = arena.take<Word>(tokens * p.v_dim.padded);
    memory.length = tokens;
    ready = arena.take<uint8_t>(all / kBlockN + 1);
    sequence = nullptr;
  }

  void open(const Problem<L>& p, const Target& target, bool keep_tiles) {
    if (sequence == &target.seq && source.kv_head == target.kv_head && keep && keep_tiles) return;
    sequence = &target.seq;
    start(p, sequence_source(p, target), target.seq.kv_len, keep_tiles);
  }

  // Tiles of a prefix that are read once.
  void open_prefix(const Problem<L>& p, const Target& target) {
    sequence = nullptr;
    start(p, prefix_source(p, target.seq.prefix, target.kv_head), target.seq.prefix_len, false);
  }

  // The tile from token `begin` on.
  Tile<Word> get(const Problem<L>& p, int64_t begin) {
    const RowRange tokens{begin, min(begin + kBlockN, length)};
    const int64_t at = keep ? begin : 0;
    if (!keep || !ready[begin / kBlockN]) {
      if (keep) ready[begin / kBlockN] = 1;
      if (sequence && !(keep && where.all())) prefetch(p, tokens.end);
      L::pack_tile(p, source, tokens, where, memory, at);
    }
    Tile<Word> tile{};
    if (!where.all()) tile = L::packed_tile(p, memory, at);
    if (where.k) tile.k = in_place(source.token(begin).k, source.k_stride, p.k_dim);
    if (where.v) tile.v = in_place(source.token(begin).v, source.v_stride, p.v_dim);
    if (where.by_key) tile.by_key = p.backward ? tile.k : tile.v;
    return tile;
  }

 private:
  void start(const Problem<L>& p, const Source& from, int64_t tokens, bool keep_tiles) {
    source = from;
    length = tokens;
    keep = keep_tiles;
    where = L::in_place(p, from, keep);
    if (keep) memset(ready, 0, (tokens + kBlockN - 1) / kBlockN);
  }

  static Rows<Word> in_place(const void* row, int64_t stride, HeadDim dim) {
    return {static_cast<const Word*>(row), L::kPaired ? stride / 2 : stride, dim};
  }

  // Prefetches the tile from `begin` on. Its rows may be far apart, so that hardware prefetchers miss them.
  void prefetch(const Problem<L>& p, int64_t begin) const {
    const int64_t count = min(length, begin + kBlockN) - begin;
    if (count <= 0) return;
    const Token first = source.token(begin);
    prefetch_rows(first.k, source.k_stride, count, p.k_dim.size);
    prefetch_rows(first.v, source.v_stride, count, p.v_dim.size);
  }

  void prefetch_rows(const void* rows, int64_t stride, int64_t count, int64_t n) const {
    const int64_t size = source.first.dtype == PEFTKERN_FLOAT32 ? 4 : 2;
    const char* row = static_cast<const char*>(rows);
    for (int64_t t = 0; t < count; t++, row += stride * size)
      for (int64_t byte = 0; byte < n * size; byte += 64) __builtin_prefetch(row + byte);
  }
};

// Whether no tile of a sequence needs memory.
template <typename L>
static bool all_in_place(const Problem<L>& p) {
  const peftkern_attention& a = *p.args;
  return L::in_place(p, Source{&a, 0, {a.k, a.v, a.dtype}, a.k_stride[2], a.v_stride[2], -1}, true).all();
}

// The prefixes of a call, packed: [bank, num_kv_heads, packed_len] tokens.
template <typename L>
struct PackedPrefixes {
  typedef typename L::Word Word;

  TileMemory<Word> memory;  // of all of them; its length is that of one prefix and kv head

  void take(const Problem<L>& p, Arena& arena) {
    memory.length = round_up(p.args->prefix_len, L::kPrefixStep);
    const int64_t tokens = p.args->bank_size * p.args->num_kv_heads * memory.length;
    memory.k = arena.take<Word>(tokens * p.k_dim.padded);
    memory.v = arena.take<Word>(tokens * p.v_dim.padded);
  }

  TileMemory<Word> of(const Problem<L>& p, int64_t prefix, int64_t kv_head) const {
    const int64_t first = (prefix * p.args->num_kv_heads + kv_head) * memory.length;
    return {memory.k + first * p.k_dim.padded, memory.v + first * p.v_dim.padded, memory.length};
  }

  // Packs them with all threads of the team. A barrier follows.
  void pack(const Problem<L>& p) const {
    const int64_t kv_heads = p.args->num_kv_heads, length = p.args->prefix_len;
#pragma omp for schedule(static)  // FAULT: prefix-read-before-it-is-packed
    for (int64_t i = 0; i < p.args->bank_size * kv_heads; i++) {
      const TileMemory<Word> to = of(p, i / kv_heads, i % kv_heads);
      const Source source = prefix_source(p, i / kv_heads, i % kv_heads);
      for (int64_t begin = 0; begin < length; begin += kBlockN)
        L::pack_tile(p, source, {begin, min(begin + kBlockN, length)}, {false, false, false}, to, begin);
    }
  }

  Tile<Word> tile(const Problem<L>& p, const Target& target, int64_t begin) const {
    return L::packed_tile(p, of(p, target.seq.prefix, target.kv_head), begin);
  }
};

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif  // PEFTKERN_CPU_TILES_H_
