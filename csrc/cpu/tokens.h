// SPDX-License-Identifier: Apache-2.0
// Where keys and values lie in the caller's memory, and the memory that they are packed into.
#ifndef PEFTKERN_CPU_TOKENS_H_
#define PEFTKERN_CPU_TOKENS_H_

#include <cstring>

#include "problem.h"

namespace peftkern {
namespace PEFTKERN_ISA {

// The key and the value of a token. Null behind the end of a prefix of which prefix_rows says where its tokens lie.
struct Token {
  const void *k, *v;
  int64_t dtype;
};

// The tokens of a sequence or of a prefix, for one kv head.
struct Source {
  const peftkern_attention* args;
  int64_t kv_head;
  Token first;
  int64_t k_stride, v_stride;  // elements
  int64_t listed;              // the prefix whose tokens prefix_rows lists, or -1: tokens are evenly spaced

  Token token(int64_t j) const {
    if (listed >= 0) return listed_token(j);
    return {offset(first.k, first.dtype, j * k_stride), offset(first.v, first.dtype, j * v_stride), first.dtype};
  }

  Token listed_token(int64_t j) const {
    const peftkern_attention& a = *args;
    if (a.prefix_lens && j >= read_index(a.prefix_lens, a.prefix_lens_dtype, listed))
      return {nullptr, nullptr, a.dtype};
    const int64_t* at = a.prefix_rows + 2 * (listed * a.prefix_len + j);
    if (at[0] < 0)
      return {offset(a.k, a.dtype, kv_head * a.k_stride[1] + at[1] * a.k_stride[2]),
              offset(a.v, a.dtype, kv_head * a.v_stride[1] + at[1] * a.v_stride[2]), a.dtype};
    const int64_t *k = a.prefix_k_stride, *v = a.prefix_v_stride;
    return {offset(a.prefix_k, a.prefix_dtype, at[0] * k[0] + kv_head * k[1] + at[1] * k[2]),
            offset(a.prefix_v, a.prefix_dtype, at[0] * v[0] + kv_head * v[1] + at[1] * v[2]), a.prefix_dtype};
  }
};

static Source sequence_source(const Call& p, const Target& target) {
  const peftkern_attention& a = *p.args;
  const Sequence& s = target.seq;
  const int64_t *k = a.k_stride, *v = a.v_stride;
  const Token first{offset(a.k, a.dtype, s.batch * k[0] + target.kv_head * k[1] + s.start * k[2]),
                    offset(a.v, a.dtype, s.batch * v[0] + target.kv_head * v[1] + s.start * v[2]), a.dtype};
  return {&a, target.kv_head, first, k[2], v[2], -1};
}

static Source prefix_source(const Call& p, int64_t prefix, int64_t kv_head) {
  const peftkern_attention& a = *p.args;
  if (a.prefix_rows) return {&a, kv_head, {}, 0, 0, prefix};
  const int64_t *k = a.prefix_k_stride, *v = a.prefix_v_stride;
  const Token first{offset(a.prefix_k, a.prefix_dtype, prefix * k[0] + kv_head * k[1]),
                    offset(a.prefix_v, a.prefix_dtype, prefix * v[0] + kv_head * v[1]), a.prefix_dtype};
  return {&a, kv_head, first, k[2], v[2], -1};
}

// Which rows of a tile are read where the caller keeps them.
struct InPlace {
  bool k, v, by_key;

  bool all() const { return k && v && by_key; }
};

// Memory of `length` packed keys and values: rows of words, a pair of numbers in each if words hold pairs. Then they
// fill half of it, and `by_key`, which is made of the keys or the values, follows.
template <typename Word>
struct TileMemory {
  Word *k, *v;
  int64_t length;
};

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif  // PEFTKERN_CPU_TOKENS_H_
