// SPDX-License-Identifier: Apache-2.0
// Attention over a prefix, merged with the result of an attention over the sequence. The merge works in place if both
// have the same memory.
//
// A block keeps one prefix, or a chunk of a long one, in shared memory and walks a fixed split of the rows of a key
// head. Each warp owns 16 rows of a tile of 64. q and out move between global memory and registers in 16-byte accesses,
// so shared memory holds only keys and values, and warps wait for each other only when the prefix changes.
#ifndef PEFTKERN_CUDA_PREFIX_FORWARD_H_
#define PEFTKERN_CUDA_PREFIX_FORWARD_H_

#include "common.cuh"

namespace peftkern {

struct PrefixForward {
  Call call;
  Matrices q, prefix_k, prefix_v, out;
  Matrices part_out, part_lse;  // null: no sequence. part_lse.row is the stride of its last dimension
  float* lse;                   // [B, Hq, S]
  const float* sinks;
  int resident;  // rows of the prefix that fit in shared memory, a multiple of 16
};

template <int kHeadDim>
struct PrefixForwardShape {
  static constexpr int kThreads = 128, kRows = 64, kKeys = kHeadDim > 128 ? 16 : 64;
  static constexpr int kColumns = kHeadDim > 128 ? 64 : kHeadDim;  // of out at a time, to fit in registers
  static constexpr int kBlocks = 2;                                // per multiprocessor
  static constexpr int kMaxResident = 16384 / kHeadDim / 16 * 16;
};

// One long function on purpose: with its loads, merge and stores in functions of their own, ptxas spills registers at
// head dim 96 on sm_80 or sm_90. grid: (blocks, key heads)
template <class T, int kHeadDim, bool kOptions>
PEFTKERN_KERNEL(PrefixForwardShape<kHeadDim>::kThreads, PrefixForwardShape<kHeadDim>::kBlocks)
prefix_forward(PEFTKERN_PARAMS PrefixForward args) {
  using Shape = PrefixForwardShape<kHeadDim>;
  using Layout = Tile<kHeadDim>;
  constexpr int kColumns = Shape::kColumns, kGroups = kHeadDim / 32, kColumnGroups = kColumns / 32;
  PEFTKERN_SHARED(shared);
  const Call& call = args.call;
  const uint32_t keys = shared_address(shared), values = keys + Layout::bytes(args.resident);
  const int kv_head = blockIdx.y, quad_lane = threadIdx.x % 4;
  const int first =
      threadIdx.x / kWarp * 16 + threadIdx.x / 4 % 8;  // this lane's rows of a tile are first and first + 8
  int loaded_prefix = -1, loaded_key = -1;

  const int count = row_tiles<Shape::kRows>(call).count();
  const auto split = [&](int i) { return (int)((int64_t)count * i / gridDim.x); };  // a fixed share of the tiles
  for (TileWalk<Shape::kRows> walk(call, -1, split(blockIdx.x), split(blockIdx.x + 1), 1); walk.more();
       walk.advance()) {
    const Sequence sequence = walk.sequence;
    Row row[2];
    float part_lse[2];
    uint32_t q[kHeadDim / 16][4];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      row[r] = row_at(call, sequence, kv_head, walk.first_row() + first + 8 * r);
      part_lse[r] = -INFINITY;
      if (args.part_lse.pointer != nullptr && row[r].valid && quad_lane == 0)
        part_lse[r] = *args.part_lse.at<float>(row[r].batch, row[r].head, row[r].row) * kLog2e;
      const T* from = args.q.at<T>(row[r].batch, row[r].head, row[r].row);
#pragma unroll
      for (int j = 0; j < kGroups; j++) {
        const int chunk = 4 * j + quad_lane;
        uint4 x = make_uint4(0, 0, 0, 0);
        if (row[r].valid && chunk * 8 < call.head_dim) x = *reinterpret_cast<const uint4*>(from + chunk * 8);
        q[2 * j][r] = x.x, q[2 * j][2 + r] = x.y, q[2 * j + 1][r] = x.z, q[2 * j + 1][2 + r] = x.w;
      }
    }

    for (int column = 0; column < kHeadDim; column += kColumns) {
      uint4 out[2][kColumnGroups];
#pragma unroll
      for (int r = 0; r < 2; r++)
#pragma unroll
        for (int j = 0; j < kColumnGroups; j++) {
          const int at = column + (4 * j + quad_lane) * 8;
          out[r][j] = make_uint4(0, 0, 0, 0);
          if (args.part_out.pointer != nullptr && row[r].valid && at < call.head_dim)
            out[r][j] =
                *reinterpret_cast<const uint4*>(args.part_out.at<T>(row[r].batch, row[r].head, row[r].row) + at);
        }
      if (column == 0) {
#pragma unroll
        for (int j = 0; j < kGroups; j++)
#pragma unroll
          for (int r = 0; r < 2; r++) {
            uint32_t x[4] = {q[2 * j][r], q[2 * j][2 + r], q[2 * j + 1][r], q[2 * j + 1][2 + r]};
            transpose_quad(x);
            q[2 * j][r] = x[0], q[2 * j][2 + r] = x[1], q[2 * j + 1][r] = x[2], q[2 * j + 1][2 + r] = x[3];
          }
      }

      RowState<kColumns> state;
      for (int first_key = 0; first_key < sequence.prefix_len; first_key += args.resident) {
        const int length = min(args.resident, sequence.prefix_len - first_key);
        if (loaded_prefix != sequence.prefix || loaded_key != first_key) {
          loaded_prefix = sequence.prefix, loaded_key = first_key;
          // FAULT: prefix-replaced-early
          __syncthreads();  // other warps may still read the previous keys
          const int rows = (length + 15) / 16 * 16;
          for (int v = 0; v < 2; v++) {
            const Matrices& matrices = v ? args.prefix_v : args.prefix_k;
            load_rows<T, kHeadDim, Shape::kThreads>(
                v ? values : keys, rows, call.head_dim, args.q.pointer, [&](int i) -> const T* {
                  return i < length ? matrices.at<T>(sequence.prefix, kv_head, first_key + i) : nullptr;
                });
          }
          copy_async_commit();
          copy_async_wait<0>();  // FAULT: prefix-not-awaited
          __syncthreads();       // FAULT: prefix-read-early
        }
        for (int block = 0; block < length; block += Shape::kKeys) {
          attend<T, kHeadDim, Shape::kKeys, kColumns>(
              state, keys + Layout::bytes(block), values + Layout::bytes(block), min(Shape::kKeys, length - block),
              column,
              [&](int i, uint32_t (&a)[4]) {
#pragma unroll
                for (int n = 0; n < 4; n++) a[n] = q[i][n];
              },
              [&](float product, int key, int r) {
                const bool visible =
                    sees_prefix<kOptions>(call, row[r].position, first_key + block + key, sequence.prefix_len) &&
                    block + key < length;
                if (!visible) return -INFINITY;
                return score_of<kOptions>(call, product).value +
                       prefix_bias_of<kOptions>(call, row[r].head, first_key + block + key);
              });
        }
      }

      // out = (exp(part_lse) part_out + exp(m) acc) / (exp(part_lse) + exp(m) sum + exp(sink)), with the largest
      // exponent factored out. Gated: out = exp(part_lse) part_out / (exp(part_lse) + exp(sink)) + gate acc / sum.
      float keep[2], add[2];
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float seq = from_lane(part_lse[r], threadIdx.x - quad_lane);
        if (isinf(seq)) seq = -INFINITY;  // some attention kernels return +inf for a row without keys
        const float sink = args.sinks != nullptr && row[r].valid ? args.sinks[row[r].head] * kLog2e : -INFINITY;
        const bool gated = kOptions && call.gate;
        const float m = fmaxf(fmaxf(gated ? -INFINITY : state.m[r], seq), sink), sum = sum_quad(state.sum[r]);
        const float base = m == -INFINITY ? 0.f : m;
        keep[r] = exp2_approx(seq - base);
        add[r] = gated ? 0.f : exp2_approx(state.m[r] - base);
        const float total = keep[r] + add[r] * sum + sink_weight(sink, base);
        const float inverse = m == -INFINITY ? 0.f : 1.f / total;
        keep[r] *= inverse;
        add[r] *= inverse;
        if (gated && sum > 0.f) add[r] = call.gate[row[r].head] / sum;
        if (row[r].valid && quad_lane == 0 && column + kColumns == kHeadDim)
          args.lse[index_of(call, row[r])] = m == -INFINITY ? -INFINITY : (base + log2f(total)) * kLn2;
      }
#pragma unroll
      for (int j = 0; j < kColumnGroups; j++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
          uint32_t x[4] = {out[r][j].x, out[r][j].y, out[r][j].z, out[r][j].w};
          transpose_quad(x);
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const float2 seq = keep[r] > 0.f ? unpack<T>(x[i]) : make_float2(0.f, 0.f);
            const float* acc = state.acc[4 * j + i] + 2 * r;
            x[i] = pack<T>(seq.x * keep[r] + acc[0] * add[r], seq.y * keep[r] + acc[1] * add[r]);
          }
          transpose_quad(x);
          const int at = column + (4 * j + quad_lane) * 8;
          if (row[r].valid && at < call.head_dim)  // FAULT: store-beyond-rows
            *reinterpret_cast<uint4*>(args.out.at<T>(row[r].batch, row[r].head, row[r].row) + at) =
                make_uint4(x[0], x[1], x[2], x[3]);
        }
    }
  }
}

}  // namespace peftkern
#endif  // PEFTKERN_CUDA_PREFIX_FORWARD_H_
