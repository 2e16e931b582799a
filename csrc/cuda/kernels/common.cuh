// SPDX-License-Identifier: Apache-2.0
// Shared by the attention kernels: tiles in shared memory, fragments, the rows of a call, the softmax over a block of
// keys.
//
// Scores are in units of log2. Lanes 4 g to 4 g + 3 of a warp (a quad) hold rows g and g + 8 of an accumulator.
#ifndef PEFTKERN_CUDA_COMMON_H_
#define PEFTKERN_CUDA_COMMON_H_

#include <math.h>

#include "ptx.cuh"

namespace peftkern {

constexpr int kWarp = 32;
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// [B, H, N, D] with strides in elements; the stride along D is 1. For a prefix, B is the bank.
struct Matrices {
  void* pointer;
  int64_t batch, head, row;

  template <class T>
  PEFTKERN_DEVICE T* at(int b, int h, int64_t n) const {
    return static_cast<T*>(pointer) + b * batch + h * head + n * row;
  }
};

// Integers of 32 or 64 bits; null if absent.
struct Indices {
  const void* pointer;
  int64_t wide;

  PEFTKERN_DEVICE int at(int64_t i) const {
    return wide ? (int)static_cast<const int64_t*>(pointer)[i] : static_cast<const int32_t*>(pointer)[i];
  }
  PEFTKERN_DEVICE int operator[](int i) const { return at(i); }
};

// One attention call. The sequences are those of cu_seqlens or, if that is null, `sequences` times `length` rows: one a
// sample, or a single one for a kernel that need not tell samples apart. The latter starts at `first_row`.
struct Call {
  int batch, num_kv_heads, group, q_len, kv_len, head_dim, prefix_len, bank_size, sequences, length, first_row;
  int causal, window, prefix_window;  // windows: 0 means none
  float scale, softcap;               // softcap: 0 means none
  Indices cu_seqlens, prefix_ids, prefix_lens;
  const float* prefix_bias;  // [Hq, P], strides below; null: none
  int64_t bias_head, bias_key;
  const float* gate;  // [Hq], the gate's tanh: it weights a separate softmax over the prefix; null: one joint softmax
};

// The queries of one sequence and the prefix that they see (-1: none).
struct Sequence {
  int batch, first, length, prefix, prefix_len;
};

// A query: `head` in [0, Hq), `row` in [0, S), `position` among the keys of its sequence.
struct Row {
  int batch, head, row, position;
  bool valid;
};

PEFTKERN_DEVICE Sequence sequence_at(const Call& call, int i) {
  Sequence s{i, call.first_row, call.length, 0, call.prefix_len};
  if (call.cu_seqlens.pointer) {
    s.batch = 0;
    s.first = call.cu_seqlens[i];
    s.length = call.cu_seqlens[i + 1] - s.first;
  }
  if (call.prefix_ids.pointer) s.prefix = call.prefix_ids[i];
  if (s.prefix < 0) s.prefix_len = 0;
  if (call.prefix_lens.pointer && s.prefix >= 0) s.prefix_len = call.prefix_lens[s.prefix];
  return s;
}

// Rows are numbered per key head, position by position. The heads of a group are adjacent, so they share loaded keys.
PEFTKERN_DEVICE Row row_at(const Call& call, const Sequence& s, int kv_head, int i) {
  const int query = i / call.group, at = query % call.q_len;
  return {s.batch + query / call.q_len, kv_head * call.group + i % call.group, s.first + at,
          at + call.kv_len - call.q_len, query < s.length};
}

// The index of a row in a contiguous [B, Hq, S].
PEFTKERN_DEVICE int64_t index_of(const Call& call, const Row& row) {
  return ((int64_t)row.batch * call.num_kv_heads * call.group + row.head) * call.q_len + row.row;
}

// Numbers the tiles of kSize items of all sequences. A position of a sequence has `each` items, which are the rows of a
// key head or one key. All sequences have `length` positions, unless they are packed.
//
// No pass over the sequences is needed to find a tile by its number: the items before sequence i of a packed call fill
// at most cu_seqlens[i] * each / kSize + i tiles, and that is where its numbers start. So each sequence may leave one
// number without a tile.
template <int kSize>
struct TileNumbers {
  const Call& call;
  int each, length;

  PEFTKERN_HOST_DEVICE int tiles(int positions) const { return (positions * each + kSize - 1) / kSize; }

  PEFTKERN_HOST_DEVICE int count() const {
    return call.cu_seqlens.pointer ? tiles(call.q_len) + call.sequences - 1 : call.sequences * tiles(length);
  }

  // The first number of sequence i.
  PEFTKERN_DEVICE int first(int i) const {
    return call.cu_seqlens.pointer ? call.cu_seqlens[i] * each / kSize + i : i * tiles(length);
  }

  PEFTKERN_DEVICE int sequence_of(int number) const {
    int low = 0, high = call.sequences;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (first(middle) <= number ? low : high) = middle;
    }
    return low;
  }
};

// The tiles of kRows rows of a key head.
template <int kRows>
PEFTKERN_HOST_DEVICE TileNumbers<kRows> row_tiles(const Call& call) {
  return {call, call.group, call.length};
}

// Walks the tiles of rows with the numbers `first`, `first` + `step`, ... below `end`, those of all sequences or of the
// sequences that see prefix `only`.
template <int kRows>
struct TileWalk {
  const Call& call;
  int only, number, end, step, tile;
  Sequence sequence;

  PEFTKERN_DEVICE TileWalk(const Call& c, int only_prefix, int first, int last, int stride)
      : call(c), only(only_prefix), number(first), end(last), step(stride) {
    settle();
  }

  // Goes on to the next number that is that of a tile.
  PEFTKERN_DEVICE void settle() {
    const TileNumbers<kRows> numbers = row_tiles<kRows>(call);
    while (number < end) {
      const int index = numbers.sequence_of(number);
      int next = number + 1;
      sequence = sequence_at(call, index);
      tile = number - numbers.first(index);
      if (only >= 0 && sequence.prefix != only)
        next = numbers.first(next_sequence(index));
      else if (tile < numbers.tiles(sequence.length))
        return;
      number += (next - number + step - 1) / step * step;
    }
  }

  // The sequence after i that sees prefix `only`, or the number of sequences.
  PEFTKERN_DEVICE int next_sequence(int i) const {
    do i++;
    while (i < call.sequences && call.prefix_ids[i] != only);
    return i;
  }

  PEFTKERN_DEVICE bool more() const { return number < end; }
  PEFTKERN_DEVICE int first_row() const { return tile * kRows; }
  PEFTKERN_DEVICE void advance() {
    number += step;
    tile += step;
    if (tile * kRows >= sequence.length * call.group) settle();
  }
};

// Rows of kColumns 16-bit elements in shared memory, as swizzled chunks of 16 bytes: the chunks of one column of eight
// consecutive rows lie in different banks.
template <int kColumns>
struct Tile {
  static constexpr int kChunks = kColumns / 8;
  static_assert(kChunks % 4 == 0, "rows are multiples of 64 bytes");

  static PEFTKERN_HOST_DEVICE constexpr int bytes(int rows) { return rows * kColumns * 2; }
  static PEFTKERN_DEVICE uint32_t offset(int row, int chunk) {
    const int swizzle = kChunks % 8 == 0 ? row & 7 : row >> 1 & 3;
    return (uint32_t)(row * kChunks + (chunk ^ swizzle)) * 16u;
  }
  // The address `chunks` further along a row, in fewer instructions than offset() needs. The chunk of `address` must be
  // below the lowest set bit of `chunks`, and the tile must start at a multiple of the size of its rows.
  static PEFTKERN_DEVICE uint32_t along(uint32_t address, int chunks) {
    return kChunks % 8 == 0 ? address ^ chunks * 16u : (address ^ (chunks & 3) * 16u) + (chunks & ~3) * 16u;
  }
};

// All threads of the block copy rows [0, rows) to shared memory. `source(row)` is a row's address, or null for zeros.
// `any` is an arbitrary 16-byte aligned address. The caller commits and waits.
template <class T, int kColumns, int kThreads, class Source>
PEFTKERN_DEVICE void load_rows(uint32_t target, int rows, int head_dim, const void* any, Source source) {
  using Layout = Tile<kColumns>;
  for (int i = threadIdx.x; i < rows * Layout::kChunks; i += kThreads) {
    const int row = i / Layout::kChunks, chunk = i % Layout::kChunks;
    const T* from = source(row);
    const bool valid = from != nullptr && chunk * 8 < head_dim;
    copy_async(target + Layout::offset(row, chunk), valid ? from + chunk * 8 : any, valid);
  }
}

// Transposes a 4 x 4 matrix; each lane of a quad holds one row.
//
// This converts between 16-byte accesses and fragments: lane t reads words 4 t to 4 t + 3 of 32 columns, and a fragment
// needs word t of each of the four chunks.
PEFTKERN_DEVICE void transpose_quad(uint32_t (&x)[4]) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t other = exchange_lanes(odd ? x[i] : x[i + 1], 1);
    (odd ? x[i] : x[i + 1]) = other;
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const uint32_t other = exchange_lanes(high ? x[i] : x[i + 2], 2);
    (high ? x[i] : x[i + 2]) = other;
  }
}

PEFTKERN_DEVICE float sum_quad(float x) {
  x += exchange_lanes(x, 1);
  return x + exchange_lanes(x, 2);
}
PEFTKERN_DEVICE float max_quad(float x) {
  x = fmaxf(x, exchange_lanes(x, 1));
  return fmaxf(x, exchange_lanes(x, 2));
}

// The score of a product q k, in log2, and its derivative with respect to scale * product, in units of log2(e).
// `weight` multiplies the key's softmax weight.
struct Score {
  float value, slope, weight = 1.f;
};
template <bool kOptions>
PEFTKERN_DEVICE Score score_of(const Call& call, float product) {
  if (!kOptions || call.softcap == 0.f) return {product * (call.scale * kLog2e), 1.f};
  const float capped = tanhf(product * (call.scale / call.softcap));
  return {capped * (call.softcap * kLog2e), 1.f - capped * capped};
}

// Whether a query at `position` sees `token` of a prefix of `length` tokens.
template <bool kOptions>
PEFTKERN_DEVICE bool sees_prefix(const Call& call, int position, int token, int length) {
  // FAULT: prefix-one-key-long
  return token < length && (!kOptions || call.prefix_window == 0 || length + position - token < call.prefix_window);
}

// The bias that a head adds to the score of a token of the prefix, in log2.
template <bool kOptions>
PEFTKERN_DEVICE float prefix_bias_of(const Call& call, int head, int token) {
  return kOptions && call.prefix_bias ? call.prefix_bias[head * call.bias_head + token * call.bias_key] * kLog2e : 0.f;
}

// The softmax state of a warp's 16 rows over keys that arrive block by block: the weighted sum of values for kColumns
// columns, the running maximum m, and each lane's contribution to the denominator.
template <int kColumns>
struct RowState {
  float acc[kColumns / 8][4];
  float m[2], sum[2];

  PEFTKERN_DEVICE RowState() {
#pragma unroll
    for (int n = 0; n < kColumns / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) acc[n][i] = 0.f;
    m[0] = m[1] = -INFINITY;
    sum[0] = sum[1] = 0.f;
  }
};

// The weight of a sink over exp2(base), where base is the largest exponent. A sink of +inf gets the whole weight.
PEFTKERN_DEVICE float sink_weight(float sink, float base) { return sink == INFINITY ? 1.f : exp2_approx(sink - base); }

// Turns the products s of a block of keys into weights: raises m, rescales `state` accordingly and adds to its sums.
template <int kKeys, int kColumns, class ScoreOf>
PEFTKERN_DEVICE void update_softmax(RowState<kColumns>& state, float (&s)[kKeys / 8][4], ScoreOf score) {
  const int lane = threadIdx.x % kWarp;
  float m[2] = {state.m[0], state.m[1]}, decay[2];
#pragma unroll
  for (int n = 0; n < kKeys / 8; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      s[n][i] = score(s[n][i], n * 8 + 2 * (lane % 4) + (i & 1), i >> 1);
      m[i >> 1] = fmaxf(m[i >> 1], s[n][i]);
    }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    m[r] = max_quad(m[r]);
    const float base = m[r] == -INFINITY ? 0.f : m[r];  // -inf - -inf would be NaN
    decay[r] = exp2_approx(state.m[r] - base);
    state.m[r] = m[r];
    state.sum[r] *= decay[r];
    m[r] = base;
  }
#pragma unroll
  for (int n = 0; n < kKeys / 8; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      s[n][i] = exp2_approx(s[n][i] - m[i >> 1]);
      state.sum[i >> 1] += s[n][i];
    }
#pragma unroll
  for (int n = 0; n < kColumns / 8; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) state.acc[n][i] *= decay[i >> 1];
}

// Adds `count` keys, the first rows of two tiles in shared memory, to `state`. Rows from `count` to the next multiple
// of 16 must be zeros. `query(i, fragment)` loads columns 16 i to 16 i + 15 of the rows; `score(product, key, r)` is
// the masked score of row g + 8 r. Only the kColumns columns of the values from `first_column` on are used.
template <class T, int kHeadDim, int kKeys, int kColumns, class Query, class ScoreOf>
PEFTKERN_DEVICE void attend(RowState<kColumns>& state, uint32_t keys, uint32_t values, int count, int first_column,
                            Query query, ScoreOf score) {
  using Layout = Tile<kHeadDim>;
  const int lane = threadIdx.x % kWarp;
  const uint32_t key_at = keys + Layout::offset(lane % 8, lane / 8);
  const uint32_t value_at = values + Layout::offset(lane % 16, lane / 16);
  float s[kKeys / 8][4];
#pragma unroll
  for (int n = 0; n < kKeys / 8; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) s[n][i] = 0.f;
#pragma unroll
  for (int k = 0; k < kHeadDim / 32; k++) {
    uint32_t a[2][4], b[4];
    query(2 * k, a[0]);
    query(2 * k + 1, a[1]);
#pragma unroll
    for (int n = 0; n < kKeys / 8; n++)
      if (16 * (n / 2) < count) {
        load_matrices(b, Layout::along(key_at, 4 * k) + Layout::bytes(8 * n));
        mma<T>(s[n], a[0], b[0], b[1]);
        mma<T>(s[n], a[1], b[2], b[3]);
      }
  }
  update_softmax<kKeys>(state, s, score);
#pragma unroll
  for (int k = 0; k < kKeys / 16; k++)
    if (16 * k < count) {
      const uint32_t a[4] = {pack<T>(s[2 * k][0], s[2 * k][1]), pack<T>(s[2 * k][2], s[2 * k][3]),
                             // FAULT: fragments-swapped
                             pack<T>(s[2 * k + 1][0], s[2 * k + 1][1]), pack<T>(s[2 * k + 1][2], s[2 * k + 1][3])};
#pragma unroll
      for (int n = 0; n < kColumns / 16; n++) {
        uint32_t b[4];
        load_matrices_transposed(b, Layout::along(value_at, first_column / 8 + 2 * n) + Layout::bytes(16 * k));
        mma<T>(state.acc[2 * n], a, b[0], b[1]);
        mma<T>(state.acc[2 * n + 1], a, b[2], b[3]);
      }
    }
}

}  // namespace peftkern
#endif  // PEFTKERN_CUDA_COMMON_H_
