// SPDX-License-Identifier: Apache-2.0
// Gradients of the part of an attention that its prefix contributes, given the merged out and lse.
//
// One pass over the rows: delta, p and ds of a tile, dq added in place, dprefix_k and dprefix_v summed in registers over a
// fixed share of the rows. The shares are then added in order, so the sums are the same from run to run.
#ifndef PEFTKERN_CUDA_PREFIX_BACKWARD_H_
#define PEFTKERN_CUDA_PREFIX_BACKWARD_H_

#include "backward.cuh"

namespace peftkern {

struct PrefixBackward {
  Call call;
  Matrices q, prefix_k, prefix_v, out, dout;
  Matrices dq;           // added to; null: nobody needs it
  const float* lse;      // [B, Hq, S]
  Matrices dlse;         // null: there is none. `row` is the stride of its last dimension
  float *dprefix_k, *dprefix_v;  // [share, bank, Hkv, P, D]; null: nobody needs it
  int first_key;                 // of the part of the prefix that this launch covers
};

// grid: (shares, key heads, prefixes)
template <class T, int kHeadDim, bool kOptions>
PEFTKERN_KERNEL(BackwardShape<kHeadDim>::kThreads, 1) prefix_backward(PEFTKERN_PARAMS PrefixBackward args) {
  using Shape = BackwardShape<kHeadDim>;
  using Layout = Tile<kHeadDim>;
  constexpr int kRowThreads = Shape::kThreads / Shape::kRows, kRowChunks = Layout::kChunks / kRowThreads;
  PEFTKERN_SHARED(shared);
  const BackwardTile<T, kHeadDim> tile(shared);
  const Call& call = args.call;
  const int kv_head = blockIdx.y, prefix = blockIdx.z, share = blockIdx.x;
  const int prefix_len = call.prefix_lens.pointer ? call.prefix_lens[prefix] : call.prefix_len;
  const int length = max(0, min(Shape::kKeys, prefix_len - args.first_key));

  Sums<Shape::kSumGroups> dk, dv;
  TileWalk<Shape::kRows> walk(call, call.prefix_ids.pointer ? prefix : -1, share, length > 0 ? gridDim.x : 0x7fffffff);
  const auto load_queries = [&] {
    for (int d = 0; d < 2; d++) {
      const Matrices& matrices = d ? args.dout : args.q;
      tile.load(d ? Shape::kDoutAt : Shape::kQueriesAt, Shape::kRows, call.head_dim, args.q.pointer, [&](int i) -> const T* {
        const Row row = row_at(call, walk.sequence, kv_head, walk.first_row() + i);
        return row.valid ? matrices.at<T>(row.batch, row.head, row.row) : nullptr;
      });
    }
    copy_async_commit();
  };
  if (walk.more()) {
    for (int v = 0; v < 2; v++) {
      const Matrices& matrices = v ? args.prefix_v : args.prefix_k;
      tile.load(v ? Shape::kValuesAt : Shape::kKeysAt, Shape::kKeys, call.head_dim, args.q.pointer, [&](int i) -> const T* {
        return i < length ? matrices.at<T>(prefix, kv_head, args.first_key + i) : nullptr;
      });
    }
    load_queries();
  }

  while (walk.more()) {
    const Sequence sequence = walk.sequence;
    const int first_row = walk.first_row();
    {
      // delta = rowsum(dout * out) - dlse; kRowThreads threads share a row
      const int i = threadIdx.x / kRowThreads, part = threadIdx.x % kRowThreads;
      const Row row = row_at(call, sequence, kv_head, first_row + i);
      const T* from = args.out.at<T>(row.batch, row.head, row.row);
      uint4 out[kRowChunks];
#pragma unroll
      for (int c = 0; c < kRowChunks; c++) {
        const int column = (part + c * kRowThreads) * 8;
        out[c] = make_uint4(0, 0, 0, 0);
        if (row.valid && column < call.head_dim) out[c] = *reinterpret_cast<const uint4*>(from + column);
      }
      float row_lse = INFINITY, row_dlse = 0.f;
      if (row.valid && part == 0) {
        row_lse = args.lse[index_of(call, row)] * kLog2e;
        if (row_lse == -INFINITY) row_lse = INFINITY;  // a row that sees nothing weighs nothing
        if (args.dlse.pointer) row_dlse = *args.dlse.at<float>(row.batch, row.head, row.row);
      }
      copy_async_wait<0>();
      __syncthreads();
      float delta = 0.f;
#pragma unroll
      for (int c = 0; c < kRowChunks; c++) {
        const uint4 dout = *reinterpret_cast<const uint4*>(shared + Shape::kDoutAt + Layout::offset(i, part + c * kRowThreads));
        const uint32_t x[4] = {out[c].x, out[c].y, out[c].z, out[c].w}, y[4] = {dout.x, dout.y, dout.z, dout.w};
#pragma unroll
        for (int w = 0; w < 4; w++) {
          const float2 a = unpack<T>(x[w]), b = unpack<T>(y[w]);
          delta += a.x * b.x + a.y * b.y;
        }
      }
#pragma unroll
      for (int lanes = 1; lanes < kRowThreads; lanes *= 2) delta += exchange_lanes(delta, lanes);
      if (part == 0) {
        tile.lse()[i] = row_lse;
        tile.delta()[i] = delta - row_dlse;
      }
    }
    __syncthreads();
    tile.weights([&](float product, int i, int key) -> Score {
      bool visible = key < length;
      if (kOptions)
        visible &= sees_prefix<true>(call, row_at(call, sequence, kv_head, first_row + i).place, args.first_key + key, prefix_len);
      const Score score = score_of<kOptions>(call, product);
      return {visible ? score.value : -INFINITY, score.slope};
    });
    __syncthreads();
    tile.add_keys_and_values(dk, dv);
    walk.advance();
    __syncthreads();
    if (walk.more()) load_queries();  // while dq is under way
    if (args.dq.pointer) {
      Sums<Shape::kQueryGroups> dq;
      tile.add_queries(dq);
      tile.store_queries(dq, call.scale, true, call.head_dim, [&](int i) -> T* {
        const Row row = row_at(call, sequence, kv_head, first_row + i);
        return row.valid ? args.dq.at<T>(row.batch, row.head, row.row) : nullptr;
      });
    }
  }

  const int64_t matrix = ((int64_t)share * call.bank_size + prefix) * call.num_kv_heads + kv_head;
  const auto store = [&](const Sums<Shape::kSumGroups>& sums, float scale, float* matrices) {
    float* const target = matrices + (matrix * call.prefix_len + args.first_key) * call.head_dim;
    tile.store_sums(sums, scale, call.head_dim, [&](int key, int column, float2 pair) {
      if (args.first_key + key < call.prefix_len)
        *reinterpret_cast<float2*>(target + (int64_t)key * call.head_dim + column) = pair;
    });
  };
  if (args.dprefix_k) store(dk, call.scale, args.dprefix_k);
  if (args.dprefix_v) store(dv, 1.f, args.dprefix_v);
}

struct AddShares {
  const float* shares;  // [2, shares, elements]
  float* sums[2];         // null: nobody needs it
  int64_t elements;  // a multiple of 4
  int num_shares;
};

// sums[i] = shares[i, 0] + shares[i, 1] + ..., in order. grid: (blocks, 2)
PEFTKERN_KERNEL(256, 1) inline add_shares(PEFTKERN_PARAMS AddShares args) {
  const float* from = args.shares + blockIdx.y * args.num_shares * args.elements;
  if (args.sums[blockIdx.y] == nullptr) return;
  for (int64_t i = ((int64_t)blockIdx.x * 256 + threadIdx.x) * 4; i < args.elements; i += (int64_t)gridDim.x * 1024) {
    float4 sum = *reinterpret_cast<const float4*>(from + i);
    for (int share = 1; share < args.num_shares; share++) {
      const float4 x = *reinterpret_cast<const float4*>(from + share * args.elements + i);
      sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
    }
    *reinterpret_cast<float4*>(args.sums[blockIdx.y] + i) = sum;
  }
}

}  // namespace peftkern
#endif  // PEFTKERN_CUDA_PREFIX_BACKWARD_H_
