// SPDX-License-Identifier: Apache-2.0
// What all tasks of a call share, and the pieces that they work on: scratch memory, rows, tiles.
//
// A block has up to kBlockM rows: positions x heads that read the same kv head. Scores are stored transposed,
// [key][row], so the lanes of a vector are rows. A softmax then needs no sums across lanes, keys and values are read in
// their own memory order, and GQA fills vectors even for a single position. Scores are in units of ln 2, so weights are
// powers of two.
//
// How rows of keys, values, queries and weights are stored for products, and how they are multiplied, is a layout's
// business: a class of layouts/ that most functions take as their template parameter L.
#ifndef PEFTKERN_CPU_PROBLEM_H_
#define PEFTKERN_CPU_PROBLEM_H_

#include "dtypes.h"
#include "gemm.h"
#include "plan.h"
#include "sanitizer.h"

namespace peftkern {
namespace PEFTKERN_ISA {

enum Part { kSequence = 0, kPrefix = 1 };  // dropout uses these numbers in its counters

// Allocates aligned pieces of scratch memory. With a null base, it only counts the bytes.
struct Arena {
  char* base;
  size_t used;

  template <typename T>
  T* take(int64_t count) {
    const size_t begin = used, end = begin + (size_t)count * sizeof(T);
    used = (size_t)round_up((int64_t)end, 64) + kGap;
    if (!base) return nullptr;
    mark_piece(base + begin, base + end, base + used);
    return reinterpret_cast<T*>(base + begin);
  }
};

// The head dimension of the keys or of the values, and the number of elements to which rows are padded with zeros.
struct HeadDim {
  int64_t size, padded;
};

// Rows of a layout's words. `dim` counts numbers: a word holds one, or two bf16 numbers.
template <typename Word>
struct Rows {
  const Word* data;
  int64_t stride;  // words
  HeadDim dim;

  Matrix<Word> from(int64_t row) const { return {data + row * stride, stride}; }
};

// The keys and values of a tile. In k and v, a pair holds neighbours along the head dimension; in `by_key`, it holds
// neighbouring keys. Sums over keys multiply `by_key`: v in the forward, k in the backward.
template <typename Word>
struct Tile {
  Rows<Word> k, v, by_key;
};

// Rows of a tensor of the caller, [batch, head, position, dim].
struct Tensor {
  const void* data;
  const int64_t* stride;
  HeadDim dim;
};

// The rows of a block that take part.
struct RowRange {
  int64_t begin, end;
};

// A sequence, and the kv head whose keys and values are read.
struct Target {
  const Sequence& seq;
  int64_t kv_head;
};

// The properties of a call that do not depend on the layout.
struct Call {
  const peftkern_attention* args;
  const Plan* plan;
  HeadDim k_dim, v_dim;  // of q and k; of v and out
  float log2_scale;      // plain scores, in units of ln 2, are log2_scale * product
  bool plain_seq, plain_prefix;
  bool backward;

  bool is_plain(Part part) const { return part == kPrefix ? plain_prefix : plain_seq; }
  // That of the rows which sums over keys multiply: v in the forward, k in the backward.
  HeadDim by_key_dim() const { return backward ? k_dim : v_dim; }
  Tensor q() const { return {args->q, args->q_stride, k_dim}; }
};

// A call in the layout L.
template <typename L>
struct Problem : Call {
  Problem(const peftkern_attention& a, const Plan& p, bool is_backward) {
    args = &a;
    plan = &p;
    backward = is_backward;
    k_dim = {a.head_dim, round_up(a.head_dim, L::kPadding)};
    v_dim = {a.value_dim, round_up(a.value_dim, L::kPadding)};
    log2_scale = (float)(a.scale * kLog2e);
    const bool plain = a.softcap == 0.0 && a.scale > 0.0;
    plain_seq = plain && !a.bias;
    plain_prefix = plain && !a.prefix_bias;
  }
};

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif  // PEFTKERN_CPU_PROBLEM_H_
