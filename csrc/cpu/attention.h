// SPDX-License-Identifier: Apache-2.0
// What forward and backward share: a block of query rows, tiles of keys, and the way from products to scores.
//
// A block is up to kBlockM rows, positions x heads that read one kv head. Scores are held transposed, [key][row], so that
// the lanes of a vector are rows: a softmax needs no sums across lanes, keys and values are read as they lie, and GQA
// fills vectors even for one position. Scores are in units of ln 2, so that weights are powers of two.
#ifndef PEFTKERN_CPU_ATTENTION_H_
#define PEFTKERN_CPU_ATTENTION_H_

#include <cmath>
#include <cstring>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "gemm.h"
#include "philox.h"
#include "plan.h"

namespace peftkern {
namespace PEFTKERN_ISA {

enum Part { kSequence = 0, kPrefix = 1 };  // the numbers that dropout counts them by

// Hands out aligned pieces of scratch memory; with a null base it counts what is needed.
struct Arena {
  char* base;
  size_t used;

  template <typename T>
  T* take(int64_t count) {
    T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
    const size_t end = used + (size_t)count * sizeof(T);
    used = (size_t)round_up((int64_t)end, 64);
#if defined(__SANITIZE_ADDRESS__)
    used += 64;  // a gap that nobody may touch
    if (base) {
      ASAN_UNPOISON_MEMORY_REGION(piece, end - (size_t)(reinterpret_cast<char*>(piece) - base));
      ASAN_POISON_MEMORY_REGION(base + end, used - end);
    }
#endif
    return piece;
  }
};

// Query rows that share a kv head, and a sequence unless only the prefix is looked at. Lanes beyond `count` repeat the
// last row.
struct Block {
  int64_t count, vectors;
  int64_t sample[kBlockM], head[kBlockM], row[kBlockM];  // of q
  int32_t low[kBlockM], high[kBlockM];                // visible sequence keys: low <= t < high
  int32_t prefix_low[kBlockM];                        // visible prefix keys: prefix_low <= p < prefix_len
  int32_t low_min, low_max, high_min, high_max, prefix_low_min, prefix_low_max;
};

// Keys and values of a tile, rows `stride` elements apart: floats, or pairs of bf16 (k: of neighbours along the head's
// dimension; v: of neighbouring keys).
template <typename T>
struct TileOf {
  const T *k, *v;
  int64_t k_stride, v_stride;
};
typedef TileOf<float> Tile;
typedef TileOf<uint32_t> PairTile;

struct RowRange {
  int64_t begin, end;
};

// The part of a call that does not change between tasks.
struct Problem {
  const peftkern_attention* args;
  const Plan* plan;
  int64_t head_dim, padded_dim;
  float log2_scale;  // score in units of ln 2 = log2_scale * product, where scores are plain
  bool plain_seq, plain_prefix;
  bool in_place;       // keys and values are floats that can be read where they lie, once
  bool always_in_place;  // and again and again: rows that lie far apart share few cache sets
  bool pairs;         // products of bf16 pairs (forward)
  bool pairs_in_place_k;
  const float *prefix_k, *prefix_v;  // packed [bank, num_kv_heads, prefix_len, padded_dim], or half as much of pairs

  bool is_plain(Part part) const { return part == kPrefix ? plain_prefix : plain_seq; }
};

static Problem make_problem(const peftkern_attention& args, const Plan& plan) {
  Problem p;
  p.args = &args;
  p.plan = &plan;
  p.head_dim = args.head_dim;
  p.padded_dim = round_up(args.head_dim, kLanes);
  p.log2_scale = (float)(args.scale * kLog2e);
  const bool plain = args.softcap == 0.0 && args.scale > 0.0;
  p.plain_seq = plain && !args.bias;
  p.plain_prefix = plain && !args.prefix_bias;
  p.in_place = args.dtype == PEFTKERN_FLOAT32 && p.padded_dim == p.head_dim;
  p.always_in_place = p.in_place && args.k_stride[2] == p.head_dim && args.v_stride[2] == p.head_dim;
  p.pairs = false;
  p.pairs_in_place_k = false;
  p.prefix_k = p.prefix_v = nullptr;
  return p;
}

#if PEFTKERN_HAS_PAIRS
// The forward may round weights to bf16, as every bf16 attention does. The backward may not: gradients are fp32.
static void use_pairs(Problem& p) {
  const peftkern_attention& a = *p.args;
  p.pairs = a.dtype == PEFTKERN_BFLOAT16 && a.head_dim % 2 == 0;
  const int64_t odd = a.k_stride[0] | a.k_stride[1] | a.k_stride[2];
  p.pairs_in_place_k = odd % 2 == 0 && reinterpret_cast<uintptr_t>(a.k) % 4 == 0;
}

// out[d] = (first[d], second[d]); second may be null (0).
static void interleave_rows(const void* first, const void* second, int64_t n, uint32_t* out) {
  for (int64_t d = 0; d < n; d += kLanes) {
    const int64_t lanes = least(kLanes, n - d);
    const vf low = load_lanes<PEFTKERN_BFLOAT16>(offset(first, PEFTKERN_BFLOAT16, d), lanes);
    const vf high = second ? load_lanes<PEFTKERN_BFLOAT16>(offset(second, PEFTKERN_BFLOAT16, d), lanes) : zero();
    const vu pairs = ((vu)low >> 16) | (vu)high;
    __builtin_memcpy(out + d, &pairs, sizeof pairs);
  }
}

// pairs[d / 2][r] = (panel[d][r], panel[d + 1][r]); the values are bf16 ones.
static void pair_panel(const Problem& p, const Block& block, const float* panel, uint32_t* pairs) {
  for (int64_t d = 0; d < p.head_dim; d += 2)
    for (int64_t r = 0; r < block.vectors * kLanes; r += kLanes) {
      const vu pair = ((vu)load(panel + d * kBlockM + r) >> 16) | (vu)load(panel + (d + 1) * kBlockM + r);
      __builtin_memcpy(pairs + d / 2 * kBlockM + r, &pair, sizeof pair);
    }
}

// pairs[j / 2][r] = weights of keys j and j + 1, rounded.
static void pair_weights(const float* weights, int64_t n, RowRange rows, uint32_t* pairs) {
  for (int64_t j = 0; j < n; j += 2)
    for (int64_t r = rows.begin; r < rows.end; r += kLanes) {
      const vf second = j + 1 < n ? load(weights + (j + 1) * kBlockM + r) : zero();
      const vu pair = bf16_pairs(load(weights + j * kBlockM + r), second);
      __builtin_memcpy(pairs + j / 2 * kBlockM + r, &pair, sizeof pair);
    }
}
#endif

static int64_t num_position_blocks(const Plan& plan, const Sequence& s) {
  return (s.q_len + plan.positions_per_block - 1) / plan.positions_per_block;
}

static void start_block(Block& block, int64_t count) {
  block.count = count;
  block.vectors = round_up(count, kLanes) / kLanes;
  block.low_min = block.high_min = block.prefix_low_min = INT32_MAX;
  block.low_max = block.high_max = block.prefix_low_max = 0;
}

// Lane r is query `position` of sequence s and of `head`.
static void set_row(const Problem& p, const Sequence& s, int64_t position, int64_t head, int64_t r, Block& block) {
  const peftkern_attention& a = *p.args;
  const int64_t key_position = position + s.kv_len - s.q_len;
  block.sample[r] = s.batch;
  block.head[r] = head;
  block.row[r] = s.start + position;
  const int64_t high = a.causal ? most(0, least(s.kv_len, key_position + 1)) : s.kv_len;
  const int64_t low = a.window ? least(s.kv_len, most(0, key_position - a.window + 1)) : 0;
  const bool window_on_prefix = a.window && a.prefix_in_window;
  const int64_t prefix_low =
      window_on_prefix ? least(s.prefix_len, most(0, s.prefix_len + key_position - a.window + 1)) : 0;
  block.high[r] = (int32_t)high;
  block.low[r] = (int32_t)low;
  block.prefix_low[r] = (int32_t)prefix_low;
  block.low_min = (int32_t)least(block.low_min, low);
  block.low_max = (int32_t)most(block.low_max, low);
  block.high_min = (int32_t)least(block.high_min, high);
  block.high_max = (int32_t)most(block.high_max, high);
  block.prefix_low_min = (int32_t)least(block.prefix_low_min, prefix_low);
  block.prefix_low_max = (int32_t)most(block.prefix_low_max, prefix_low);
}

static void copy_row(Block& block, int64_t from, int64_t to, int64_t head) {
  block.sample[to] = block.sample[from];
  block.head[to] = head;
  block.row[to] = block.row[from];
  block.low[to] = block.low[from];
  block.high[to] = block.high[from];
  block.prefix_low[to] = block.prefix_low[from];
}

// Row r is (position r / heads, head r % heads) of the block.
static void make_block(const Problem& p, const Sequence& s, int64_t kv_head, int64_t position_block, int64_t first_head,
                       Block& block) {
  const Plan& plan = *p.plan;
  const int64_t heads = least(plan.heads_per_block, plan.group_size - first_head);
  const int64_t first = position_block * plan.positions_per_block;
  start_block(block, least(plan.positions_per_block, s.q_len - first) * heads);
  const int64_t head = kv_head * plan.group_size + first_head;
  for (int64_t r = 0; r < block.count; r += heads) {
    set_row(p, s, first + r / heads, head, r, block);
    for (int64_t h = 1; h < heads; h++) copy_row(block, r, r + h, head + h);
  }
  for (int64_t r = block.count; r < block.vectors * kLanes; r++) copy_row(block, r - 1, r, block.head[r - 1]);
}

// Asks for the rows of a block that will be worked on next.
static void prefetch_rows(const Problem& p, const Sequence& s, int64_t kv_head, int64_t position_block, const void* data,
                          const int64_t* stride) {
  const Plan& plan = *p.plan;
  const int64_t dtype = p.args->dtype, line = dtype == PEFTKERN_FLOAT32 ? 16 : 32;
  const int64_t first = position_block * plan.positions_per_block;
  const int64_t base = s.batch * stride[0] + kv_head * plan.group_size * stride[1] + s.start * stride[2];
  for (int64_t i = first; i < least(first + plan.positions_per_block, s.q_len); i++)
    for (int64_t h = 0; h < plan.heads_per_block; h++)
      for (int64_t d = 0; d < p.head_dim; d += line)
        __builtin_prefetch(offset(data, dtype, base + h * stride[1] + i * stride[2] + d));
}

// Tiles of a part that some row of the block sees: keys [begin, end) on a grid of kBlockN.
struct TileRange {
  int64_t begin, end;
};
static TileRange tiles_of(const Sequence& s, const Block& block, Part part) {
  const int64_t low = part == kPrefix ? block.prefix_low_min : block.low_min;
  const int64_t end = part == kPrefix ? s.prefix_len : block.high_max;
  return {low / kBlockN * kBlockN, most(end, low / kBlockN * kBlockN)};
}

// Rows of a block that see something of the tile [begin, begin + n), in whole vectors: what a causal diagonal or a window
// hides is at the ends, as rows are in the order of their positions.
static RowRange rows_of(const Block& block, Part part, int64_t begin, int64_t n) {
  RowRange rows{0, block.vectors * kLanes};
  const int32_t* low = part == kPrefix ? block.prefix_low : block.low;
  while (rows.end > kLanes && low[rows.end - kLanes] >= begin + n) rows.end -= kLanes;
  if (part == kSequence)
    while (rows.begin + kLanes < rows.end && block.high[rows.begin + kLanes - 1] <= begin) rows.begin += kLanes;
  return rows;
}

static int64_t num_tiles(TileRange range) { return (range.end - range.begin + kBlockN - 1) / kBlockN; }

// Row r of the block: rows[r][padded_dim], floats.
static void gather_rows(const Problem& p, const Block& block, const void* data, const int64_t* stride, float* rows) {
  const int64_t dtype = p.args->dtype;
  for (int64_t r = 0; r < block.count; r++) {
    const int64_t at = block.sample[r] * stride[0] + block.head[r] * stride[1] + block.row[r] * stride[2];
    widen_row(offset(data, dtype, at), dtype, p.head_dim, rows + r * p.padded_dim);
  }
  memset(rows + block.count * p.padded_dim, 0, sizeof(float) * (block.vectors * kLanes - block.count) * p.padded_dim);
}

// panel[d][r] = rows[r][d]
static void transpose_rows(const Problem& p, const Block& block, const float* rows, float* panel) {
  for (int64_t r = 0; r < block.vectors * kLanes; r += kLanes)
    for (int64_t d = 0; d < p.padded_dim; d += kLanes) {
      vf square[kLanes];
      for (int i = 0; i < kLanes; i++) square[i] = load(rows + (r + i) * p.padded_dim + d);
      transpose(square);
      for (int i = 0; i < kLanes; i++) store(panel + (d + i) * kBlockM + r, square[i]);
    }
}

// Widened keys and values of the sequence at hand; a tile is widened when it is first asked for.
struct SequenceTiles {
  float *k, *v;
  uint8_t* ready;
  const Sequence* sequence;
  int64_t kv_head;
  bool keep;  // every tile has its own place; else all share one

  void open(const Sequence& s, int64_t head, bool keep_tiles) {
    if (sequence == &s && kv_head == head && keep && keep_tiles) return;
    sequence = &s;
    kv_head = head;
    keep = keep_tiles;
    if (keep) memset(ready, 0, (s.kv_len + kBlockN - 1) / kBlockN);
  }

  // The next tile's rows lie far apart, where processors do not look for them.
  void prefetch(const Problem& p, int64_t base_k, int64_t base_v, int64_t begin) const {
    const peftkern_attention& a = *p.args;
    const int64_t end = least(sequence->kv_len, begin + kBlockN), line = a.dtype == PEFTKERN_FLOAT32 ? 16 : 32;
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
    const int64_t first = sequence->start + begin, dim = p.padded_dim;
    if (p.always_in_place || (p.in_place && !keep)) {
      if (!keep) prefetch(p, base_k, base_v, begin + n);
      return {static_cast<const float*>(a.k) + base_k + first * a.k_stride[2],
              static_cast<const float*>(a.v) + base_v + first * a.v_stride[2], a.k_stride[2], a.v_stride[2]};
    }
    float* k_tile = k + (keep ? begin : 0) * dim;
    float* v_tile = v + (keep ? begin : 0) * dim;
    if (!keep || !ready[begin / kBlockN]) {
      for (int64_t j = 0; j < n; j++) {
        widen_row(offset(a.k, a.dtype, base_k + (first + j) * a.k_stride[2]), a.dtype, p.head_dim, k_tile + j * dim);
        widen_row(offset(a.v, a.dtype, base_v + (first + j) * a.v_stride[2]), a.dtype, p.head_dim, v_tile + j * dim);
      }
      if (keep) ready[begin / kBlockN] = 1;
      prefetch(p, base_k, base_v, begin + n);
    }
    return {k_tile, v_tile, dim, dim};
  }
};

#if PEFTKERN_HAS_PAIRS
// As SequenceTiles::get, of pairs.
static PairTile get_pairs(const Problem& p, SequenceTiles& tiles, int64_t begin, int64_t n) {
  const peftkern_attention& a = *p.args;
  const Sequence& s = *tiles.sequence;
  const int64_t base_k = s.batch * a.k_stride[0] + tiles.kv_head * a.k_stride[1];
  const int64_t base_v = s.batch * a.v_stride[0] + tiles.kv_head * a.v_stride[1];
  const int64_t first = s.start + begin, dim = p.padded_dim;
  const auto k_row = [&](int64_t j) { return offset(a.k, a.dtype, base_k + (first + j) * a.k_stride[2]); };
  const auto v_row = [&](int64_t j) { return offset(a.v, a.dtype, base_v + (first + j) * a.v_stride[2]); };
  uint32_t* k_tile = reinterpret_cast<uint32_t*>(tiles.k) + (tiles.keep ? begin : 0) * dim / 2;
  uint32_t* v_tile = reinterpret_cast<uint32_t*>(tiles.v) + (tiles.keep ? begin : 0) / 2 * dim;
  if (!tiles.keep || !tiles.ready[begin / kBlockN]) {
    for (int64_t j = 0; j < n && !p.pairs_in_place_k; j++) memcpy(k_tile + j * dim / 2, k_row(j), 2 * p.head_dim);
    for (int64_t j = 0; j < n; j += 2)
      interleave_rows(v_row(j), j + 1 < n ? v_row(j + 1) : nullptr, p.head_dim, v_tile + j / 2 * dim);
    if (tiles.keep) tiles.ready[begin / kBlockN] = 1;
    tiles.prefetch(p, base_k, base_v, begin + n);
  }
  if (p.pairs_in_place_k) return {reinterpret_cast<const uint32_t*>(k_row(0)), v_tile, a.k_stride[2] / 2, dim};
  return {k_tile, v_tile, dim / 2, dim};
}

static PairTile prefix_pairs(const Problem& p, const Sequence& s, int64_t kv_head, int64_t begin) {
  const peftkern_attention& a = *p.args;
  const int64_t at = (s.prefix * a.num_kv_heads + kv_head) * a.prefix_len * p.padded_dim;
  return {reinterpret_cast<const uint32_t*>(p.prefix_k + at) + begin * p.padded_dim / 2,
          reinterpret_cast<const uint32_t*>(p.prefix_v + at) + begin / 2 * p.padded_dim, p.padded_dim / 2, p.padded_dim};
}

// Rows of floats, in place, to pairs: of neighbours along the head's dimension (k), of neighbouring keys (v).
static void pair_rows(const Problem& p, int64_t n, float* k, float* v) {
  const int64_t dim = p.padded_dim;
  uint16_t* k_out = reinterpret_cast<uint16_t*>(k);
  uint32_t* v_out = reinterpret_cast<uint32_t*>(v);
  for (int64_t i = 0; i < n * dim; i += kLanes) {
    const vh x = to_bf16(load(k + i));
    __builtin_memcpy(k_out + i, &x, sizeof x);
  }
  for (int64_t j = 0; j < n; j += 2)
    for (int64_t d = 0; d < dim; d += kLanes) {
      const vu x = bf16_pairs(load(v + j * dim + d), j + 1 < n ? load(v + (j + 1) * dim + d) : zero());
      __builtin_memcpy(v_out + j / 2 * dim + d, &x, sizeof x);
    }
}
#endif

static Tile prefix_tile(const Problem& p, const Sequence& s, int64_t kv_head, int64_t begin) {
  const peftkern_attention& a = *p.args;
  const int64_t at = ((s.prefix * a.num_kv_heads + kv_head) * a.prefix_len + begin) * p.padded_dim;
  return {p.prefix_k + at, p.prefix_v + at, p.padded_dim, p.padded_dim};
}

// Tokens begin, ..., begin + n - 1 of one head of one prefix: widened, rounded to q's dtype.
static void widen_prefix(const Problem& p, int64_t prefix, int64_t kv_head, int64_t begin, int64_t n, float* out_k,
                         float* out_v) {
  const peftkern_attention& a = *p.args;
  for (int64_t j = begin; j < begin + n; j++) {
    float* k = out_k + (j - begin) * p.padded_dim;
    float* v = out_v + (j - begin) * p.padded_dim;
    const int64_t k_at = prefix * a.prefix_k_stride[0] + kv_head * a.prefix_k_stride[1] + j * a.prefix_k_stride[2];
    const int64_t v_at = prefix * a.prefix_v_stride[0] + kv_head * a.prefix_v_stride[1] + j * a.prefix_v_stride[2];
    widen_row(offset(a.prefix_k, a.prefix_dtype, k_at), a.prefix_dtype, p.head_dim, k);
    widen_row(offset(a.prefix_v, a.prefix_dtype, v_at), a.prefix_dtype, p.head_dim, v);
    if (a.prefix_dtype != a.dtype) {
      round_row(k, p.padded_dim, a.dtype);
      round_row(v, p.padded_dim, a.dtype);
    }
  }
}

// From products to scores in units of ln 2, hidden ones -inf: scores[n][kBlockM] of keys begin, begin + 1, ... Returns the
// factor that is still to be applied. Where `slope` is given and a softcap is on, it receives the softcap's derivative.
static float finish_scores(const Problem& p, const Sequence& s, const Block& block, Part part, int64_t begin, int64_t n,
                           RowRange rows, float* scores, float* slope) {
  const peftkern_attention& a = *p.args;
  float factor = p.log2_scale;
  if (!p.is_plain(part)) {
    factor = 1.0f;
    const bool capped = a.softcap != 0.0;
    const float scale = (float)(capped ? a.scale / a.softcap : a.scale * kLog2e);
    const float cap = (float)(a.softcap * kLog2e);
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
    if (part == kPrefix && a.prefix_bias)
      for (int64_t r = rows.begin; r < least(rows.end, block.count); r++)
        for (int64_t j = 0; j < n; j++)
          scores[j * kBlockM + r] += (float)kLog2e * a.prefix_bias[block.head[r] * a.prefix_bias_stride[0] +
                                                                   (begin + j) * a.prefix_bias_stride[1]];
    if (part == kSequence && a.bias)
      for (int64_t r = rows.begin; r < least(rows.end, block.count); r++) {
        const int64_t at = s.batch * a.bias_stride[0] + block.head[r] * a.bias_stride[1] +
                           block.row[r] * a.bias_stride[2] + (s.start + begin) * a.bias_stride[3];
        for (int64_t j = 0; j < n; j++)
          scores[j * kBlockM + r] += (float)kLog2e * load_scalar(a.bias, a.bias_dtype, at + j * a.bias_stride[3]);
      }
  }
  const int32_t *low = block.low, *high = block.high;
  bool ragged = begin < block.low_max || begin + n > block.high_min;
  if (part == kPrefix) {
    low = block.prefix_low;
    high = nullptr;
    ragged = begin < block.prefix_low_max;
  }
  if (ragged)
    for (int64_t r = rows.begin; r < rows.end; r += kLanes) {
      const vi from = load_as<vi>(low + r), to = high ? load_as<vi>(high + r) : seti(INT32_MAX);
      for (int64_t j = 0; j < n; j++) {
        const vi t = seti((int32_t)(begin + j));
        store(scores + j * kBlockM + r, select((t >= from) & (t < to), load(scores + j * kBlockM + r), set1(-kInf)));
      }
    }
  if (part == kSequence && a.key_mask) {
    const uint8_t* mask = a.key_mask + s.batch * a.key_mask_stride[0] + (s.start + begin) * a.key_mask_stride[1];
    for (int64_t j = 0; j < n; j++)
      if (!mask[j * a.key_mask_stride[1]])
        for (int64_t r = rows.begin; r < rows.end; r += kLanes) store(scores + j * kBlockM + r, set1(-kInf));
  }
  return factor;
}

// factors[n][kBlockM] = keep ? 1 / (1 - p) : 0 of keys begin, begin + 1, ... (counted in the sample, as reference.py does)
static void dropout_factors(const Problem& p, const Sequence& s, const Block& block, Part part, int64_t begin, int64_t n,
                            RowRange rows, float* factors) {
  const peftkern_attention& a = *p.args;
  const uint32_t key[2] = {(uint32_t)(uint64_t)a.dropout_seed, (uint32_t)((uint64_t)a.dropout_seed >> 32)};
  const uint32_t threshold = (uint32_t)(uint64_t)(a.dropout_p * 4294967296.0);
  const float kept = (float)(1.0 / (1.0 - a.dropout_p));
  const int64_t first = begin + (part == kSequence ? s.start : 0);
  for (int64_t r = rows.begin; r < rows.end; r += kLanes) {
    uint32_t c0[kLanes], c1[kLanes], c2[kLanes], words[4][kLanes];
    for (int i = 0; i < kLanes; i++) {
      c1[i] = (uint32_t)block.row[r + i];
      c2[i] = (uint32_t)(s.batch * a.num_heads + block.head[r + i]);
    }
    for (int64_t j = 0; j < n; j++) {
      if (j == 0 || (first + j) % 4 == 0) {
        for (int i = 0; i < kLanes; i++) c0[i] = (uint32_t)((first + j) / 4);
        philox4x32<kLanes>(c0, c1, c2, (uint32_t)part, key, words);
      }
      for (int i = 0; i < kLanes; i++)
        factors[j * kBlockM + r + i] = words[(first + j) % 4][i] >= threshold ? kept : 0.0f;
    }
  }
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif  // PEFTKERN_CPU_ATTENTION_H_
