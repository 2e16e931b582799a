// SPDX-License-Identifier: Apache-2.0
// C = A B for bf16 pairs in AMX tiles. A [M][K] and B [K][N] consist of words that hold pairs along K; C is fp32. Tiles
// are read and written whole, so every buffer is padded: A to 32 rows, K to 16 words, N to 32. The padding along K is
// zero in one factor and finite in the other.
#ifndef PEFTKERN_CPU_LAYOUTS_AMX_GEMM_H_
#define PEFTKERN_CPU_LAYOUTS_AMX_GEMM_H_

#include <type_traits>

#include "../gemm.h"
#include PEFTKERN_TILE_INSTRUCTIONS

namespace peftkern {
namespace PEFTKERN_ISA {

constexpr int64_t kTileStep = 32;  // rows and columns of C that are computed together: two by two tiles

// C (+)= the products, accumulated in the tiles.
struct Accumulate {
  float* C;
  int64_t ldc;
  bool accumulate;
};

template <int kRows, typename Finish>
PEFTKERN_INLINE void finish_rows(const float* c, int64_t i, int64_t j, const Finish& finish) {
#pragma GCC unroll 2
  for (int64_t v = 0; v < kTileStep; v += kLanes) {
    vf rows[kRows][1];
#pragma GCC unroll 16
    for (int n = 0; n < kRows; n++) rows[n][0] = load(c + n * kTileStep + v);
    finish(i, j + v, rows);
  }
}

// Hands the `rows` rows of a step in c to `finish`, as many at a time as there are.
template <typename Finish>
PEFTKERN_INLINE void finish_step(const float* c, int64_t i, int64_t j, int64_t rows, const Finish& finish) {
  int64_t n = 0;
  for (; n + 8 <= rows; n += 8) finish_rows<8>(c + n * kTileStep, i + n, j, finish);
  if (rows - n >= 4) {
    finish_rows<4>(c + n * kTileStep, i + n, j, finish);
    n += 4;
  }
  if (rows - n >= 2) {
    finish_rows<2>(c + n * kTileStep, i + n, j, finish);
    n += 2;
  }
  if (rows > n) finish_rows<1>(c + n * kTileStep, i + n, j, finish);
}

// Tiles 0 to 3 hold C: kRowTiles by two, rows of one behind the other.
template <int kRowTiles>
PEFTKERN_INLINE void zero_sums() {
  zero_tile<0>();
  zero_tile<1>();
  if (kRowTiles == 2) {
    zero_tile<2>();
    zero_tile<3>();
  }
}
template <int kRowTiles>
PEFTKERN_INLINE void load_sums(const float* at, int64_t ldc) {
  load_tile<0>(at, 4 * ldc);
  load_tile<1>(at + kTileWords, 4 * ldc);
  if (kRowTiles == 2) {
    load_tile<2>(at + kTileRows * ldc, 4 * ldc);
    load_tile<3>(at + kTileRows * ldc + kTileWords, 4 * ldc);
  }
}
template <int kRowTiles>
PEFTKERN_INLINE void store_sums(float* at, int64_t ldc) {
  store_tile<0>(at, 4 * ldc);
  store_tile<1>(at + kTileWords, 4 * ldc);
  if (kRowTiles == 2) {
    store_tile<2>(at + kTileRows * ldc, 4 * ldc);
    store_tile<3>(at + kTileRows * ldc + kTileWords, 4 * ldc);
  }
}

// A matrix that is the sum of `count` terms, `distance` words apart.
template <int64_t kCount, int64_t kDistance>
struct Terms : Matrix<uint32_t> {
  static constexpr int64_t count = kCount, distance = kDistance;
};
typedef Terms<1, 0> OneTerm;

// Where a step of C lies: at row i and column j, of which `rows` rows are used.
struct TileStep {
  int64_t i, j, rows;
};

template <int kRowTiles, typename A, typename Finish>
PEFTKERN_INLINE void tile_kernel(Range sum, A a, Matrix<uint32_t> b, TileStep at, float* c, const Finish& finish) {
  constexpr bool in_tiles = std::is_same<Finish, Accumulate>::value;
  float* out = c;
  int64_t ldc = kTileStep;
  bool accumulate = false;
  if constexpr (in_tiles) {
    out = finish.C + at.i * finish.ldc + at.j;
    ldc = finish.ldc;
    accumulate = finish.accumulate;
  }
  if (accumulate)
    load_sums<kRowTiles>(out, ldc);
  else
    zero_sums<kRowTiles>();
  // FAULT: tile-read-past-its-end
  for (int64_t k = sum.begin / kTileWords * kTileWords; k < sum.end; k += kTileWords) {
    const uint32_t* right = b.data + k * b.stride + at.j;
    load_tile<6>(right, 4 * b.stride);
    load_tile<7>(right + kTileWords, 4 * b.stride);
    for (int64_t t = 0; t < A::count; t++) {
      const uint32_t* left = a.data + at.i * a.stride + t * A::distance + k;
      load_tile<4>(left, 4 * a.stride);
      multiply_tiles<0, 4, 6>();
      multiply_tiles<1, 4, 7>();
      if (kRowTiles == 2) {
        load_tile<5>(left + kTileRows * a.stride, 4 * a.stride);
        multiply_tiles<2, 5, 6>();
        multiply_tiles<3, 5, 7>();
      }
    }
  }
  store_sums<kRowTiles>(out, ldc);
  if constexpr (!in_tiles) finish_step(c, at.i, at.j, at.rows, finish);
}

// C [M, N] = A [M, K] B [K, N]; `sums(i, j)` is the range of k that the step of C at row i and column j sums, and
// `finish(i, j, c)` receives rows of it. With Accumulate, M is a multiple of kTileRows.
template <typename Sums, typename A, typename Finish>
static void gemm_tiles(int64_t M, int64_t N, const Sums& sums, A a, Matrix<uint32_t> b, const Finish& finish) {
  alignas(64) float c[kTileStep * kTileStep];
  for (int64_t i = 0; i < M; i += kTileStep)
    for (int64_t j = 0; j < N; j += kTileStep) {
      if (M - i > kTileRows)
        tile_kernel<2>(sums(i, j), a, b, {i, j, min(kTileStep, M - i)}, c, finish);
      else
        tile_kernel<1>(sums(i, j), a, b, {i, j, M - i}, c, finish);
    }
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif  // PEFTKERN_CPU_LAYOUTS_AMX_GEMM_H_
