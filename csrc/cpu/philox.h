// SPDX-License-Identifier: Apache-2.0
// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", 2011), for `kCount`
// counters at once.
#ifndef PEFTKERN_CPU_PHILOX_H_
#define PEFTKERN_CPU_PHILOX_H_

#include <cstdint>

// Included into one namespace per instruction set.
#ifndef PEFTKERN_ISA
#define PEFTKERN_ISA plain
#endif

namespace peftkern {
namespace PEFTKERN_ISA {

// words[w][i] = word w of Philox(counter = (c0[i], c1[i], c2[i], c3), key)
template <int kCount>
static inline void philox4x32(const uint32_t* c0, const uint32_t* c1, const uint32_t* c2, uint32_t c3,
                              const uint32_t key[2], uint32_t words[4][kCount]) {
  for (int i = 0; i < kCount; i++) {
    uint32_t x0 = c0[i], x1 = c1[i], x2 = c2[i], x3 = c3, k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
      uint64_t product0 = (uint64_t)x0 * 0xD2511F53u, product1 = (uint64_t)x2 * 0xCD9E8D57u;
      x0 = (uint32_t)(product1 >> 32) ^ x1 ^ k0;
      x1 = (uint32_t)product1;
      x2 = (uint32_t)(product0 >> 32) ^ x3 ^ k1;
      x3 = (uint32_t)product0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    words[0][i] = x0;
    words[1][i] = x1;
    words[2][i] = x2;
    words[3][i] = x3;
  }
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif  // PEFTKERN_CPU_PHILOX_H_
