// SPDX-License-Identifier: Apache-2.0
// C = A B for small matrices in cache. Elements of A are broadcast, so A may have either memory order; rows of B and C
// are vectors. C is fp32 and is passed to an epilogue while it is in registers. The elements T of A and B are floats,
// or words that hold two bf16 numbers adjacent along the summed dimension (K then counts pairs).
#ifndef PEFTKERN_CPU_GEMM_H_
#define PEFTKERN_CPU_GEMM_H_

#include "vec.h"

namespace peftkern {
namespace PEFTKERN_ISA {

template <typename T>
struct VectorOf {
  typedef vf type;
};
template <>
struct VectorOf<uint32_t> {
  typedef vu type;
};

// Rows that are `stride` elements apart.
template <typename T>
struct Matrix {
  const T* data;
  int64_t stride;
};

// Registers: rows x vectors of accumulators, one vector row of B, one broadcast. At least eight accumulators hide the
// latency of a multiply-add. Counts of rows are even, so that rows can be paired while they are in registers.
constexpr bool kManyRegisters = kRegisters >= 32;
constexpr int kMaxVectors = kManyRegisters ? 4 : 3;  // of columns that are computed together
constexpr int rows_for(int vectors) {
  if (kManyRegisters) return vectors == 4 ? 6 : vectors == 3 ? 8 : 12;
  return vectors == 3 ? 4 : vectors == 2 ? 6 : 8;
}

// How many vectors of columns are computed next if `left` are left. One vector alone would load an element of A for
// each multiply-add, so none is left for the end.
constexpr int64_t next_vectors(int64_t left) {
  if (left <= kMaxVectors) return left;
  return !kManyRegisters ? 2 : left <= 6 ? 3 : 4;
}

struct Range {
  int64_t begin, end;
};

// Every row of C sums over all k.
struct All {
  int64_t K;
  Range operator()(int64_t, int64_t) const { return {0, K}; }
};

// C (+)= the products. C is added at the end: a sum of block sums has smaller rounding errors than one long sum.
struct Store {
  float* C;
  int64_t ldc;
  bool accumulate;

  template <int kRows, int kVectors>
  PEFTKERN_INLINE_MEMBER void operator()(int64_t i, int64_t j, vf (&c)[kRows][kVectors]) const {
#pragma GCC unroll 16
    for (int row = 0; row < kRows; row++)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) {
        float* at = C + (i + row) * ldc + j + v * kLanes;
        store(at, accumulate ? load(at) + c[row][v] : c[row][v]);
      }
  }
};

// Rows i, i + 1, ... and columns j, j + 1, ... of C; a(i, k) = kTransA ? A[k][i] : A[i][k].
template <typename T, int kRows, int kVectors, bool kTransA, typename Finish>
PEFTKERN_INLINE void micro_kernel(Range sum, Matrix<T> A, Matrix<T> B, int64_t i, int64_t j, const Finish& finish) {
  vf c[kRows][kVectors];
#pragma GCC unroll 16
  for (int row = 0; row < kRows; row++)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) c[row][v] = zero();
  const int64_t lda = A.stride, ldb = B.stride;
  const T* a_rows = A.data + (kTransA ? i : i * lda);
  for (int64_t k = sum.begin; k < sum.end; k++) {
    typename VectorOf<T>::type b[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) b[v] = load_as<typename VectorOf<T>::type>(B.data + k * ldb + j + v * kLanes);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; row++) {
      const T a = kTransA ? a_rows[k * lda + row] : a_rows[row * lda + k];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) c[row][v] = multiply_add(a, b[v], c[row][v]);
    }
  }
  finish(i, j, c);
}

// All rows of a few vectors' columns.
template <typename T, int kVectors, bool kTransA, typename Sums, typename Finish>
static void gemm_columns(int64_t M, const Sums& sums, Matrix<T> A, Matrix<T> B, int64_t j, const Finish& finish) {
  constexpr int kRows = rows_for(kVectors);
  int64_t i = 0;
  for (; i + kRows <= M; i += kRows) micro_kernel<T, kRows, kVectors, kTransA>(sums(i, kRows), A, B, i, j, finish);
  if (kRows > 8 && M - i >= 8) {
    micro_kernel<T, 8, kVectors, kTransA>(sums(i, 8), A, B, i, j, finish);
    i += 8;
  }
  if (kRows > 4 && M - i >= 4) {
    micro_kernel<T, 4, kVectors, kTransA>(sums(i, 4), A, B, i, j, finish);
    i += 4;
  }
  if (M - i >= 2) {
    micro_kernel<T, 2, kVectors, kTransA>(sums(i, 2), A, B, i, j, finish);
    i += 2;
  }
  if (M > i) micro_kernel<T, 1, kVectors, kTransA>(sums(i, 1), A, B, i, j, finish);
}

// C [M, N] = A [M, K] B [K, N], N a multiple of kLanes. `sums(i, rows)` is the range of k that rows i, i + 1, ... sum;
// `finish(i, j, c)` receives the block of C at row i and column j.
template <bool kTransA, typename T, typename Sums, typename Finish>
static void gemm(int64_t M, int64_t N, const Sums& sums, Matrix<T> A, Matrix<T> B, const Finish& finish) {
  for (int64_t j = 0; j < N;) {
    const int64_t vectors = next_vectors((N - j) / kLanes);
    switch (vectors) {
      case 4: gemm_columns<T, kMaxVectors, kTransA>(M, sums, A, B, j, finish); break;
      case 3: gemm_columns<T, 3, kTransA>(M, sums, A, B, j, finish); break;
      case 2: gemm_columns<T, 2, kTransA>(M, sums, A, B, j, finish); break;
      default: gemm_columns<T, 1, kTransA>(M, sums, A, B, j, finish);
    }
    j += vectors * kLanes;
  }
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif  // PEFTKERN_CPU_GEMM_H_
