// SPDX-License-Identifier: Apache-2.0
// How a call is cut into tasks. Where sums depend on it, the plan depends on sizes and ids only, never on the number of
// threads.
//
// The plan is computed by code for the plainest processor; the kernels see plain arrays. Do not define inline functions
// here: a linker may keep the copy that was compiled for an instruction set that this processor lacks.
#ifndef PEFTKERN_CPU_PLAN_H_
#define PEFTKERN_CPU_PLAN_H_

#include <cstddef>
#include <cstdint>

#include "../peftkern.h"

namespace peftkern {

constexpr int kBlockM = 64;  // query rows of a block: positions x heads that share a kv head
constexpr int kBlockN = 96;  // keys of a tile
constexpr int64_t kMaxHeadDim = 256;

// One sample, or one packed sequence. Queries are rows [start, start + q_len) of sample `batch`; so are the keys.
struct Sequence {
  int64_t batch, start, q_len, kv_len;
  int64_t prefix, prefix_len;  // index in the bank, or -1 and 0
};

// Keys that one task of a decode reads, a multiple of kBlockN.
constexpr int64_t kDecodeKeys = 960;

// One of the splits of a sequence: its row blocks split, split + splits, split + 2 splits, ...
struct Unit {
  int32_t sequence, split, splits;
  int32_t partial;  // if splits > 1: the index of the partial sums of dk and dv
};

// Consecutive units that see the same prefix and add to the same partial sum of its gradient.
struct Group {
  int32_t first, count;
  int64_t prefix;
};

struct Plan {
  int64_t group_size, heads_per_block, positions_per_block;  // block rows = positions x heads
  bool decode;                                               // few rows against many keys: see forward/decode.h
  int32_t num_sequences, num_units, num_groups, num_partials;
  int64_t max_kv_len, max_prefix_len;
  const Sequence* sequences;
  const Unit* units;
  const Group* groups;
};

// Scratch memory that a thread keeps between calls, as fresh pages cost more than small kernels. Null: out of memory.
void* acquire_scratch(size_t bytes);

int64_t read_index(const void* data, int64_t dtype, int64_t i);

}  // namespace peftkern
#endif  // PEFTKERN_CPU_PLAN_H_
