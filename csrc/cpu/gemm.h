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

PEFTKERN_INLINE vf multiply_add(float a, vf b, vf c) { return c + a * b; }
#if PEFTKERN_HAS_PAIRS
PEFTKERN_INLINE vf multiply_add(uint32_t a, vu b, vf c) {
  return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
}
#endif

// Registers: rows x vectors of accumulators, one vector row of B, one broadcast. At least eight accumulators hide the
// latency of a multiply-add. Counts of rows are even, so that rows can be paired while they are in registers.
#if PEFTKERN_LANES == 16
constexpr int kMaxVectors = 4;
constexpr int rows_for(int vectors) { return vectors == 4 ? 6 : vectors == 3 ? 8 : 12; }
#else
constexpr int kMaxVectors = 2;
constexpr int rows_for(int vectors) { return vectors == 2 ? 6 : 8; }
#endif

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

// Rows i, i + 1, ... and columns j, j + 1, ... of C; a(i, k) = kTransA ? A[k lda + i] : A[i lda + k].
template <typename T, int kRows, int kVectors, bool kTransA, typename Finish>
PEFTKERN_INLINE void micro_kernel(Range sum, const T* A, int64_t lda, const T* B, int64_t ldb, int64_t i, int64_t j,
                                  const Finish& finish) {
  vf c[kRows][kVectors];
#pragma GCC unroll 16
  for (int row = 0; row < kRows; row++)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) c[row][v] = zero();
  A += kTransA ? i : i * lda;
  for (int64_t k = sum.begin; k < sum.end; k++) {
    typename VectorOf<T>::type b[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) b[v] = load_as<typename VectorOf<T>::type>(B + k * ldb + j + v * kLanes);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; row++) {
      const T a = kTransA ? A[k * lda + row] : A[row * lda + k];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) c[row][v] = multiply_add(a, b[v], c[row][v]);
    }
  }
  finish(i, j, c);
}

// All rows of a few vectors' columns.
template <typename T, int kVectors, bool kTransA, typename Sums, typename Finish>
static void gemm_columns(int64_t M, const Sums& sums, const T* A, int64_t lda, const T* B, int64_t ldb, int64_t j,
                         const Finish& finish) {
  constexpr int kRows = rows_for(kVectors);
  int64_t i = 0;
  for (; i + kRows <= M; i += kRows)
    micro_kernel<T, kRows, kVectors, kTransA>(sums(i, kRows), A, lda, B, ldb, i, j, finish);
  if (kRows > 8 && M - i >= 8) {
    micro_kernel<T, 8, kVectors, kTransA>(sums(i, 8), A, lda, B, ldb, i, j, finish);
    i += 8;
  }
  if (M - i >= 4) {
    micro_kernel<T, 4, kVectors, kTransA>(sums(i, 4), A, lda, B, ldb, i, j, finish);
    i += 4;
  }
  if (M - i >= 2) {
    micro_kernel<T, 2, kVectors, kTransA>(sums(i, 2), A, lda, B, ldb, i, j, finish);
    i += 2;
  }
  if (M > i) micro_kernel<T, 1, kVectors, kTransA>(sums(i, 1), A, lda, B, ldb, i, j, finish);
}

// C [M, N] = A [M, K] B [K, N], N a multiple of kLanes. `sums(i, rows)` is the range of k that rows i, i + 1, ... sum;
// `finish(i, j, c)` receives the block of C at row i and column j.
template <bool kTransA, typename T, typename Sums, typename Finish>
static void gemm(int64_t M, int64_t N, const Sums& sums, const T* A, int64_t lda, const T* B, int64_t ldb,
                 const Finish& finish) {
  int64_t j = 0;
  for (; j + kMaxVectors * kLanes <= N; j += kMaxVectors * kLanes)
    gemm_columns<T, kMaxVectors, kTransA>(M, sums, A, lda, B, ldb, j, finish);
  switch ((N - j) / kLanes) {
#if PEFTKERN_LANES == 16
    case 3: return gemm_columns<T, 3, kTransA>(M, sums, A, lda, B, ldb, j, finish);
    case 2: return gemm_columns<T, 2, kTransA>(M, sums, A, lda, B, ldb, j, finish);
#endif
    case 1: return gemm_columns<T, 1, kTransA>(M, sums, A, lda, B, ldb, j, finish);
  }
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif  // PEFTKERN_CPU_GEMM_H_
