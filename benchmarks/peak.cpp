// SPDX-License-Identifier: Apache-2.0
// Loops that do one thing as fast as a processor can: multiply-adds in registers, reading memory, copying memory.
// peak.py compiles this file for each instruction set, with the kernels' flags and PEFTKERN_LANES, and counts the
// operations. Like the kernels, it is compiled with OpenMP but not linked to it.
#include <cstdint>
#include <cstring>

#define PEFTKERN_ISA peak
#if defined(__AMX_BF16__)
#include "layouts/amx_instructions.h"
#define PEAK_HAS_TILES 1
#else
#include "vec.h"
#define PEAK_HAS_TILES 0
#endif
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define PEAK_HAS_PAIRS 1
#else
#define PEAK_HAS_PAIRS 0
#endif

namespace peftkern {
namespace PEFTKERN_ISA {

// Independent sums. A sum can take the next multiply-add when the last one is done, 4 to 6 cycles later (SSE2's two
// instructions: 6 to 8), and processors start two per cycle at most: 12 keep them busy. With two factors they fit into
// 16 registers.
constexpr int kSums = 12;

enum Kind { kFloats = 0, kPairs = 1, kTiles = 2 };

// x = x * a + b, which has the fixed point b / (1 - a). x is part of the product, so that no product leaves the loop.
static float floats(int64_t steps, float a, float b) {
  vf x[kSums];
#pragma GCC unroll 12
  for (int i = 0; i < kSums; i++) x[i] = set1(float(i + 1));
  const vf va = set1(a), vb = set1(b);
  for (int64_t step = 0; step < steps; step++) {
#pragma GCC unroll 12
    for (int i = 0; i < kSums; i++) x[i] = x[i] * va + vb;
  }
  vf sum = zero();
#pragma GCC unroll 12
  for (int i = 0; i < kSums; i++) sum += x[i];
  return reduce_add(sum);
}

#if PEAK_HAS_PAIRS
// x += the dot products of two pairs, each (1, 1).
static float pairs(int64_t steps) {
  const uint32_t one = 0x3f803f80u;
  vu ones = one - vu{};
  vf x[kSums];
#pragma GCC unroll 12
  for (int i = 0; i < kSums; i++) x[i] = set1(float(i + 1));
  for (int64_t step = 0; step < steps; step++) {
#pragma GCC unroll 12
    for (int i = 0; i < kSums; i++) x[i] = multiply_add(one, ones, x[i]);
  }
  vf sum = zero();
#pragma GCC unroll 12
  for (int i = 0; i < kSums; i++) sum += x[i];
  return reduce_add(sum);
}
#endif

#if PEAK_HAS_TILES
// Two by two tiles of sums, as in the kernels. All factors are 1.
static float tiles(int64_t steps) {
  alignas(64) uint32_t ones[kTileRows][kTileWords];
  alignas(64) float sums[kTileRows][kTileWords];
  for (auto& row : ones)
    for (uint32_t& word : row) word = 0x3f803f80u;
  const TileScope scope;
  zero_tile<0>();
  zero_tile<1>();
  zero_tile<2>();
  zero_tile<3>();
  load_tile<4>(ones, sizeof ones[0]);
  load_tile<5>(ones, sizeof ones[0]);
  load_tile<6>(ones, sizeof ones[0]);
  load_tile<7>(ones, sizeof ones[0]);
  for (int64_t step = 0; step < steps; step++) {
    multiply_tiles<0, 4, 6>();
    multiply_tiles<1, 4, 7>();
    multiply_tiles<2, 5, 6>();
    multiply_tiles<3, 5, 7>();
  }
  float sum = 0;
  store_tile<0>(sums, sizeof sums[0]);
  sum += sums[0][0];
  store_tile<1>(sums, sizeof sums[0]);
  sum += sums[0][0];
  store_tile<2>(sums, sizeof sums[0]);
  sum += sums[0][0];
  store_tile<3>(sums, sizeof sums[0]);
  return sum + sums[0][0];
}
#endif

static float read_range(const float* data, int64_t begin, int64_t end) {
  constexpr int kVectors = 8;
  vf sums[kVectors] = {};
  int64_t i = begin;
  for (; i + kVectors * kLanes <= end; i += kVectors * kLanes) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v++) sums[v] += load(data + i + v * kLanes);
  }
  float sum = 0;
  for (; i < end; i++) sum += data[i];
  for (int v = 0; v < kVectors; v++) sum += reduce_add(sums[v]);
  return sum;
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern

using namespace peftkern::PEFTKERN_ISA;

extern "C" {

// Floating-point operations of one step; 0 for a kind that this instruction set does not have.
int64_t peak_operations(int kind) {
  if (kind == kFloats) return 2 * kLanes * kSums;
  if (kind == kPairs && PEAK_HAS_PAIRS) return 4 * kLanes * kSums;
#if PEAK_HAS_TILES
  if (kind == kTiles) return 4 * 2 * kTileRows * kTileWords * 2 * kTileWords;
#endif
  return 0;
}

// Whether one instruction multiplies and adds floats.
int peak_is_fused() {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return 1;
#else
  return 0;
#endif
}

// Runs `steps` steps in each thread. Returns the sum of the threads' results.
float peak_run(int kind, int64_t steps, int64_t threads, float a, float b) {
  float sum = 0;
#pragma omp parallel num_threads(int(threads)) reduction(+ : sum)
  {
    if (kind == kFloats) sum += floats(steps, a, b);
#if PEAK_HAS_PAIRS
    if (kind == kPairs) sum += pairs(steps);
#endif
#if PEAK_HAS_TILES
    if (kind == kTiles) sum += tiles(steps);
#endif
  }
  return sum;
}

// The sum of n floats, a range per thread.
float peak_read(const float* data, int64_t n, int64_t threads) {
  float sum = 0;
#pragma omp parallel for num_threads(int(threads)) schedule(static, 1) reduction(+ : sum)
  for (int64_t i = 0; i < threads; i++) sum += read_range(data, n * i / threads, n * (i + 1) / threads);
  return sum;
}

void peak_copy(float* to, const float* from, int64_t n, int64_t threads) {
#pragma omp parallel for num_threads(int(threads)) schedule(static, 1)
  for (int64_t i = 0; i < threads; i++) {
    const int64_t begin = n * i / threads, end = n * (i + 1) / threads;
    std::memcpy(to + begin, from + begin, 4 * (end - begin));
  }
}
}
