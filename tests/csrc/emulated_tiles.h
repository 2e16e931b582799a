// SPDX-License-Identifier: Apache-2.0
// Stands in for csrc/cpu/layouts/amx_instructions.h where no processor has AMX: the same functions, on tiles in memory.
// As the instructions do, it loses what tiles hold outside a scope, and it reads and writes tiles whole.
#ifndef PEFTKERN_TESTS_EMULATED_TILES_H_
#define PEFTKERN_TESTS_EMULATED_TILES_H_

#include <cstring>

#include "../../csrc/cpu/sanitizer.h"

namespace peftkern {
namespace PEFTKERN_ISA {

constexpr int64_t kTileRows = 16, kTileWords = 16;

struct TileRegisters {
  uint32_t words[8][kTileRows][kTileWords];
  int scopes;
};
static thread_local TileRegisters tiles;

class TileScope {
 public:
  TileScope() {
    tiles.scopes++;
    lose();
  }
  ~TileScope() {
    tiles.scopes--;
    lose();
  }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

 private:
  static void lose() { memset(tiles.words, 0xff, sizeof tiles.words); }  // NaN
};

// A tile of this thread. Outside a scope the instructions would raise an exception.
PEFTKERN_INLINE uint32_t (&tile(int i)) [kTileRows][kTileWords] {
  if (!tiles.scopes) __builtin_trap();
  return tiles.words[i];
}

template <int kTile>
PEFTKERN_INLINE void load_tile(const void* data, int64_t stride) {
  check_rows(data, stride, kTileRows, 4 * kTileWords);
  for (int64_t row = 0; row < kTileRows; row++)
    memcpy(tile(kTile)[row], static_cast<const char*>(data) + row * stride, 4 * kTileWords);
}
template <int kTile>
PEFTKERN_INLINE void store_tile(void* data, int64_t stride) {
  check_rows(data, stride, kTileRows, 4 * kTileWords);
  for (int64_t row = 0; row < kTileRows; row++)
    memcpy(static_cast<char*>(data) + row * stride, tile(kTile)[row], 4 * kTileWords);
}
template <int kTile>
PEFTKERN_INLINE void zero_tile() {
  memset(tile(kTile), 0, sizeof tile(kTile));
}

PEFTKERN_INLINE float load_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// TDPBF16PS: the sums over the first and over the second numbers of pairs, added to C.
template <int kC, int kA, int kB>
PEFTKERN_INLINE void multiply_tiles() {
  for (int64_t row = 0; row < kTileRows; row++) {
    vf first = zero(), second = zero();
    for (int64_t k = 0; k < kTileWords; k++) {
      const uint32_t a = tile(kA)[row][k];
      const vu b = load_as<vu>(tile(kB)[k]);
      first += set1(load_bits(a << 16)) * (vf)(b << 16);
      second += set1(load_bits(a & 0xffff0000u)) * (vf)(b & 0xffff0000u);
    }
    const vf sum = load_as<vf>(tile(kC)[row]) + (first + second);
    memcpy(tile(kC)[row], &sum, sizeof sum);
  }
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif  // PEFTKERN_TESTS_EMULATED_TILES_H_
