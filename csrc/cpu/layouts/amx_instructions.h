// SPDX-License-Identifier: Apache-2.0
// The instructions on AMX tiles of 16 rows of 64 bytes.
#ifndef PEFTKERN_CPU_LAYOUTS_AMX_INSTRUCTIONS_H_
#define PEFTKERN_CPU_LAYOUTS_AMX_INSTRUCTIONS_H_

#include "../sanitizer.h"

namespace peftkern {
namespace PEFTKERN_ISA {

constexpr int64_t kTileRows = 16, kTileWords = 16;

// The tile configuration is per thread. The thread belongs to torch, whose libraries set a configuration of their own,
// so a scope restores it at its end. They keep no data in tiles between calls.
class TileScope {
 public:
  TileScope() {
    asm volatile("sttilecfg %0" : "=m"(saved_));
    Config ours{};
    ours.palette = 1;
    for (int i = 0; i < 8; i++) ours.bytes[i] = 4 * kTileWords, ours.rows[i] = kTileRows;
    asm volatile("ldtilecfg %0" ::"m"(ours));
  }
  ~TileScope() {
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
};

// Not the compilers' intrinsics, as GCC's loads do not declare that they read memory. `stride` is in bytes.
template <int kTile>
PEFTKERN_INLINE void load_tile(const void* data, int64_t stride) {
  check_rows(data, stride, kTileRows, 4 * kTileWords);
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(data), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
PEFTKERN_INLINE void store_tile(void* data, int64_t stride) {
  check_rows(data, stride, kTileRows, 4 * kTileWords);
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

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif  // PEFTKERN_CPU_LAYOUTS_AMX_INSTRUCTIONS_H_
