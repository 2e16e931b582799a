// SPDX-License-Identifier: Apache-2.0
// C = A B for bf16 pairs in AMX tiles of 16 rows of 64 bytes. A [M][K] and B [K][N] consist of words that hold pairs
// along K; C is fp32. Tiles are read and written whole, so every buffer is padded: A to 32 rows, K to 16 words, N
// to 32. The padding along K is zero in one factor and finite in the other.
#ifndef PEFTKERN_CPU_AMX_H_
#define PEFTKERN_CPU_AMX_H_

#include <type_traits>

#include "gemm.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace peftkern {
namespace PEFTKERN_ISA {

#if PEFTKERN_HAS_AMX
constexpr int64_t kTileRows = 16, kTileWords = 16;
constexpr int64_t kTileStep = 32;  // rows and columns of C that are computed together: two by two tiles

// The tile configuration is per thread. The thread belongs to torch, whose libraries set a configuration of their own,
// so a scope restores it at its end. They keep no data in tiles between calls.
class TileScope {
 public:
  explicit TileScope(bool used) : used_(used) {
    if (!used_) return;
    asm volatile("sttilecfg %0" : "=m"(saved_));
    Config ours{};
    ours.palette = 1;
    for (int i = 0; i < 8; i++) ours.bytes[i] = 4 * kTileWords, ours.rows[i] = kTileRows;
    asm volatile("ldtilecfg %0" ::"m"(ours));
  }
  ~TileScope() {
    if (!used_) return;
    if (saved_.palette)
      asm volatile("ldtilecfg %0" ::"m"(saved_));
    else
      asm volatile("tilerelease" ::: "memory");
  }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

 private:
  struct alignas(64) Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  };
  Config saved_;
  bool used_;
};

// Address sanitizers do not see tile accesses, so this reads a poisoned byte of each row, if there is one, for them.
PEFTKERN_INLINE void check_tile([[maybe_unused]] const void* data, [[maybe_unused]] int64_t stride) {
#if defined(__SANITIZE_ADDRESS__)
  for (int64_t row = 0; row < kTileRows; row++) {
    void* at = const_cast<char*>(static_cast<const char*>(data) + row * stride);
    if (const void* bad = __asan_region_is_poisoned(at, 4 * kTileWords)) (void)*static_cast<const volatile char*>(bad);
  }
#endif
}

// Not the compilers' intrinsics, as GCC's loads do not declare that they read memory. `stride` is in bytes.
template <int kTile>
PEFTKERN_INLINE void load_tile(const void* data, int64_t stride) {
  check_tile(data, stride);
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(data), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
PEFTKERN_INLINE void store_tile(void* data, int64_t stride) {
  check_tile(data, stride);
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(data), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
PEFTKERN_INLINE void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kC, int kA, int kB>
PEFTKERN_INLINE void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

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

// Rows i, i + 1, ... and kTileStep columns j, j + 1, ... of C; A is the sum of kTerms, `term` words apart.
template <int kRowTiles, int kTerms, typename Finish>
PEFTKERN_INLINE void tile_kernel(Range sum, const uint32_t* A, int64_t lda, int64_t term, const uint32_t* B,
                                 int64_t ldb, int64_t i, int64_t j, int64_t rows, float* c, const Finish& finish) {
  constexpr bool in_tiles = std::is_same<Finish, Accumulate>::value;
  bool fresh = true;
  if constexpr (in_tiles) {
    fresh = !finish.accumulate;
    if (!fresh) {
      const float* at = finish.C + i * finish.ldc + j;
      const int64_t stride = 4 * finish.ldc;
      load_tile<0>(at, stride);
      load_tile<1>(at + kTileWords, stride);
      if (kRowTiles == 2) {
        load_tile<2>(at + kTileRows * finish.ldc, stride);
        load_tile<3>(at + kTileRows * finish.ldc + kTileWords, stride);
      }
    }
  }
  if (fresh) {
    zero_tile<0>();
    zero_tile<1>();
    if (kRowTiles == 2) {
      zero_tile<2>();
      zero_tile<3>();
    }
  }
  const uint32_t* first = A + i * lda;
  // FAULT: tile-read-past-its-end
  for (int64_t k = sum.begin / kTileWords * kTileWords; k < sum.end; k += kTileWords) {
    load_tile<6>(B + k * ldb + j, 4 * ldb);
    load_tile<7>(B + k * ldb + j + kTileWords, 4 * ldb);
    for (int64_t t = 0; t < kTerms; t++) {
      const uint32_t* a = first + t * term + k;
      load_tile<4>(a, 4 * lda);
      multiply_tiles<0, 4, 6>();
      multiply_tiles<1, 4, 7>();
      if (kRowTiles == 2) {
        load_tile<5>(a + kTileRows * lda, 4 * lda);
        multiply_tiles<2, 5, 6>();
        multiply_tiles<3, 5, 7>();
      }
    }
  }
  float* at = c;
  int64_t ldc = kTileStep;
  if constexpr (in_tiles) {
    at = finish.C + i * finish.ldc + j;
    ldc = finish.ldc;
  }
  store_tile<0>(at, 4 * ldc);
  store_tile<1>(at + kTileWords, 4 * ldc);
  if (kRowTiles == 2) {
    store_tile<2>(at + kTileRows * ldc, 4 * ldc);
    store_tile<3>(at + kTileRows * ldc + kTileWords, 4 * ldc);
  }
  if constexpr (!in_tiles) finish_step(c, i, j, rows, finish);
}

// C [M, N] = A [M, K] B [K, N]; `sums(i, j)` is the range of k that the step of C at row i and column j sums, and
// `finish(i, j, c)` receives rows of it. With Accumulate, M is a multiple of kTileRows.
template <int kTerms = 1, typename Sums, typename Finish>
static void gemm_tiles(int64_t M, int64_t N, const Sums& sums, const uint32_t* A, int64_t lda, const uint32_t* B,
                       int64_t ldb, const Finish& finish, int64_t term = 0) {
  alignas(64) float c[kTileStep * kTileStep];
  for (int64_t i = 0; i < M; i += kTileStep)
    for (int64_t j = 0; j < N; j += kTileStep) {
      if (M - i > kTileRows)
        tile_kernel<2, kTerms>(sums(i, j), A, lda, term, B, ldb, i, j, min(kTileStep, M - i), c, finish);
      else
        tile_kernel<1, kTerms>(sums(i, j), A, lda, term, B, ldb, i, j, M - i, c, finish);
    }
}
#endif

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif  // PEFTKERN_CPU_AMX_H_
