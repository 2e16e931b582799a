// SPDX-License-Identifier: Apache-2.0
// C (+)= A B on small matrices that lie in cache. Elements of A are broadcast, so A may lie in either order; rows of B and C
// are vectors. C is fp32. The elements T of A and B are floats, or pairs of bf16 that follow each other along the summed
// dimension, in one word (K then counts pairs).
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
// latency of a multiply-add.
#if PEFTKERN_LANES == 16
constexpr int kMaxVectors = 4;
constexpr int rows_for(int vectors) { return vectors == 4 ? 6 : vectors == 3 ? 8 : 12; }
#else
constexpr int kMaxVectors = 2;
constexpr int rows_for(int vectors) { return vectors == 2 ? 6 : 8; }
#endif

// a(i, k) = kTransA ? A[k lda + i] : A[i lda + k]
template <typename T, int kRows, int kVectors, bool kTransA>
PEFTKERN_INLINE void micro_kernel(int64_t K, const T* A, int64_t lda, const T* B, int64_t ldb, float* C,
                                  int64_t ldc, bool accumulate) {
  vf c[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; i++)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; j++) c[i][j] = zero();
  for (int64_t k = 0; k < K; k++) {
    typename VectorOf<T>::type b[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; j++) b[j] = load_as<typename VectorOf<T>::type>(B + k * ldb + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; i++) {
      const T a = kTransA ? A[k * lda + i] : A[i * lda + k];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; j++) c[i][j] = multiply_add(a, b[j], c[i][j]);
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
template <typename T, int kRows, int kVectors, bool kTransA>
struct Tail {
  static void run(int64_t rows, int64_t K, const T* A, int64_t lda, const T* B, int64_t ldb, float* C,
                  int64_t ldc, bool accumulate) {
    if (rows == kRows)
      micro_kernel<T, kRows, kVectors, kTransA>(K, A, lda, B, ldb, C, ldc, accumulate);
    else
      Tail<T, kRows - 1, kVectors, kTransA>::run(rows, K, A, lda, B, ldb, C, ldc, accumulate);
  }
};
template <typename T, int kVectors, bool kTransA>
struct Tail<T, 0, kVectors, kTransA> {
  static void run(int64_t, int64_t, const T*, int64_t, const T*, int64_t, float*, int64_t, bool) {}
};

template <typename T, int kVectors, bool kTransA>
static void gemm_columns(int64_t M, int64_t K, const T* A, int64_t lda, const T* B, int64_t ldb, float* C,
                         int64_t ldc, bool accumulate) {
  constexpr int kRows = rows_for(kVectors);
  const int64_t step = kTransA ? 1 : lda;
  int64_t i = 0;
  for (; i + kRows <= M; i += kRows)
    micro_kernel<T, kRows, kVectors, kTransA>(K, A + i * step, lda, B, ldb, C + i * ldc, ldc, accumulate);
  Tail<T, kRows - 1, kVectors, kTransA>::run(M - i, K, A + i * step, lda, B, ldb, C + i * ldc, ldc, accumulate);
}

// C [M, N] (+)= A [M, K] B [K, N]; N is a multiple of kLanes.
template <bool kTransA, typename T>
static void gemm(int64_t M, int64_t N, int64_t K, const T* A, int64_t lda, const T* B, int64_t ldb, float* C,
                 int64_t ldc, bool accumulate) {
  int64_t j = 0;
  for (; j + kMaxVectors * kLanes <= N; j += kMaxVectors * kLanes)
    gemm_columns<T, kMaxVectors, kTransA>(M, K, A, lda, B + j, ldb, C + j, ldc, accumulate);
  switch ((N - j) / kLanes) {
#if PEFTKERN_LANES == 16
    case 3: return gemm_columns<T, 3, kTransA>(M, K, A, lda, B + j, ldb, C + j, ldc, accumulate);
    case 2: return gemm_columns<T, 2, kTransA>(M, K, A, lda, B + j, ldb, C + j, ldc, accumulate);
#endif
    case 1: return gemm_columns<T, 1, kTransA>(M, K, A, lda, B + j, ldb, C + j, ldc, accumulate);
  }
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif  // PEFTKERN_CPU_GEMM_H_
