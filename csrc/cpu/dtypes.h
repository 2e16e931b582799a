// SPDX-License-Identifier: Apache-2.0
// Numbers of the three dtypes in the caller's memory: addresses, loads, stores, and rows as floats.
#ifndef PEFTKERN_CPU_DTYPES_H_
#define PEFTKERN_CPU_DTYPES_H_

#include "vec.h"

namespace peftkern {
namespace PEFTKERN_ISA {

PEFTKERN_INLINE const char* offset(const void* data, int64_t dtype, int64_t elements) {
  return static_cast<const char*>(data) + elements * (dtype == PEFTKERN_FLOAT32 ? 4 : 2);
}

PEFTKERN_INLINE float load_scalar(const void* data, int64_t dtype, int64_t i) {
  if (dtype == PEFTKERN_FLOAT32) return static_cast<const float*>(data)[i];
  uint16_t x = static_cast<const uint16_t*>(data)[i];
  if (dtype == PEFTKERN_FLOAT16) return half_to_float(x);
  uint32_t u = (uint32_t)x << 16;
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}

// `lanes` values of any dtype (the rest of the vector is 0).
template <int64_t kDtype>
PEFTKERN_INLINE vf load_lanes(const void* data, int64_t lanes) {
  if (kDtype == PEFTKERN_FLOAT32) {
    const float* floats = static_cast<const float*>(data);
    return lanes >= kLanes ? load(floats) : load_first(floats, lanes);
  }
  const uint16_t* halves = static_cast<const uint16_t*>(data);
  const vh x = lanes >= kLanes ? load_as<vh>(halves) : load_first(halves, lanes);
  return kDtype == PEFTKERN_FLOAT16 ? from_half(x) : from_bf16(x);
}

template <int64_t kDtype>
PEFTKERN_INLINE void store_lanes(void* data, vf x, int64_t lanes) {
  if (kDtype == PEFTKERN_FLOAT32) {
    __builtin_memcpy(data, &x, 4 * min(lanes, kLanes));
    return;
  }
  vh y = kDtype == PEFTKERN_FLOAT16 ? to_half(x) : to_bf16(x);
  __builtin_memcpy(data, &y, 2 * min(lanes, kLanes));
}

template <int64_t kDtype>
static void widen_row_as(const void* src, int64_t n, float* dst) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(dst + i, load_lanes<kDtype>(offset(src, kDtype, i), kLanes));
  if (i < n) store(dst + i, load_lanes<kDtype>(offset(src, kDtype, i), n - i));
}

// Writes n values as floats, padded with zeros to whole vectors.
PEFTKERN_INLINE void widen_row(const void* src, int64_t dtype, int64_t n, float* dst) {
  if (dtype == PEFTKERN_FLOAT32) return widen_row_as<PEFTKERN_FLOAT32>(src, n, dst);
  if (dtype == PEFTKERN_FLOAT16) return widen_row_as<PEFTKERN_FLOAT16>(src, n, dst);
  widen_row_as<PEFTKERN_BFLOAT16>(src, n, dst);
}

template <int64_t kDtype>
static void narrow_row_as(const float* src, float factor, int64_t n, void* dst) {
  int64_t i = 0;
  char* out = static_cast<char*>(dst);
  const int64_t size = kDtype == PEFTKERN_FLOAT32 ? 4 : 2;
  for (; i + kLanes <= n; i += kLanes) store_lanes<kDtype>(out + i * size, load(src + i) * factor, kLanes);
  if (i < n) store_lanes<kDtype>(out + i * size, load(src + i) * factor, n - i);
}

// Writes factor * src, rounded to dtype. src is padded to whole vectors.
PEFTKERN_INLINE void narrow_row(const float* src, float factor, int64_t n, int64_t dtype, void* dst) {
  if (dtype == PEFTKERN_FLOAT32) return narrow_row_as<PEFTKERN_FLOAT32>(src, factor, n, dst);
  if (dtype == PEFTKERN_FLOAT16) return narrow_row_as<PEFTKERN_FLOAT16>(src, factor, n, dst);
  narrow_row_as<PEFTKERN_BFLOAT16>(src, factor, n, dst);
}

// Rounds floats to dtype, in place.
PEFTKERN_INLINE void round_row(float* row, int64_t n, int64_t dtype) {
  if (dtype == PEFTKERN_FLOAT32) return;
  for (int64_t i = 0; i < n; i += kLanes) {
    vf x = load(row + i);
    store(row + i, dtype == PEFTKERN_FLOAT16 ? from_half(to_half(x)) : from_bf16(to_bf16(x)));
  }
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif  // PEFTKERN_CPU_DTYPES_H_
