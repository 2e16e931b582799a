// SPDX-License-Identifier: Apache-2.0
// Gradients of the prefix's part of an attention, given the merged out and lse.
//
// One pass over the rows for each chunk of the prefix that fits in shared memory: delta, p and ds of a tile; dq is
// added in place; dprefix_k and dprefix_v are summed in registers over a fixed split of the rows. The splits are then
// added in order, so the sums are the same from run to run.
#ifndef PEFTKERN_CUDA_PREFIX_BACKWARD_H_
#define PEFTKERN_CUDA_PREFIX_BACKWARD_H_

#include "backward.cuh"

namespace peftkern {

struct PrefixBackward {
  Call call;
  Matrices q, prefix_k, prefix_v, out, dout;
  Matrices dq;                   // added to; null: not needed
  const float* lse;              // [B, Hq, S]
  Matrices dlse;                 // null: zero. `row` is the stride of its last dimension
  const float* delta;            // [B, Hq, S], used by calls with options only; null: computed from out
  float *dprefix_k, *dprefix_v;  // [splits, bank, Hkv, P, D]; null: not needed
};

// The tiles of rows of this block's split that see `prefix`: every gridDim.x-th tile, so that the tiles of each prefix
// are shared evenly among the splits. None if there are no keys.
template <int kRows>
PEFTKERN_DEVICE TileWalk<kRows> walk_split(const Call& call, int prefix, bool has_keys) {
  return {call, call.prefix_ids.pointer ? prefix : -1, (int)blockIdx.x, has_keys ? row_tiles<kRows>(call).count() : 0,
          (int)gridDim.x};
}

// The score of a row and a token of a prefix of `length` tokens, with all options applied.
PEFTKERN_DEVICE Score prefix_score(const Call& call, const Row& row, int token, int length, float product) {
  Score score = score_of<true>(call, product);
  if (sees_prefix<true>(call, row.position, token, length))
    score.value += prefix_bias_of<true>(call, row.head, token);
  else
    score.value = -INFINITY;
  if (call.gate) score.weight = call.gate[row.head];
  return score;
}

// Writes delta and lse of a tile's rows from `first_row` on to shared memory. Waits for the copies under way, as delta
// is computed from dout there, unless it is given.
template <class T, int kHeadDim, bool kOptions>
PEFTKERN_DEVICE void load_statistics(const BackwardTile<T, kHeadDim>& tile, const PrefixBackward& args,
                                     const Sequence& sequence, int kv_head, int first_row) {
  using Shape = BackwardShape<kHeadDim>;
  using Layout = Tile<kHeadDim>;
  constexpr int kRowThreads = Shape::kThreads / Shape::kRows, kRowChunks = Layout::kChunks / kRowThreads;
  const Call& call = args.call;
  const bool known = kOptions && args.delta;  // plain calls have no register left for this
  // kRowThreads threads sum each row.
  const int sum_row = threadIdx.x / kRowThreads, sum_thread = threadIdx.x % kRowThreads;
  const Row row = row_at(call, sequence, kv_head, first_row + sum_row);
  uint4 out[kRowChunks];
  if (!known) {
    const T* from = args.out.at<T>(row.batch, row.head, row.row);
#pragma unroll
    for (int c = 0; c < kRowChunks; c++) {
      const int column = (sum_thread + c * kRowThreads) * 8;
      out[c] = make_uint4(0, 0, 0, 0);
      if (row.valid && column < call.head_dim) out[c] = *reinterpret_cast<const uint4*>(from + column);
    }
  }
  float row_lse = INFINITY, row_dlse = 0.f, delta = 0.f;
  if (row.valid && sum_thread == 0) {
    row_lse = args.lse[index_of(call, row)] * kLog2e;
    if (row_lse == -INFINITY) row_lse = INFINITY;  // the weights of a row without keys are 0
    if (known)
      delta = args.delta[index_of(call, row)];
    else if (args.dlse.pointer)
      row_dlse = *args.dlse.at<float>(row.batch, row.head, row.row);
  }
  copy_async_wait<0>();
  __syncthreads();
  if (!known) {
#pragma unroll
    for (int c = 0; c < kRowChunks; c++) {
      const uint4 dout = *reinterpret_cast<const uint4*>(tile.shared + Shape::kDoutAt +
                                                         Layout::offset(sum_row, sum_thread + c * kRowThreads));
      const uint32_t x[4] = {out[c].x, out[c].y, out[c].z, out[c].w}, y[4] = {dout.x, dout.y, dout.z, dout.w};
#pragma unroll
      for (int w = 0; w < 4; w++) {
        const float2 a = unpack<T>(x[w]), b = unpack<T>(y[w]);
        delta += a.x * b.x + a.y * b.y;
      }
    }
#pragma unroll
    for (int lanes = 1; lanes < kRowThreads; lanes *= 2) delta += exchange_lanes(delta, lanes);
  }
  if (sum_thread == 0) {
    tile.lse()[sum_row] = row_lse;
    tile.delta()[sum_row] = delta - row_dlse;
  }
}

// Writes dprefix_k and dprefix_v of each split and adds to dq. grid: (splits, key heads, prefixes)
template <class T, int kHeadDim, bool kOptions>
PEFTKERN_KERNEL(BackwardShape<kHeadDim>::kThreads, 1)
prefix_backward(PEFTKERN_PARAMS PrefixBackward args) {
  using Shape = BackwardShape<kHeadDim>;
  PEFTKERN_SHARED(shared);
  const BackwardTile<T, kHeadDim> tile(shared);
  const Call& call = args.call;
  const int kv_head = blockIdx.y, prefix = blockIdx.z, split = blockIdx.x;
  const int prefix_len = call.prefix_lens.pointer ? call.prefix_lens[prefix] : call.prefix_len;

  for (int first_key = 0; first_key < call.prefix_len; first_key += Shape::kKeys) {
    const int length = max(0, min(Shape::kKeys, prefix_len - first_key));
    Sums<Shape::kSumGroups> dk, dv;
    TileWalk<Shape::kRows> walk = walk_split<Shape::kRows>(call, prefix, length > 0);
    const auto load_queries = [&] {
      load_row_tiles(tile, args, walk.sequence, kv_head, walk.first_row());
      copy_async_commit();
    };
    // FAULT: next-keys-loaded-early
    if (first_key > 0) __syncthreads();  // dq of the previous tile may still read the keys
    if (walk.more()) {
      load_prefix_tiles(tile, args, prefix, kv_head, first_key, length);
      load_queries();
    }

    while (walk.more()) {
      const Sequence sequence = walk.sequence;
      const int first_row = walk.first_row();
      load_statistics<T, kHeadDim, kOptions>(tile, args, sequence, kv_head, first_row);
      __syncthreads();
      tile.weights([&](float product, int i, int key) -> Score {
        if (!kOptions) return {key < length ? score_of<false>(call, product).value : -INFINITY, 1.f};
        return prefix_score(call, row_at(call, sequence, kv_head, first_row + i), first_key + key, prefix_len, product);
      });
      __syncthreads();  // FAULT: p-and-ds-read-early
      tile.add_keys_and_values(dk, dv);
      walk.advance();
      __syncthreads();                  // FAULT: next-rows-loaded-early
      if (walk.more()) load_queries();  // while dq is computed
      if (args.dq.pointer) {
        Sums<Shape::kQueryGroups> dq;
        tile.add_queries(dq);
        tile.store_queries(dq, call.scale, true, call.head_dim, [&](int i) -> T* {
          const Row row = row_at(call, sequence, kv_head, first_row + i);
          return row.valid ? args.dq.at<T>(row.batch, row.head, row.row) : nullptr;
        });
      }
    }

    const int64_t matrix = ((int64_t)split * call.bank_size + prefix) * call.num_kv_heads + kv_head;
    const auto store = [&](const Sums<Shape::kSumGroups>& sums, float scale, float* matrices) {
      float* const target = matrices + (matrix * call.prefix_len + first_key) * call.head_dim;
      tile.store_sums(sums, scale, call.head_dim, [&](int key, int column, float2 pair) {
        if (first_key + key < call.prefix_len)
          *reinterpret_cast<float2*>(target + (int64_t)key * call.head_dim + column) = pair;
      });
    };
    if (args.dprefix_k) store(dk, call.scale, args.dprefix_k);
    if (args.dprefix_v) store(dv, 1.f, args.dprefix_v);
  }
}

struct PrefixBiasBackward {
  Call call;
  Matrices q, prefix_k, prefix_v, dout;
  const float *lse, *delta;  // [B, Hq, S]
  float* dprefix_bias;       // [splits, bank, elements]; the first Hq * P elements count
  int64_t elements;
};

// dprefix_bias[h, p] = sum of ds over the rows of head h, before the softcap's derivative and before rounding. ds of a
// tile passes through shared memory in fp32. grid: (splits, key heads, prefixes)
template <class T, int kHeadDim>
PEFTKERN_KERNEL(BackwardShape<kHeadDim>::kThreads, 1)
prefix_bias_backward(PEFTKERN_PARAMS PrefixBiasBackward args) {
  using Shape = BackwardShape<kHeadDim>;
  PEFTKERN_SHARED(shared);
  const BackwardTile<T, kHeadDim> tile(shared);
  const Call& call = args.call;
  const int kv_head = blockIdx.y, prefix = blockIdx.z, split = blockIdx.x;
  const int prefix_len = call.prefix_lens.pointer ? call.prefix_lens[prefix] : call.prefix_len;
  float* const dscores =
      reinterpret_cast<float*>(shared + Shape::kWeightsAt);  // [rows, keys], in the memory of p and ds
  float* const sums = args.dprefix_bias + ((int64_t)split * call.bank_size + prefix) * args.elements;
  if (kv_head == 0)
    for (int64_t i = (int64_t)call.num_kv_heads * call.group * call.prefix_len + threadIdx.x; i < args.elements;
         i += Shape::kThreads)
      sums[i] = 0.f;

  for (int first_key = 0; first_key < call.prefix_len; first_key += Shape::kKeys) {
    const int length = max(0, min(Shape::kKeys, prefix_len - first_key));
    // A thread owns one key and every (kThreads / kKeys)-th head of the group.
    const int own_key = threadIdx.x % Shape::kKeys;
    const auto each_sum = [&](auto take) {
      if (first_key + own_key >= call.prefix_len) return;
      for (int head = threadIdx.x / Shape::kKeys; head < call.group; head += Shape::kThreads / Shape::kKeys)
        take(head, sums[(int64_t)(kv_head * call.group + head) * call.prefix_len + first_key + own_key]);
    };
    each_sum([](int, float& sum) { sum = 0.f; });
    TileWalk<Shape::kRows> walk = walk_split<Shape::kRows>(call, prefix, length > 0);
    if (walk.more()) load_prefix_tiles(tile, args, prefix, kv_head, first_key, length);
    for (; walk.more(); walk.advance()) {
      const int first_row = walk.first_row();
      const auto row_of = [&](int i) { return row_at(call, walk.sequence, kv_head, first_row + i); };
      load_row_tiles(tile, args, walk.sequence, kv_head, first_row);
      copy_async_commit();
      if (threadIdx.x < Shape::kRows) {
        const Row row = row_of(threadIdx.x);
        const float lse = row.valid ? args.lse[index_of(call, row)] * kLog2e : -INFINITY;
        tile.lse()[threadIdx.x] = lse == -INFINITY ? INFINITY : lse;  // the weights of a row without keys are 0
        tile.delta()[threadIdx.x] = row.valid ? args.delta[index_of(call, row)] : 0.f;
      }
      copy_async_wait<0>();
      __syncthreads();
      tile.each_weight([&](float product, int i,
                           int key) { return prefix_score(call, row_of(i), first_key + key, prefix_len, product); },
                       [&](int, int i, int key, float p, float dp) {
                         dscores[i * Shape::kKeys + key] = p * (dp - tile.delta()[i]);
                       });
      __syncthreads();  // FAULT: ds-summed-early
      each_sum([&](int head, float& sum) {
        // FAULT: rows-of-another-head
        for (int i = (head + call.group - first_row % call.group) % call.group; i < Shape::kRows; i += call.group)
          sum += dscores[i * Shape::kKeys + own_key];
      });
      __syncthreads();
    }
  }
}

}  // namespace peftkern
#endif  // PEFTKERN_CUDA_PREFIX_BACKWARD_H_
