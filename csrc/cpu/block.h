// SPDX-License-Identifier: Apache-2.0
// Blocks of query rows, and which keys they see.
#ifndef PEFTKERN_CPU_BLOCK_H_
#define PEFTKERN_CPU_BLOCK_H_

#include <cstring>

#include "problem.h"

namespace peftkern {
namespace PEFTKERN_ISA {

// Query rows that share a kv head and, unless only the prefix is read, a sequence. Lanes beyond `count` repeat the last
// row.
struct Block {
  int64_t count, vectors;
  int64_t step;                                          // rows that are processed together: L::kRowStep
  int64_t sample[kBlockM], head[kBlockM], row[kBlockM];  // indices into q
  int32_t low[kBlockM], high[kBlockM];                   // visible sequence keys: low <= t < high
  int32_t prefix_low[kBlockM];                           // visible prefix keys: prefix_low <= p < prefix_len
  int32_t low_min, low_max, high_min, high_max, prefix_low_min, prefix_low_max;
};

static int64_t num_position_blocks(const Plan& plan, const Sequence& s) {
  return (s.q_len + plan.positions_per_block - 1) / plan.positions_per_block;
}

// Starts a block of `count` rows. Call finish_block() after all rows are set.
static void start_block(Block& block, int64_t count) {
  block.count = count;
  block.vectors = round_up(count, block.step) / kLanes;
}

// Computes the bounds over all rows.
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
static void set_row(const Call& p, const Sequence& s, int64_t position, int64_t head, int64_t r, Block& block) {
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
static void make_block(const Call& p, const Target& target, int64_t position_block, int64_t first_head, Block& block) {
  const Plan& plan = *p.plan;
  const int64_t heads = min(plan.heads_per_block, plan.group_size - first_head);
  const int64_t first = position_block * plan.positions_per_block;
  start_block(block, min(plan.positions_per_block, target.seq.q_len - first) * heads);
  const int64_t head = target.kv_head * plan.group_size + first_head;
  for (int64_t r = 0; r < block.count; r += heads) {
    set_row(p, target.seq, first + r / heads, head, r, block);
    for (int64_t h = 1; h < heads; h++) copy_row(block, r, r + h, head + h);
  }
  for (int64_t r = block.count; r < block.vectors * kLanes; r++) copy_row(block, r - 1, r, block.head[r - 1]);
  finish_block(block);
}

// Prefetches the rows of the block that comes next.
static void prefetch_rows(const Call& p, const Target& target, int64_t position_block, const Tensor& x) {
  const Plan& plan = *p.plan;
  const Sequence& s = target.seq;
  const int64_t dtype = p.args->dtype, line = dtype == PEFTKERN_FLOAT32 ? 16 : 32;
  const int64_t first = position_block * plan.positions_per_block;
  const int64_t base = s.batch * x.stride[0] + target.kv_head * plan.group_size * x.stride[1] + s.start * x.stride[2];
  for (int64_t i = first; i < min(first + plan.positions_per_block, s.q_len); i++)
    for (int64_t h = 0; h < plan.heads_per_block; h++)
      for (int64_t d = 0; d < x.dim.size; d += line)
        __builtin_prefetch(offset(x.data, dtype, base + h * x.stride[1] + i * x.stride[2] + d));
}

PEFTKERN_INLINE const char* row_address(const Call& p, const Block& block, int64_t r, const Tensor& x) {
  return offset(x.data, p.args->dtype,
                block.sample[r] * x.stride[0] + block.head[r] * x.stride[1] + block.row[r] * x.stride[2]);
}

// Writes the block's rows as floats, rows[r][dim.padded].
static void gather_rows(const Call& p, const Block& block, const Tensor& x, float* rows) {
  const HeadDim dim = x.dim;
  for (int64_t r = 0; r < block.count; r++)
    widen_row(row_address(p, block, r, x), p.args->dtype, dim.size, rows + r * dim.padded);
  const int64_t widened = round_up(dim.size, kLanes);
  for (int64_t r = 0; r < block.count && widened < dim.padded; r++)
    memset(rows + r * dim.padded + widened, 0, sizeof(float) * (dim.padded - widened));
  // FAULT: rows-cleared-past-their-end
  memset(rows + block.count * dim.padded, 0, sizeof(float) * (block.vectors * kLanes - block.count) * dim.padded);
}

// The tiles of a part that any row of the block sees: keys [begin, end), begin a multiple of kBlockN.
struct TileRange {
  int64_t begin, end;

  int64_t tiles() const { return (end - begin + kBlockN - 1) / kBlockN; }
};

static TileRange tiles_of(const Sequence& s, const Block& block, Part part) {
  const int64_t low = part == kPrefix ? block.prefix_low_min : block.low_min;
  const int64_t end = part == kPrefix ? s.prefix_len : block.high_max;
  return {low / kBlockN * kBlockN, max(end, low / kBlockN * kBlockN)};
}

// n keys of a part from `begin` on, at most a tile, and the rows of a block that see any of them.
struct Span {
  Part part;
  int64_t begin, n;
  RowRange rows;
};

// The rows are whole steps. They are ordered by position, so a causal diagonal or a window hides the keys from the
// first or last rows.
static Span span_of(const Block& block, Part part, int64_t begin, int64_t n) {
  RowRange rows{0, block.vectors * kLanes};
  const int32_t* low = part == kPrefix ? block.prefix_low : block.low;
  while (rows.end > block.step && low[rows.end - block.step] >= begin + n) rows.end -= block.step;
  if (part == kSequence)
    while (rows.begin + block.step < rows.end && block.high[rows.begin + block.step - 1] <= begin)
      rows.begin += block.step;
  return {part, begin, n, rows};
}

// The part's tile from `begin` on.
static Span tile_span(const Block& block, Part part, TileRange range, int64_t begin) {
  return span_of(block, part, begin, min(kBlockN, range.end - begin));
}

// Whether the causal diagonal crosses a tile, so that some rows do not see its last keys.
static bool on_diagonal(const Block& block, const Span& span) {
  return span.part == kSequence && span.begin + span.n > block.high_min;
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif  // PEFTKERN_CPU_BLOCK_H_
