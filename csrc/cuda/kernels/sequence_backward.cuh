// SPDX-License-Identifier: Apache-2.0
// Gradients of the sequence's part of an attention, given the joint out and lse: dq, dk and dv. Together with
// prefix_backward.cuh, which adds to dq, this is the backward of sequence_forward.cuh.
#ifndef PEFTKERN_CUDA_SEQUENCE_BACKWARD_H_
#define PEFTKERN_CUDA_SEQUENCE_BACKWARD_H_

#include "backward.cuh"
#include "sequence_forward.cuh"

namespace peftkern {

struct SequenceBackward {
  Call call;
  Matrices q, k, v, out, dout, dq, dk, dv;  // gradients: null if not needed
  Matrices prefix_k, prefix_v;              // softmax_sums only
  const float* lse;                         // [B, Hq, S]
  Matrices dlse;                            // null: zero. `row` is the stride of its last dimension
  float* delta;                             // [B, Hq, S]
  const uint8_t* key_mask;                  // null: all keys are visible
  int64_t key_mask_batch, key_mask_key;
};

// delta = rowsum(out * dout) - dlse, one warp per row. grid: rows / 8
template <class T>
PEFTKERN_KERNEL(256, 1)
row_sums(PEFTKERN_PARAMS SequenceBackward args) {
  const Call& call = args.call;
  const int heads = call.num_kv_heads * call.group, lane = threadIdx.x % kWarp;
  const int64_t i = (int64_t)blockIdx.x * 8 + threadIdx.x / kWarp;
  if (i >= (int64_t)call.batch * heads * call.q_len) return;
  const int b = (int)(i / call.q_len / heads), h = (int)(i / call.q_len % heads), row = (int)(i % call.q_len);
  const T *out = args.out.at<T>(b, h, row), *dout = args.dout.at<T>(b, h, row);
  float sum = 0.f;
  for (int column = lane * 2; column < call.head_dim; column += 2 * kWarp) {
    const float2 x = unpack<T>(*reinterpret_cast<const uint32_t*>(out + column));
    const float2 y = unpack<T>(*reinterpret_cast<const uint32_t*>(dout + column));
    sum += x.x * y.x + x.y * y.y;
  }
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) sum += exchange_lanes(sum, lanes);
  if (lane == 0) args.delta[i] = sum - (args.dlse.pointer ? *args.dlse.at<float>(b, h, row) : 0.f);
}

// Loads q, dout and lse of the rows of a tile from `first_row` on, and delta if `with_delta`.
template <class T, int kHeadDim>
PEFTKERN_DEVICE void load_queries(const BackwardTile<T, kHeadDim>& tile, const SequenceBackward& args,
                                  const Sequence& sequence, int kv_head, int first_row, bool with_delta = true) {
  using Shape = BackwardShape<kHeadDim>;
  const Call& call = args.call;
  load_row_tiles(tile, args, sequence, kv_head, first_row);
  if (threadIdx.x < Shape::kRows) {
    const Row row = row_at(call, sequence, kv_head, first_row + threadIdx.x);
    const float lse = row.valid ? args.lse[index_of(call, row)] * kLog2e : -INFINITY;
    tile.lse()[threadIdx.x] = lse == -INFINITY ? INFINITY : lse;
    if (with_delta) tile.delta()[threadIdx.x] = row.valid ? args.delta[index_of(call, row)] : 0.f;
  }
}

// Loads a block of keys and values of a sequence, or of its prefix, from `first_key` on.
template <class T, int kHeadDim>
PEFTKERN_DEVICE void load_keys(const BackwardTile<T, kHeadDim>& tile, const SequenceBackward& args,
                               const Sequence& sequence, int kv_head, int first_key, int end, bool is_prefix = false) {
  using Shape = BackwardShape<kHeadDim>;
  const int batch = is_prefix ? sequence.prefix : sequence.batch, first = is_prefix ? 0 : sequence.first;
  for (int v = 0; v < 2; v++) {
    const Matrices& matrices = is_prefix ? (v ? args.prefix_v : args.prefix_k) : (v ? args.v : args.k);
    tile.load(v ? Shape::kValuesAt : Shape::kKeysAt, Shape::kKeys, args.call.head_dim, args.q.pointer,
              [&](int i) -> const T* {
                const int key = first_key + i;
                return key < end ? matrices.at<T>(batch, kv_head, first + key) : nullptr;
              });
  }
}

// The score of a row and a key of a sequence. The keys end at `end`.
template <bool kOptions>
PEFTKERN_DEVICE Score sequence_score(const SequenceBackward& args, const Sequence& sequence, const Row& row, int key,
                                     int end, float product) {
  const Call& call = args.call;
  bool visible = key < end && sees_key(call, row, key);
  if (visible && args.key_mask)
    visible = args.key_mask[sequence.batch * args.key_mask_batch + (sequence.first + key) * args.key_mask_key] != 0;
  const Score score = score_of<kOptions>(call, product);
  return {visible ? score.value : -INFINITY, score.slope};
}

// Computes p and ds of a tile of rows and a block of keys.
template <class T, int kHeadDim, bool kOptions>
PEFTKERN_DEVICE void sequence_weights(const BackwardTile<T, kHeadDim>& tile, const SequenceBackward& args,
                                      const Sequence& sequence, int kv_head, int first_row, int first_key, int end) {
  tile.weights([&](float product, int i, int k) -> Score {
    const Row row = row_at(args.call, sequence, kv_head, first_row + i);
    return sequence_score<kOptions>(args, sequence, row, first_key + k, end, product);
  });
}

// delta = the sum of p dout v' over the keys, less dlse: rowsum(out * dout) - dlse without the rounding of out. A block
// owns a tile of rows and walks the prefix, then the sequence unless k is null. grid: (tiles, key heads)
template <class T, int kHeadDim>
PEFTKERN_KERNEL(BackwardShape<kHeadDim>::kThreads, 1)
softmax_sums(PEFTKERN_PARAMS SequenceBackward args) {
  using Shape = BackwardShape<kHeadDim>;
  PEFTKERN_SHARED(shared);
  const BackwardTile<T, kHeadDim> tile(shared);
  const Call& call = args.call;
  const int kv_head = blockIdx.y;
  const int number = gridDim.x - 1 - blockIdx.x;
  const TileWalk<Shape::kRows> walk(call, -1, number, number + 1, 1);
  if (!walk.more()) return;
  const Sequence sequence = walk.sequence;
  const int first_row = walk.first_row(), offset = call.kv_len - call.q_len;
  const int last_position = min((first_row + Shape::kRows - 1) / call.group, sequence.length - 1) + offset;
  const int low = first_key_of(call, first_row / call.group + offset) / Shape::kKeys * Shape::kKeys;
  const int high = args.k.pointer ? end_key_of(call, sequence, last_position) : low;
  const int prefix_keys = (sequence.prefix_len + Shape::kKeys - 1) / Shape::kKeys * Shape::kKeys;

  float sums[2] = {0.f, 0.f};
  load_queries(tile, args, sequence, kv_head, first_row, false);
  for (int at = 0; at < prefix_keys + high - low; at += Shape::kKeys) {
    const bool is_prefix = at < prefix_keys;
    const int first_key = is_prefix ? at : low + at - prefix_keys, end = is_prefix ? sequence.prefix_len : high;
    load_keys(tile, args, sequence, kv_head, first_key, end, is_prefix);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    const auto score_at = [&](float product, int i, int k) -> Score {
      const Row row = row_at(call, sequence, kv_head, first_row + i);
      const int key = first_key + k;
      if (!is_prefix) return sequence_score<true>(args, sequence, row, key, end, product);
      Score score = score_of<true>(call, product);
      const bool visible = sees_prefix<true>(call, row.position, key, sequence.prefix_len);
      score.value = visible ? score.value + prefix_bias_of<true>(call, row.head, key) : -INFINITY;
      return score;
    };
    tile.each_weight(score_at, [&](int r, int, int, float p, float dp) { sums[r] += p * dp; });
    __syncthreads();
  }
  copy_async_commit();
  copy_async_wait<0>();
  // Warps with the same rows and different keys add up their sums, in order.
  float* const side_sums = reinterpret_cast<float*>(shared + Shape::kWeightsAt);  // [side warps, rows]
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const float sum = sum_quad(sums[r]);
    if (tile.lane % 4 == 0)
      side_sums[tile.warp / Shape::kRowWarps * Shape::kRows + tile.first_row() + tile.lane / 4 + 8 * r] = sum;
  }
  __syncthreads();  // FAULT: halves-of-delta-added-early
  if (threadIdx.x >= Shape::kRows) return;
  const Row row = row_at(call, sequence, kv_head, first_row + threadIdx.x);
  if (!row.valid) return;
  float sum = args.dlse.pointer ? -*args.dlse.at<float>(row.batch, row.head, row.row) : 0.f;
  // FAULT: half-of-the-keys-in-delta
  for (int side = 0; side < Shape::kSideWarps; side++) sum += side_sums[side * Shape::kRows + threadIdx.x];
  args.delta[index_of(call, row)] = sum;
}

// dq: a block owns a tile of rows and walks the keys. grid: (tiles, key heads)
template <class T, int kHeadDim, bool kOptions>
PEFTKERN_KERNEL(BackwardShape<kHeadDim>::kThreads, 1)
sequence_backward_queries(PEFTKERN_PARAMS SequenceBackward args) {
  using Shape = BackwardShape<kHeadDim>;
  PEFTKERN_SHARED(shared);
  const BackwardTile<T, kHeadDim> tile(shared);
  const Call& call = args.call;
  const int kv_head = blockIdx.y;
  const int number = gridDim.x - 1 - blockIdx.x;
  const TileWalk<Shape::kRows> walk(call, -1, number, number + 1, 1);
  if (!walk.more()) return;
  const Sequence sequence = walk.sequence;
  const int first_row = walk.first_row(), offset = call.kv_len - call.q_len;
  const int last_position = min((first_row + Shape::kRows - 1) / call.group, sequence.length - 1) + offset;
  const int low = first_key_of(call, first_row / call.group + offset), high = end_key_of(call, sequence, last_position);

  Sums<Shape::kQueryGroups> dq;
  load_queries(tile, args, sequence, kv_head, first_row);
  for (int key = low / Shape::kKeys * Shape::kKeys; key < high; key += Shape::kKeys) {
    load_keys(tile, args, sequence, kv_head, key, high);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    sequence_weights<T, kHeadDim, kOptions>(tile, args, sequence, kv_head, first_row, key, high);
    __syncthreads();
    tile.add_queries(dq);
    __syncthreads();
  }
  copy_async_commit();
  copy_async_wait<0>();
  tile.store_queries(dq, call.scale, false, call.head_dim, [&](int i) -> T* {
    const Row row = row_at(call, sequence, kv_head, first_row + i);
    return row.valid ? args.dq.at<T>(row.batch, row.head, row.row) : nullptr;
  });
}

// The blocks of keys of all sequences.
template <int kHeadDim>
PEFTKERN_HOST_DEVICE TileNumbers<BackwardShape<kHeadDim>::kKeys> key_tiles(const Call& call) {
  return {call, 1, call.kv_len};
}

// dk and dv: a block owns a block of keys and walks the rows. grid: (blocks of keys, key heads)
template <class T, int kHeadDim, bool kOptions>
PEFTKERN_KERNEL(BackwardShape<kHeadDim>::kThreads, 1)
sequence_backward_keys(PEFTKERN_PARAMS SequenceBackward args) {
  using Shape = BackwardShape<kHeadDim>;
  PEFTKERN_SHARED(shared);
  const BackwardTile<T, kHeadDim> tile(shared);
  const Call& call = args.call;
  const auto numbers = key_tiles<kHeadDim>(call);
  const int index = numbers.sequence_of(blockIdx.x);
  const int kv_head = blockIdx.y, first_key = (blockIdx.x - numbers.first(index)) * Shape::kKeys;
  const Sequence sequence = sequence_at(call, index);
  const int keys = call.cu_seqlens.pointer ? sequence.length : call.kv_len, offset = call.kv_len - call.q_len;
  if (first_key >= keys) return;
  const int last_key = min(first_key + Shape::kKeys, keys) - 1;
  const int low = call.causal ? max(0, first_key - offset) : 0;  // the rows that see the block
  const int high = min(sequence.length, call.window ? last_key + call.window - offset : sequence.length);

  Sums<Shape::kSumGroups> dk, dv;
  load_keys(tile, args, sequence, kv_head, first_key, keys);
  for (int row = low * call.group / Shape::kRows * Shape::kRows; row < high * call.group; row += Shape::kRows) {
    load_queries(tile, args, sequence, kv_head, row);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    sequence_weights<T, kHeadDim, kOptions>(tile, args, sequence, kv_head, row, first_key, keys);
    __syncthreads();
    tile.add_keys_and_values(dk, dv);
    __syncthreads();
  }
  copy_async_commit();
  copy_async_wait<0>();
  const auto store = [&](const Sums<Shape::kSumGroups>& sums, float scale, const Matrices& target) {
    tile.store_sums(sums, scale, call.head_dim, [&](int key, int column, float2 pair) {
      if (first_key + key < keys)
        *reinterpret_cast<uint32_t*>(target.at<T>(sequence.batch, kv_head, sequence.first + first_key + key) + column) =
            pack<T>(pair.x, pair.y);
    });
  };
  if (args.dk.pointer) store(dk, call.scale, args.dk);
  if (args.dv.pointer) store(dv, 1.f, args.dv);
}

}  // namespace peftkern
#endif  // PEFTKERN_CUDA_SEQUENCE_BACKWARD_H_
