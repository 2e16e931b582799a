// SPDX-License-Identifier: Apache-2.0
// C (+)= A B on small fp32 matrices that lie in cache. Elements of A are broadcast, so A may lie in either order; rows of
// B and C are vectors.
#ifndef PEFTKERN_CPU_GEMM_H_
#define PEFTKERN_CPU_GEMM_H_

#include "vec.h"

namespace peftkern {
namespace PEFTKERN_ISA {

// Registers: rows x vectors of accumulators, one vector row of B, one broadcast. At least eight accumulators hide the
// latency of a multiply-add.
#if PEFTKERN_LANES == 16
constexpr int kMaxVectors = 4;
constexpr int rows_for(int vectors) { return vectors == 4 ? 6 : vectors == 3 ? 8 : 12; }
#else
constexpr int kMaxVectors = 2;
constexpr int rows_for(int vectors) { return vectors == 2 ? 6 : 8; }
#endif

// a(i, k) = kTransA ? A[k lda + i] : A[i lda + k]
template <int kRows, int kVectors, bool kTransA>
PEFTKERN_INLINE void micro_kernel(int64_t K, const float* A, int64_t lda, const float* B, int64_t ldb, float* C,
                                  int64_t ldc, bool accumulate) {
  vf c[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; i++)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; j++) c[i][j] = zero();
  for (int64_t k = 0; k < K; k++) {
    vf b[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; j++) b[j] = load(B + k * ldb + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; i++) {
      vf a = set1(kTransA ? A[k * lda + i] : A[i * lda + k]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; j++) c[i][j] += a * b[j];
    }
  }
  // Added last and not first: long sums are sums of block sums, which round less.
#pragma GCC unroll 16
  for (int i = 0; i < kRows; i++)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; j++) {
      float* at = C + i * ldc + j * kLanes;
      store(at, accumulate ? load(at) + c[i][j] : c[i][j]);
    }
}

// The last `rows` < kRows rows.
template <int kRows, int kVectors, bool kTransA>
struct Tail {
  static void run(int64_t rows, int64_t K, const float* A, int64_t lda, const float* B, int64_t ldb, float* C,
                  int64_t ldc, bool accumulate) {
    if (rows == kRows)
      micro_kernel<kRows, kVectors, kTransA>(K, A, lda, B, ldb, C, ldc, accumulate);
    else
      Tail<kRows - 1, kVectors, kTransA>::run(rows, K, A, lda, B, ldb, C, ldc, accumulate);
  }
};
template <int kVectors, bool kTransA>
struct Tail<0, kVectors, kTransA> {
  static void run(int64_t, int64_t, const float*, int64_t, const float*, int64_t, float*, int64_t, bool) {}
};

template <int kVectors, bool kTransA>
static void gemm_columns(int64_t M, int64_t K, const float* A, int64_t lda, const float* B, int64_t ldb, float* C,
                         int64_t ldc, bool accumulate) {
  constexpr int kRows = rows_for(kVectors);
  const int64_t step = kTransA ? 1 : lda;
  int64_t i = 0;
  for (; i + kRows <= M; i += kRows)
    micro_kernel<kRows, kVectors, kTransA>(K, A + i * step, lda, B, ldb, C + i * ldc, ldc, accumulate);
  Tail<kRows - 1, kVectors, kTransA>::run(M - i, K, A + i * step, lda, B, ldb, C + i * ldc, ldc, accumulate);
}

// C [M, N] (+)= A [M, K] B [K, N]; N is a multiple of kLanes.
template <bool kTransA>
static void gemm(int64_t M, int64_t N, int64_t K, const float* A, int64_t lda, const float* B, int64_t ldb, float* C,
                 int64_t ldc, bool accumulate) {
  int64_t j = 0;
  for (; j + kMaxVectors * kLanes <= N; j += kMaxVectors * kLanes)
    gemm_columns<kMaxVectors, kTransA>(M, K, A, lda, B + j, ldb, C + j, ldc, accumulate);
  switch ((N - j) / kLanes) {
#if PEFTKERN_LANES == 16
    case 3: return gemm_columns<3, kTransA>(M, K, A, lda, B + j, ldb, C + j, ldc, accumulate);
    case 2: return gemm_columns<2, kTransA>(M, K, A, lda, B + j, ldb, C + j, ldc, accumulate);
#endif
    case 1: return gemm_columns<1, kTransA>(M, K, A, lda, B + j, ldb, C + j, ldc, accumulate);
  }
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif  // PEFTKERN_CPU_GEMM_H_
