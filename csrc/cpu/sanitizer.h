// SPDX-License-Identifier: Apache-2.0
// What address sanitizers cannot see by themselves: gaps between pieces of one allocation, and tiles. Nothing in other
// builds.
#ifndef PEFTKERN_CPU_SANITIZER_H_
#define PEFTKERN_CPU_SANITIZER_H_

#include <cstddef>
#include <cstdint>

#include "vec.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace peftkern {
namespace PEFTKERN_ISA {

#if defined(__SANITIZE_ADDRESS__)

constexpr size_t kGap = 64;  // bytes behind each piece of scratch memory that must not be accessed

PEFTKERN_INLINE void mark_piece(char* begin, char* end, char* next) {
  ASAN_UNPOISON_MEMORY_REGION(begin, (size_t)(end - begin));
  ASAN_POISON_MEMORY_REGION(end, (size_t)(next - end));
}

// Reads a poisoned byte of each row of a tile, if there is one, as instructions that load tiles are not checked.
PEFTKERN_INLINE void check_rows(const void* data, int64_t stride, int64_t rows, size_t bytes) {
  for (int64_t row = 0; row < rows; row++) {
    void* at = const_cast<char*>(static_cast<const char*>(data) + row * stride);
    if (const void* bad = __asan_region_is_poisoned(at, bytes)) (void)*static_cast<const volatile char*>(bad);
  }
}

#else

constexpr size_t kGap = 0;

PEFTKERN_INLINE void mark_piece(char*, char*, char*) {}
PEFTKERN_INLINE void check_rows(const void*, int64_t, int64_t, size_t) {}

#endif

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif  // PEFTKERN_CPU_SANITIZER_H_
