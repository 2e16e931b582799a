// SPDX-License-Identifier: Apache-2.0
// Attention over [prefix | sequence] in one kernel: a baseline for use without another library.
//
// A block owns a tile of 64 rows of one key head and one sequence. Keys and values pass through shared memory in two
// stages: the prefix first, then the sequence up to the last key that the tile sees. With few rows and many keys, the
// keys of a tile are split between several blocks, and combine_splits() adds up the splits in order.
#ifndef PEFTKERN_CUDA_SEQUENCE_FORWARD_H_
#define PEFTKERN_CUDA_SEQUENCE_FORWARD_H_

#include "common.cuh"

namespace peftkern {

struct SequenceForward {
  Call call;
  Matrices q, k, v, prefix_k, prefix_v, out;
  float* lse;  // [B, Hq, S]
  const float* sinks;
  const uint8_t* key_mask;  // null: all keys are visible
  int64_t key_mask_batch, key_mask_key;
  int splits;  // of the keys
  float*
      partial;  // [splits, B, Hq, S, D + 2]: weighted sum of values, m, sum of weights; null: out and lse are written
};

template <int kHeadDim>
struct SequenceForwardShape {
  static constexpr int kThreads = 128, kRows = 64, kKeys = kHeadDim > 128 ? 16 : kHeadDim > 64 ? 32 : 64;
  static constexpr int kColumns = kHeadDim > 128 ? 128 : kHeadDim;  // of out per block, to fit in registers
  static constexpr int kQueryBytes = kRows * kHeadDim * 2, kBlockBytes = kKeys * kHeadDim * 2;
  static constexpr int kSharedBytes = kQueryBytes + 4 * kBlockBytes;
};

// The keys that rows at positions [first, last] of a sequence see: [low, high), counted from `sequence.first`.
PEFTKERN_DEVICE int first_key_of(const Call& call, int first_position) {
  return call.window ? max(0, first_position - call.window + 1) : 0;
}
PEFTKERN_DEVICE int end_key_of(const Call& call, const Sequence& sequence, int last_position) {
  const int keys = call.cu_seqlens.pointer ? sequence.length : call.kv_len;
  return call.causal ? min(keys, last_position + 1) : keys;
}

// Whether a row sees a key of its sequence. `key` is below the end that the functions above return.
PEFTKERN_DEVICE bool sees_key(const Call& call, const Row& row, int key) {
  // FAULT: row-sees-its-future
  return (!call.causal || key <= row.position) && (call.window == 0 || row.position - key < call.window);
}

// The blocks of kKeys keys that a tile of rows walks: those of the prefix, then keys [low, high) of the sequence.
template <int kKeys>
struct KeyBlocks {
  int prefix_blocks, low, high, count;

  PEFTKERN_DEVICE KeyBlocks(const Call& call, const Sequence& sequence, int first_row, int rows, bool has_sequence) {
    const int offset = call.kv_len - call.q_len, first_position = first_row / call.group + offset;
    const int last_position = min((first_row + rows - 1) / call.group, sequence.length - 1) + offset;
    prefix_blocks = (sequence.prefix_len + kKeys - 1) / kKeys;
    low = first_key_of(call, first_position) / kKeys * kKeys;
    high = has_sequence ? end_key_of(call, sequence, last_position) : low;
    count = prefix_blocks + max(0, (high - low + kKeys - 1) / kKeys);
  }

  PEFTKERN_DEVICE bool is_prefix(int block) const { return block < prefix_blocks; }
  // Counted from the start of the prefix or of the sequence.
  PEFTKERN_DEVICE int first_key(int block) const {
    return is_prefix(block) ? block * kKeys : low + (block - prefix_blocks) * kKeys;
  }
};

// Copies the keys of a block to shared memory, and the values behind them.
template <class T, int kHeadDim>
PEFTKERN_DEVICE void load_key_block(const SequenceForward& args, const Sequence& sequence,
                                    const KeyBlocks<SequenceForwardShape<kHeadDim>::kKeys>& walked, int kv_head,
                                    int block, uint32_t target) {
  using Shape = SequenceForwardShape<kHeadDim>;
  const bool is_prefix = walked.is_prefix(block);
  const int first_key = walked.first_key(block);
  for (int v = 0; v < 2; v++) {
    const Matrices& matrices = is_prefix ? (v ? args.prefix_v : args.prefix_k) : (v ? args.v : args.k);
    load_rows<T, kHeadDim, Shape::kThreads>(
        target + v * Shape::kBlockBytes, Shape::kKeys, args.call.head_dim, args.q.pointer, [&](int i) -> const T* {
          const int key = first_key + i;
          if (is_prefix) return key < sequence.prefix_len ? matrices.at<T>(sequence.prefix, kv_head, key) : nullptr;
          return key < walked.high ? matrices.at<T>(sequence.batch, kv_head, sequence.first + key) : nullptr;
        });
  }
}

// The masked score of a row and a key of the prefix or of the sequence, whose keys end at `end`, in log2.
template <bool kOptions>
PEFTKERN_DEVICE float sequence_forward_score(const SequenceForward& args, const Sequence& sequence, const Row& row,
                                             bool is_prefix, int key, int end, float product) {
  const Call& call = args.call;
  bool visible;
  float bias = 0.f;
  if (is_prefix) {
    visible = sees_prefix<kOptions>(call, row.position, key, sequence.prefix_len);
    if (visible) bias = prefix_bias_of<kOptions>(call, row.head, key);
  } else {
    visible = key < end && sees_key(call, row, key);
    if (visible && args.key_mask)
      visible = args.key_mask[sequence.batch * args.key_mask_batch + (sequence.first + key) * args.key_mask_key] != 0;
  }
  return visible ? score_of<kOptions>(call, product).value + bias : -INFINITY;
}

// Writes the state of one split to args.partial.
template <int kColumns>
PEFTKERN_DEVICE void store_partial(const SequenceForward& args, const Row (&row)[2], int split, int column,
                                   const RowState<kColumns>& state) {
  const Call& call = args.call;
  const int quad_lane = threadIdx.x % kWarp % 4;
  const int64_t rows = (int64_t)call.batch * call.num_kv_heads * call.group * call.q_len;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const float sum = sum_quad(state.sum[r]);
    if (!row[r].valid) continue;
    float* const to = args.partial + (split * rows + index_of(call, row[r])) * (call.head_dim + 2);
#pragma unroll
    for (int n = 0; n < kColumns / 8; n++) {
      const int at = column + n * 8 + quad_lane * 2;
      if (at < call.head_dim)
        *reinterpret_cast<float2*>(to + at) = make_float2(state.acc[n][2 * r], state.acc[n][2 * r + 1]);
    }
    if (quad_lane == 0 && column == 0) *reinterpret_cast<float2*>(to + call.head_dim) = make_float2(state.m[r], sum);
  }
}

// Writes out and lse of rows whose keys have not been split, with the sink.
template <class T, int kColumns>
PEFTKERN_DEVICE void store_result(const SequenceForward& args, const Row (&row)[2], int column,
                                  const RowState<kColumns>& state) {
  const Call& call = args.call;
  const int quad_lane = threadIdx.x % kWarp % 4;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const float sink = args.sinks != nullptr && row[r].valid ? args.sinks[row[r].head] * kLog2e : -INFINITY;
    const float m = fmaxf(state.m[r], sink), base = m == -INFINITY ? 0.f : m;
    const float weight = exp2_approx(state.m[r] - base);
    const float total = weight * sum_quad(state.sum[r]) + sink_weight(sink, base);
    const float scale = m == -INFINITY ? 0.f : weight / total;
    if (row[r].valid && quad_lane == 0 && column == 0)
      args.lse[index_of(call, row[r])] = m == -INFINITY ? -INFINITY : (base + log2f(total)) * kLn2;
#pragma unroll
    for (int j = 0; j < kColumns / 32; j++) {
      uint32_t x[4];
#pragma unroll
      for (int i = 0; i < 4; i++)
        x[i] = pack<T>(state.acc[4 * j + i][2 * r] * scale, state.acc[4 * j + i][2 * r + 1] * scale);
      transpose_quad(x);
      const int at = column + (4 * j + quad_lane) * 8;
      if (row[r].valid && at < call.head_dim)
        *reinterpret_cast<uint4*>(args.out.at<T>(row[r].batch, row[r].head, row[r].row) + at) =
            make_uint4(x[0], x[1], x[2], x[3]);
    }
  }
}

// k is null if there is no sequence. grid: (tiles, key heads, groups of columns times splits)
template <class T, int kHeadDim, bool kOptions>
PEFTKERN_KERNEL(SequenceForwardShape<kHeadDim>::kThreads, 1)
sequence_forward(PEFTKERN_PARAMS SequenceForward args) {
  using Shape = SequenceForwardShape<kHeadDim>;
  using Layout = Tile<kHeadDim>;
  constexpr int kColumns = Shape::kColumns;
  PEFTKERN_SHARED(shared);
  const Call& call = args.call;
  const uint32_t queries = shared_address(shared), blocks = queries + Shape::kQueryBytes;
  const int kv_head = blockIdx.y, lane = threadIdx.x % kWarp;
  const int column = blockIdx.z % (kHeadDim / kColumns) * kColumns, split = blockIdx.z / (kHeadDim / kColumns);
  const int first = threadIdx.x / kWarp * 16;
  // tiles in reverse order: those that see the most keys start first
  const int number = gridDim.x - 1 - blockIdx.x;
  const TileWalk<Shape::kRows> walk(call, -1, number, number + 1, 1);
  if (!walk.more()) return;
  const Sequence sequence = walk.sequence;

  const Row row[2] = {row_at(call, sequence, kv_head, walk.first_row() + first + lane / 4),
                      row_at(call, sequence, kv_head, walk.first_row() + first + lane / 4 + 8)};
  const KeyBlocks<Shape::kKeys> walked(call, sequence, walk.first_row(), Shape::kRows, args.k.pointer != nullptr);
  const auto load_block = [&](int block) {
    const uint32_t target = blocks + block % 2 * 2 * Shape::kBlockBytes;
    load_key_block<T, kHeadDim>(args, sequence, walked, kv_head, block, target);
  };
  load_rows<T, kHeadDim, Shape::kThreads>(queries, Shape::kRows, call.head_dim, args.q.pointer, [&](int i) -> const T* {
    const Row r = row_at(call, sequence, kv_head, walk.first_row() + i);
    return r.valid ? args.q.at<T>(r.batch, r.head, r.row) : nullptr;
  });
  const int begin = (int)((int64_t)walked.count * split / args.splits);
  const int end = (int)((int64_t)walked.count * (split + 1) / args.splits);
  if (begin < end) load_block(begin);
  copy_async_commit();

  RowState<kColumns> state;
  for (int block = begin; block < end; block++) {
    copy_async_wait<0>();
    __syncthreads();
    if (block + 1 < end) load_block(block + 1);
    copy_async_commit();
    const bool is_prefix = walked.is_prefix(block);
    const int first_key = walked.first_key(block), end_key = is_prefix ? sequence.prefix_len : walked.high;
    const uint32_t keys = blocks + block % 2 * 2 * Shape::kBlockBytes;  // FAULT: keys-of-the-other-stage
    attend<T, kHeadDim, Shape::kKeys, kColumns>(
        state, keys, keys + Shape::kBlockBytes, min(Shape::kKeys, end_key - first_key), column,
        [&](int i, uint32_t (&a)[4]) {
          load_matrices(a, queries + Layout::offset(first + lane % 16, 2 * i + lane / 16));
        },
        [&](float product, int i, int r) {
          return sequence_forward_score<kOptions>(args, sequence, row[r], is_prefix, first_key + i, end_key, product);
        });
  }
  copy_async_wait<0>();

  if (args.partial)
    store_partial(args, row, split, column, state);
  else
    store_result<T>(args, row, column, state);
}

struct CombineSplits {
  const float* partial;  // as sequence_forward writes it
  Matrices out;
  float* lse;  // [B, Hq, S]
  const float* sinks;
  int64_t rows;
  int heads, q_len, head_dim, splits;
};

// out and lse from all splits and the sink, one warp per row. grid: rows / 8
template <class T>
PEFTKERN_KERNEL(256, 1)
combine_splits(PEFTKERN_PARAMS CombineSplits args) {
  const int lane = threadIdx.x % kWarp, width = args.head_dim + 2;
  const int64_t i = (int64_t)blockIdx.x * 8 + threadIdx.x / kWarp;
  if (i >= args.rows) return;
  const int b = (int)(i / args.q_len / args.heads), h = (int)(i / args.q_len % args.heads), row = (int)(i % args.q_len);
  const float sink = args.sinks ? args.sinks[h] * kLog2e : -INFINITY;
  const auto split_at = [&](int split) { return args.partial + (split * args.rows + i) * width; };
  float m = sink;
  for (int split = 0; split < args.splits; split++) m = fmaxf(m, split_at(split)[args.head_dim]);
  const float base = m == -INFINITY ? 0.f : m;
  float total = sink_weight(sink, base);
  for (int split = 0; split < args.splits; split++) {
    const float2 stats = *reinterpret_cast<const float2*>(split_at(split) + args.head_dim);
    total += exp2_approx(stats.x - base) * stats.y;
  }
  const float inverse = m == -INFINITY ? 0.f : 1.f / total;
  for (int column = lane * 2; column < args.head_dim; column += 2 * kWarp) {
    float2 sum = make_float2(0.f, 0.f);
    for (int split = 0; split < args.splits; split++) {
      const float* const from = split_at(split);
      const float weight = exp2_approx(from[args.head_dim] - base);
      const float2 x = *reinterpret_cast<const float2*>(from + column);
      sum.x += weight * x.x, sum.y += weight * x.y;
    }
    *reinterpret_cast<uint32_t*>(args.out.at<T>(b, h, row) + column) = pack<T>(sum.x * inverse, sum.y * inverse);
  }
  if (lane == 0) args.lse[i] = m == -INFINITY ? -INFINITY : (base + log2f(total)) * kLn2;
}

}  // namespace peftkern
#endif  // PEFTKERN_CUDA_SEQUENCE_FORWARD_H_
