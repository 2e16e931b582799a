// SPDX-License-Identifier: Apache-2.0
// Shared by forward and backward: blocks of query rows, tiles of keys, and the computation of scores from products.
//
// A block has up to kBlockM rows: positions x heads that read the same kv head. Scores are stored transposed,
// [key][row], so the lanes of a vector are rows. A softmax then needs no sums across lanes, keys and values are read in
// their own memory order, and GQA fills vectors even for a single position. Scores are in units of ln 2, so weights are
// powers of two.
#ifndef PEFTKERN_CPU_ATTENTION_H_
#define PEFTKERN_CPU_ATTENTION_H_

#include <cmath>
#include <cstring>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "amx.h"
#include "gemm.h"
#include "philox.h"
#include "plan.h"

namespace peftkern {
namespace PEFTKERN_ISA {

enum Part { kSequence = 0, kPrefix = 1 };  // dropout uses these numbers in its counters

// Allocates aligned pieces of scratch memory. With a null base, it only counts the bytes.
struct Arena {
  char* base;
  size_t used;

  template <typename T>
  T* take(int64_t count) {
    T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
    const size_t end = used + (size_t)count * sizeof(T);
    used = (size_t)round_up((int64_t)end, 64);
#if defined(__SANITIZE_ADDRESS__)
    used += 64;  // a gap that must not be accessed
    if (base) {
      ASAN_UNPOISON_MEMORY_REGION(piece, end - (size_t)(reinterpret_cast<char*>(piece) - base));
      ASAN_POISON_MEMORY_REGION(base + end, used - end);
    }
#endif
    return piece;
  }
};

// Query rows that share a kv head and, unless only the prefix is read, a sequence. Lanes beyond `count` repeat the last
// row.
struct Block {
  int64_t count, vectors;
  int64_t step;                                          // rows that are processed together, a multiple of kLanes
  int64_t sample[kBlockM], head[kBlockM], row[kBlockM];  // indices into q
  int32_t low[kBlockM], high[kBlockM];                   // visible sequence keys: low <= t < high
  int32_t prefix_low[kBlockM];                           // visible prefix keys: prefix_low <= p < prefix_len
  int32_t low_min, low_max, high_min, high_max, prefix_low_min, prefix_low_max;
};

// The head dimension of the keys or of the values, and the number of elements to which rows are padded with zeros.
struct HeadDim {
  int64_t size, padded;
};

// Rows that are `stride` elements apart. Elements are floats or, with Problem::pairs, words that hold two bf16 numbers.
struct Rows {
  const float* data;
  int64_t stride;
  HeadDim dim;
};

// The keys and values of a tile. In k and v, a pair holds neighbours along the head dimension; in `by_key`, it holds
// neighbouring keys. Sums over keys multiply `by_key`: v in the forward, k in the backward. For AMX, `by_key` is
// transposed, [dim][pairs].
struct Tile {
  Rows k, v, by_key;
};

PEFTKERN_INLINE const uint32_t* words(const float* data) { return reinterpret_cast<const uint32_t*>(data); }
PEFTKERN_INLINE uint32_t* words(float* data) { return reinterpret_cast<uint32_t*>(data); }

struct RowRange {
  int64_t begin, end;
};

// The properties of a call that all its tasks share.
struct Problem {
  const peftkern_attention* args;
  const Plan* plan;
  HeadDim k_dim, v_dim;  // of q and k; of v and out
  float log2_scale;      // plain scores, in units of ln 2, are log2_scale * product
  bool plain_seq, plain_prefix;
  bool in_place;         // keys and values are floats that can be read in place if they are read once
  bool always_in_place;  // the same if they are read repeatedly: rows far apart share too few cache sets
  bool backward;
  bool pairs;  // multiply pairs of bf16
  bool k_pairs_in_place, v_pairs_in_place;
  bool amx;               // multiply pairs in AMX tiles; sums over keys are then stored as [dim][row]
  int64_t row_step;       // Block::step
  int64_t diagonal_keys;  // keys that are processed together on the causal diagonal
  // Packed [bank, num_kv_heads, packed_len, k_dim.padded or v_dim.padded]. With pairs, the rows of a head fill half of
  // its memory, and `by_key` follows the rows that it is made of.
  const float *prefix_k, *prefix_v;
  int64_t packed_len;

  bool is_plain(Part part) const { return part == kPrefix ? plain_prefix : plain_seq; }
  // That of the rows which sums over keys multiply: v in the forward, k in the backward.
  HeadDim by_key_dim() const { return backward ? k_dim : v_dim; }
};

static Problem make_problem(const peftkern_attention& args, const Plan& plan, bool backward) {
  Problem p;
  p.args = &args;
  p.plan = &plan;
  p.k_dim = {args.head_dim, round_up(args.head_dim, kLanes)};
  p.v_dim = {args.value_dim, round_up(args.value_dim, kLanes)};
  p.log2_scale = (float)(args.scale * kLog2e);
  const bool plain = args.softcap == 0.0 && args.scale > 0.0;
  p.plain_seq = plain && !args.bias;
  p.plain_prefix = plain && !args.prefix_bias;
  p.in_place = args.dtype == PEFTKERN_FLOAT32 && p.k_dim.padded == p.k_dim.size && p.v_dim.padded == p.v_dim.size;
  p.always_in_place = p.in_place && args.k_stride[2] == p.k_dim.size && args.v_stride[2] == p.v_dim.size;
  p.backward = backward;
  p.pairs = p.k_pairs_in_place = p.v_pairs_in_place = false;
  p.prefix_k = p.prefix_v = nullptr;
  p.packed_len = round_up(args.prefix_len, 2);
  p.amx = false;
  p.row_step = kLanes;
  p.diagonal_keys = kDiagonalKeys;
  return p;
}

#if PEFTKERN_HAS_PAIRS
// Products of bf16 inputs are exact. Weights and gradients of scores are rounded to bf16 before they are multiplied, as
// in every bf16 attention. The prefix's gradients are fp32 and are never computed this way.
static void use_pairs(Problem& p) {
  const peftkern_attention& a = *p.args;
  const auto in_place = [](const void* data, const int64_t* stride) {
    return (stride[0] | stride[1] | stride[2]) % 2 == 0 && reinterpret_cast<uintptr_t>(data) % 4 == 0;
  };
  p.pairs = a.dtype == PEFTKERN_BFLOAT16 && a.head_dim % 2 == 0 && a.value_dim % 2 == 0;
  p.k_pairs_in_place = in_place(a.k, a.k_stride);
  p.v_pairs_in_place = in_place(a.v, a.v_stride);
#if PEFTKERN_HAS_AMX
  if (!p.pairs) return;
  p.amx = true;
  p.k_pairs_in_place = p.v_pairs_in_place = false;  // tiles are read whole
  p.k_dim.padded = round_up(a.head_dim, kTileStep);
  p.v_dim.padded = round_up(a.value_dim, kTileStep);
  p.packed_len = round_up(a.prefix_len, kBlockN);
  p.row_step = p.diagonal_keys = kTileStep;
#endif
}

// out[d] = (first[d], second[d]) for bf16 rows, padded with zeros to whole vectors. A null `second` stands for zeros.
PEFTKERN_INLINE void interleave_rows(const void* first, const void* second, int64_t n, uint32_t* out) {
  const __m512i order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i sixteen = _mm512_set1_epi16(16);
  for (int64_t d = 0; d < n; d += 2 * kLanes) {
    const __mmask32 valid = n - d >= 32 ? ~0u : (1u << (n - d)) - 1;
    const uint16_t *low = static_cast<const uint16_t*>(first) + d, *high = static_cast<const uint16_t*>(second) + d;
    const __m512i a = _mm512_maskz_loadu_epi16(valid, low);
    const __m512i b = second ? _mm512_maskz_loadu_epi16(valid, high) : _mm512_setzero_si512();
    _mm512_storeu_si512(out + d, _mm512_permutex2var_epi16(a, order, b));
    if (n - d > kLanes)
      _mm512_storeu_si512(out + d + kLanes, _mm512_permutex2var_epi16(a, _mm512_add_epi16(order, sixteen), b));
  }
}
#endif

#if PEFTKERN_HAS_AMX
// out[d][i] = (rows[2 i][d], rows[2 i + 1][d]) for n <= kTileStep bf16 rows, with zeros beyond n and dim.size.
template <typename Row>
static void transpose_pairs(HeadDim dim, int64_t n, const Row& row, uint32_t* out, int64_t stride) {
  alignas(64) uint32_t pairs[kLanes * kMaxHeadDim];
  memset(pairs, 0, sizeof(uint32_t) * kLanes * dim.padded);
  for (int64_t j = 0; j < n; j += 2)
    interleave_rows(row(j), j + 1 < n ? row(j + 1) : nullptr, dim.size, pairs + j / 2 * dim.padded);
  for (int64_t d = 0; d < dim.padded; d += kLanes) {
    vf square[kLanes];
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLanes; i++) square[i] = load_as<vf>(pairs + i * dim.padded + d);
    transpose(square);
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLanes; i++) __builtin_memcpy(out + (d + i) * stride, &square[i], sizeof square[i]);
  }
}
#endif

static int64_t num_position_blocks(const Plan& plan, const Sequence& s) {
  return (s.q_len + plan.positions_per_block - 1) / plan.positions_per_block;
}

static void start_block(Block& block, int64_t count, int64_t step) {
  block.count = count;
  block.vectors = round_up(count, step) / kLanes;
  block.step = step;
}

// Computes the bounds over all rows. Call it after all rows are set.
static void finish_block(Block& block) {
  block.low_min = block.high_min = block.prefix_low_min = INT32_MAX;
  block.low_max = block.high_max = block.prefix_low_max = 0;
  for (int64_t r = 0; r < block.vectors * kLanes; r++) {
    block.low_min = block.low[r] < block.low_min ? block.low[r] : block.low_min;
    block.low_max = block.low[r] > block.low_max ? block.low[r] : block.low_max;
    block.high_min = block.high[r] < block.high_min ? block.high[r] : block.high_min;
    block.high_max = block.high[r] > block.high_max ? block.high[r] : block.high_max;
    block.prefix_low_min = block.prefix_low[r] < block.prefix_low_min ? block.prefix_low[r] : block.prefix_low_min;
    block.prefix_low_max = block.prefix_low[r] > block.prefix_low_max ? block.prefix_low[r] : block.prefix_low_max;
  }
}

// Makes lane r the query at `position` of sequence s and `head`.
static void set_row(const Problem& p, const Sequence& s, int64_t position, int64_t head, int64_t r, Block& block) {
  const peftkern_attention& a = *p.args;
  const int64_t key_position = position + s.kv_len - s.q_len;
  block.sample[r] = s.batch;
  block.head[r] = head;
  block.row[r] = s.start + position;
  const int64_t high = a.causal ? max(0, min(s.kv_len, key_position + 1)) : s.kv_len;
  const int64_t low = a.window ? min(s.kv_len, max(0, key_position - a.window + 1)) : 0;
  const bool window_on_prefix = a.window && a.prefix_in_window;
  const int64_t prefix_low =
      window_on_prefix ? min(s.prefix_len, max(0, s.prefix_len + key_position - a.window + 1)) : 0;
  block.high[r] = (int32_t)high;
  block.low[r] = (int32_t)low;
  block.prefix_low[r] = (int32_t)prefix_low;
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
  const int64_t heads = min(plan.heads_per_block, plan.group_size - first_head);
  const int64_t first = position_block * plan.positions_per_block;
  start_block(block, min(plan.positions_per_block, s.q_len - first) * heads, p.row_step);
  const int64_t head = kv_head * plan.group_size + first_head;
  for (int64_t r = 0; r < block.count; r += heads) {
    set_row(p, s, first + r / heads, head, r, block);
    for (int64_t h = 1; h < heads; h++) copy_row(block, r, r + h, head + h);
  }
  for (int64_t r = block.count; r < block.vectors * kLanes; r++) copy_row(block, r - 1, r, block.head[r - 1]);
  finish_block(block);
}

// Prefetches the rows of the block that comes next.
static void prefetch_rows(const Problem& p, const Sequence& s, int64_t kv_head, int64_t position_block,
                          const void* data, const int64_t* stride, HeadDim dim) {
  const Plan& plan = *p.plan;
  const int64_t dtype = p.args->dtype, line = dtype == PEFTKERN_FLOAT32 ? 16 : 32;
  const int64_t first = position_block * plan.positions_per_block;
  const int64_t base = s.batch * stride[0] + kv_head * plan.group_size * stride[1] + s.start * stride[2];
  for (int64_t i = first; i < min(first + plan.positions_per_block, s.q_len); i++)
    for (int64_t h = 0; h < plan.heads_per_block; h++)
      for (int64_t d = 0; d < dim.size; d += line)
        __builtin_prefetch(offset(data, dtype, base + h * stride[1] + i * stride[2] + d));
}

// The tiles of a part that any row of the block sees: keys [begin, end), begin a multiple of kBlockN.
struct TileRange {
  int64_t begin, end;
};
static TileRange tiles_of(const Sequence& s, const Block& block, Part part) {
  const int64_t low = part == kPrefix ? block.prefix_low_min : block.low_min;
  const int64_t end = part == kPrefix ? s.prefix_len : block.high_max;
  return {low / kBlockN * kBlockN, max(end, low / kBlockN * kBlockN)};
}

// The rows of a block that see any key of the tile [begin, begin + n), in whole steps. Rows are ordered by position, so
// a causal diagonal or a window hides the tile from the first or last rows.
static RowRange rows_of(const Block& block, Part part, int64_t begin, int64_t n) {
  RowRange rows{0, block.vectors * kLanes};
  const int32_t* low = part == kPrefix ? block.prefix_low : block.low;
  while (rows.end > block.step && low[rows.end - block.step] >= begin + n) rows.end -= block.step;
  if (part == kSequence)
    while (rows.begin + block.step < rows.end && block.high[rows.begin + block.step - 1] <= begin)
      rows.begin += block.step;
  return rows;
}

static int64_t num_tiles(TileRange range) { return (range.end - range.begin + kBlockN - 1) / kBlockN; }

// Turns products into scores[n][kBlockM] of keys begin, begin + 1, ..., in units of ln 2, with -inf where a key is
// hidden. Returns the factor that the scores must still be multiplied by. `slope`, unless null, receives the derivative
// of the softcap if there is one.
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
      for (int64_t r = rows.begin; r < min(rows.end, block.count); r++)
        for (int64_t j = 0; j < n; j++)
          scores[j * kBlockM + r] +=
              (float)kLog2e *
              a.prefix_bias[block.head[r] * a.prefix_bias_stride[0] + (begin + j) * a.prefix_bias_stride[1]];
    if (part == kSequence && a.bias)
      for (int64_t r = rows.begin; r < min(rows.end, block.count); r++) {
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

// factors[n][kBlockM] = keep ? 1 / (1 - p) : 0 for keys begin, begin + 1, ... Dropout's counters count keys within the
// sample, as reference.py does.
static void dropout_factors(const Problem& p, const Sequence& s, const Block& block, Part part, int64_t begin,
                            int64_t n, RowRange rows, float* factors) {
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
