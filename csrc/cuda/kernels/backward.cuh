// SPDX-License-Identifier: Apache-2.0
// One tile of the backward pass: rows of q and dout against keys and values, all in shared memory.
//
//     p = exp2(score - lse)      ds = p (dout v' - delta) slope
//     dv += p' dout              dk += ds' q              dq += ds k
//
// delta = rowsum(out * dout) - dlse. The eight warps of a block divide the three products differently, so p and ds pass
// through shared memory.
#ifndef PEFTKERN_CUDA_BACKWARD_H_
#define PEFTKERN_CUDA_BACKWARD_H_

#include "common.cuh"

namespace peftkern {

template <int kHeadDim>
struct BackwardShape {
  static constexpr int kThreads = 256, kWarps = 8;
  static constexpr int kRows = kHeadDim > 128 ? 32 : 64, kKeys = kHeadDim > 128 ? 32 : 64;
  static constexpr int kGroups = kHeadDim / 32;  // of 32 columns
  // Scores and dq: kRowWarps x kSideWarps warps. Sums over rows: kKeyWarps x kColumnWarps warps.
  static constexpr int kRowWarps = kRows / 16, kSideWarps = kWarps / kRowWarps;
  static constexpr int kKeyWarps = kKeys / 16, kColumnWarps = kWarps / kKeyWarps;
  static constexpr int kWarpKeys = kKeys / kSideWarps;
  static constexpr int kQueryGroups = (kGroups + kSideWarps - 1) / kSideWarps;
  static constexpr int kSumGroups = (kGroups + kColumnWarps - 1) / kColumnWarps;

  // Offsets in shared memory, in bytes.
  static constexpr int kKeysAt = 0, kValuesAt = kKeys * kHeadDim * 2, kQueriesAt = 2 * kValuesAt;
  static constexpr int kDoutAt = kQueriesAt + kRows * kHeadDim * 2, kWeightsAt = kDoutAt + kRows * kHeadDim * 2;
  static constexpr int kDscoresAt = kWeightsAt + kRows * kKeys * 2, kLseAt = kDscoresAt + kRows * kKeys * 2;
  static constexpr int kDeltaAt = kLseAt + kRows * 4, kSharedBytes = kDeltaAt + kRows * 4;
};

// The sums of a warp: four accumulators of 16 x 8 for each of its groups of 32 columns.
template <int kCount>
struct Sums {
  float value[kCount][4][4];

  PEFTKERN_DEVICE Sums() {
#pragma unroll
    for (int i = 0; i < kCount * 16; i++) value[i / 16][i / 4 % 4][i % 4] = 0.f;
  }
};

template <class T, int kHeadDim>
struct BackwardTile {
  using Shape = BackwardShape<kHeadDim>;
  using Layout = Tile<kHeadDim>;
  using Square = Tile<Shape::kKeys>;

  unsigned char* shared;
  uint32_t base;
  int lane, warp;

  explicit PEFTKERN_DEVICE BackwardTile(unsigned char* memory)
      : shared(memory), base(shared_address(memory)), lane(threadIdx.x % kWarp), warp(threadIdx.x / kWarp) {}

  PEFTKERN_DEVICE float* lse() const { return reinterpret_cast<float*>(shared + Shape::kLseAt); }
  PEFTKERN_DEVICE float* delta() const { return reinterpret_cast<float*>(shared + Shape::kDeltaAt); }

  // The rows and the groups of columns of this warp: first for scores and dq, then for sums over rows.
  PEFTKERN_DEVICE int first_row() const { return warp % Shape::kRowWarps * 16; }
  PEFTKERN_DEVICE int query_group(int i) const { return warp / Shape::kRowWarps + Shape::kSideWarps * i; }
  PEFTKERN_DEVICE int first_key() const { return warp % Shape::kKeyWarps * 16; }
  PEFTKERN_DEVICE int sum_group(int i) const { return warp / Shape::kKeyWarps + Shape::kColumnWarps * i; }

  template <class Source>
  PEFTKERN_DEVICE void load(int at, int rows, int head_dim, const void* any, Source source) const {
    load_rows<T, kHeadDim, Shape::kThreads>(base + at, rows, head_dim, any, source);
  }

  // The first of this warp's keys in the scores.
  PEFTKERN_DEVICE int first_score_key() const { return warp / Shape::kRowWarps * Shape::kWarpKeys; }

  // q k' and dout v' of this warp's rows and keys.
  template <int kTiles>
  PEFTKERN_DEVICE void products(float (&s)[kTiles][4], float (&dp)[kTiles][4]) const {
    const int key0 = first_score_key(), row0 = first_row();
    const uint32_t query_at = base + Layout::offset(row0 + lane % 16, lane / 16);
    const uint32_t key_at = base + Layout::offset(key0 + lane % 8, lane / 8);
#pragma unroll
    for (int n = 0; n < kTiles; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) s[n][i] = dp[n][i] = 0.f;
#pragma unroll
    for (int k = 0; k < kHeadDim / 32; k++) {
      uint32_t q[2][4], dout[2][4], b[4];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const uint32_t at = Layout::along(query_at, 4 * k + 2 * i);
        load_matrices(q[i], at + Shape::kQueriesAt);
        load_matrices(dout[i], at + Shape::kDoutAt);
      }
#pragma unroll
      for (int n = 0; n < kTiles; n++) {
        const uint32_t at = Layout::along(key_at, 4 * k) + Layout::bytes(8 * n);
        load_matrices(b, at + Shape::kKeysAt);
        mma<T>(s[n], q[0], b[0], b[1]);
        mma<T>(s[n], q[1], b[2], b[3]);
        load_matrices(b, at + Shape::kValuesAt);
        mma<T>(dp[n], dout[0], b[0], b[1]);
        mma<T>(dp[n], dout[1], b[2], b[3]);
      }
    }
  }

  // Writes p and ds of all rows and keys to shared memory. `score(product, row, key)` is -inf where a row does not see
  // a key.
  template <class ScoreOf>
  PEFTKERN_DEVICE void weights(ScoreOf score) const {
    constexpr int kTiles = Shape::kWarpKeys / 8;
    const int key0 = first_score_key(), row0 = first_row();
    float s[kTiles][4], dp[kTiles][4];
    products(s, dp);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = row0 + lane / 4 + 8 * r;
      const float row_lse = lse()[row], row_delta = delta()[row];
#pragma unroll
      for (int n = 0; n < kTiles; n++) {
        const int key = key0 + n * 8 + lane % 4 * 2;
        float p[2], ds[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const Score x = score(s[n][2 * r + i], row, key + i);
          p[i] = exp2_approx(x.value - row_lse) * x.weight;
          ds[i] = p[i] * (dp[n][2 * r + i] - row_delta) * x.slope;
        }
        const uint32_t at = Square::offset(row, key / 8) + key % 8 * 2;
        *reinterpret_cast<uint32_t*>(shared + Shape::kWeightsAt + at) = pack<T>(p[0], p[1]);
        *reinterpret_cast<uint32_t*>(shared + Shape::kDscoresAt + at) = pack<T>(ds[0], ds[1]);
      }
    }
  }

  // Calls take(r, row, key, p, dp) for this lane's rows (row g + 8 r of the warp) and keys. score() is as in weights().
  template <class ScoreOf, class Take>
  PEFTKERN_DEVICE void each_weight(ScoreOf score, Take take) const {
    constexpr int kTiles = Shape::kWarpKeys / 8;
    float s[kTiles][4], dp[kTiles][4];
    products(s, dp);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = first_row() + lane / 4 + 8 * r;
      const float row_lse = lse()[row];
#pragma unroll
      for (int n = 0; n < kTiles; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int key = first_score_key() + n * 8 + lane % 4 * 2 + i;
          const Score x = score(s[n][2 * r + i], row, key);
          take(r, row, key, exp2_approx(x.value - row_lse) * x.weight, dp[n][2 * r + i]);
        }
    }
  }

  // target += a' b. a [rows, keys] is p or ds, b [rows, columns] is dout or q.
  PEFTKERN_DEVICE void add_rows(Sums<Shape::kSumGroups>& target, int a_at, int b_at) const {
#pragma unroll
    for (int k = 0; k < Shape::kRows / 16; k++) {
      const uint32_t row_at = base + b_at + Layout::offset(lane % 16, lane / 16) + Layout::bytes(16 * k);
      uint32_t a[4], b[4];
      load_matrices_transposed(
          a, base + a_at + Square::offset(16 * k + lane / 16 * 8 + lane % 8, first_key() / 8 + lane / 8 % 2));
#pragma unroll
      for (int i = 0; i < Shape::kSumGroups; i++) {
        const int group = sum_group(i);
        if (Shape::kGroups % Shape::kColumnWarps && group >= Shape::kGroups) continue;
#pragma unroll
        for (int n = 0; n < 2; n++) {
          load_matrices_transposed(b, Layout::along(row_at, 4 * group + 2 * n));
          mma<T>(target.value[i][2 * n], a, b[0], b[1]);
          mma<T>(target.value[i][2 * n + 1], a, b[2], b[3]);
        }
      }
    }
  }
  PEFTKERN_DEVICE void add_keys_and_values(Sums<Shape::kSumGroups>& dk, Sums<Shape::kSumGroups>& dv) const {
    add_rows(dv, Shape::kWeightsAt, Shape::kDoutAt);
    add_rows(dk, Shape::kDscoresAt, Shape::kQueriesAt);
  }

  // dq += ds k
  PEFTKERN_DEVICE void add_queries(Sums<Shape::kQueryGroups>& dq) const {
#pragma unroll
    for (int k = 0; k < Shape::kKeys / 16; k++) {
      const uint32_t key_at = base + Shape::kKeysAt + Layout::offset(lane % 16, lane / 16) + Layout::bytes(16 * k);
      uint32_t a[4], b[4];
      load_matrices(a, base + Shape::kDscoresAt + Square::offset(first_row() + lane % 16, 2 * k + lane / 16));
#pragma unroll
      for (int i = 0; i < Shape::kQueryGroups; i++) {
        const int group = query_group(i);
        if (Shape::kGroups % Shape::kSideWarps && group >= Shape::kGroups) continue;
#pragma unroll
        for (int n = 0; n < 2; n++) {
          load_matrices_transposed(b, Layout::along(key_at, 4 * group + 2 * n));
          mma<T>(dq.value[i][2 * n], a, b[0], b[1]);
          mma<T>(dq.value[i][2 * n + 1], a, b[2], b[3]);
        }
      }
    }
  }

  // Writes scale * dq to global memory, or adds it if `add`. `address(i)` is the address of row i, or null to skip it.
  template <class Address>
  PEFTKERN_DEVICE void store_queries(const Sums<Shape::kQueryGroups>& dq, float scale, bool add, int head_dim,
                                     Address address) const {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      T* const row = address(first_row() + lane / 4 + 8 * r);
#pragma unroll
      for (int i = 0; i < Shape::kQueryGroups; i++) {
        const int group = query_group(i);
        if (Shape::kGroups % Shape::kSideWarps && group >= Shape::kGroups) continue;
        const int column = (4 * group + lane % 4) * 8;
        uint4 old = make_uint4(0, 0, 0, 0);
        const bool inside = row != nullptr && column < head_dim;
        if (add && inside) old = *reinterpret_cast<const uint4*>(row + column);
        uint32_t x[4] = {old.x, old.y, old.z, old.w};
        transpose_quad(x);
#pragma unroll
        for (int n = 0; n < 4; n++) {
          const float2 sum = unpack<T>(x[n]);
          x[n] = pack<T>(sum.x + scale * dq.value[i][n][2 * r], sum.y + scale * dq.value[i][n][2 * r + 1]);
        }
        transpose_quad(x);
        if (inside) *reinterpret_cast<uint4*>(row + column) = make_uint4(x[0], x[1], x[2], x[3]);
      }
    }
  }

  // Calls store(key, column, pair) with scale * sums for each pair of columns.
  template <class Store>
  PEFTKERN_DEVICE void store_sums(const Sums<Shape::kSumGroups>& sums, float scale, int head_dim, Store store) const {
#pragma unroll
    for (int i = 0; i < Shape::kSumGroups; i++)
#pragma unroll
      for (int n = 0; n < 4; n++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const int column = sum_group(i) * 32 + n * 8 + lane % 4 * 2;
          if (column < head_dim)
            store(first_key() + lane / 4 + 8 * r, column,
                  make_float2(scale * sums.value[i][n][2 * r], scale * sums.value[i][n][2 * r + 1]));
        }
  }
};

// Loads q and dout of the rows of a tile from `first_row` on.
template <class T, int kHeadDim, class Args>
PEFTKERN_DEVICE void load_row_tiles(const BackwardTile<T, kHeadDim>& tile, const Args& args, const Sequence& sequence,
                                    int kv_head, int first_row) {
  using Shape = BackwardShape<kHeadDim>;
  for (int d = 0; d < 2; d++) {
    const Matrices& matrices = d ? args.dout : args.q;
    tile.load(d ? Shape::kDoutAt : Shape::kQueriesAt, Shape::kRows, args.call.head_dim, args.q.pointer,
              [&](int i) -> const T* {
                const Row row = row_at(args.call, sequence, kv_head, first_row + i);
                return row.valid ? matrices.at<T>(row.batch, row.head, row.row) : nullptr;
              });
  }
}

// Loads `length` keys and values of a prefix from `first_key` on, and zeros up to a whole tile.
template <class T, int kHeadDim, class Args>
PEFTKERN_DEVICE void load_prefix_tiles(const BackwardTile<T, kHeadDim>& tile, const Args& args, int prefix, int kv_head,
                                       int first_key, int length) {
  using Shape = BackwardShape<kHeadDim>;
  for (int v = 0; v < 2; v++) {
    const Matrices& matrices = v ? args.prefix_v : args.prefix_k;
    tile.load(v ? Shape::kValuesAt : Shape::kKeysAt, Shape::kKeys, args.call.head_dim, args.q.pointer,
              [&](int i) -> const T* { return i < length ? matrices.at<T>(prefix, kv_head, first_key + i) : nullptr; });
  }
}

}  // namespace peftkern
#endif  // PEFTKERN_CUDA_BACKWARD_H_
