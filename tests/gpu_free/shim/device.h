// SPDX-License-Identifier: Apache-2.0
// csrc/cuda/kernels/ptx.cuh for a CPU: the same functions and CUDA's built-ins, on top of the runtime of runtime.h. Needs g++ alone.
#ifndef PEFTKERN_SHIM_DEVICE_H_
#define PEFTKERN_SHIM_DEVICE_H_

#include <algorithm>
#include <cmath>
#include <cstring>

#include "runtime.h"

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

#define PEFTKERN_DEVICE inline
#define PEFTKERN_HOST_DEVICE inline
#define PEFTKERN_KERNEL(threads, blocks) void
#define PEFTKERN_PARAMS const
#define PEFTKERN_SHARED(name) unsigned char* name = shim::shared_memory()
#define threadIdx (shim::current->thread)
#define blockIdx (shim::current->block)
#define gridDim (shim::current->grid)
#define __syncthreads() shim::block_barrier(__LINE__)
#define __syncwarp() shim::warp_barrier()
using std::max;
using std::min;

namespace peftkern {

inline uint32_t shared_address(const void* p) { return (uint32_t)((const unsigned char*)p - shim::shared_memory()); }
inline void copy_async(uint32_t target, const void* source, bool valid) { shim::copy_async(target, source, valid); }
inline void copy_async_commit() { shim::copy_async_commit(); }
template <int kPending>
inline void copy_async_wait() {
  shim::copy_async_wait(kPending);
}

struct LoadMatrices {
  uint32_t address, *registers;
};
template <bool kTransposed>
inline void load_matrices_of_warp(void** records) {
  for (int matrix = 0; matrix < 4; matrix++) {
    uint16_t x[8][8];
    for (int row = 0; row < 8; row++)
      memcpy(x[row], shim::shared_memory() + ((LoadMatrices*)records[8 * matrix + row])->address, 16);
    for (int lane = 0; lane < 32; lane++) {
      const int major = lane / 4, minor = 2 * (lane % 4);
      const uint32_t low = kTransposed ? x[minor][major] : x[major][minor];
      const uint32_t high = kTransposed ? x[minor + 1][major] : x[major][minor + 1];
      ((LoadMatrices*)records[lane])->registers[matrix] = low | high << 16;
    }
  }
}
template <bool kTransposed>
inline void load_matrices_of_lane(uint32_t (&r)[4], uint32_t address) {
  if (address % 16) shim::fail("ldmatrix: address %u is not a multiple of 16", address);
  shim::shared_access(address, 16, false);
  LoadMatrices record{address, r};
  shim::warp_collective(kTransposed ? "ldmatrix.trans" : "ldmatrix", &record, load_matrices_of_warp<kTransposed>);
}
inline void load_matrices(uint32_t (&r)[4], uint32_t address) { load_matrices_of_lane<false>(r, address); }
inline void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) { load_matrices_of_lane<true>(r, address); }

template <class T>
inline float to_float(uint16_t bits);
template <>
inline float to_float<bf16>(uint16_t bits) {
  const uint32_t wide = (uint32_t)bits << 16;
  float x;
  memcpy(&x, &wide, 4);
  return x;
}
template <>
inline float to_float<fp16>(uint16_t bits) {
  _Float16 x;
  memcpy(&x, &bits, 2);
  return (float)x;
}
template <class T>
inline uint16_t from_float(float x);
template <>
inline uint16_t from_float<bf16>(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return 0x7fff;
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
template <>
inline uint16_t from_float<fp16>(float x) {
  const _Float16 half = (_Float16)x;
  uint16_t bits;
  memcpy(&bits, &half, 2);
  return bits;
}
template <class T>
inline uint32_t pack(float low, float high) {
  return from_float<T>(low) | (uint32_t)from_float<T>(high) << 16;
}
template <class T>
inline float2 unpack(uint32_t pair) {
  return {to_float<T>((uint16_t)pair), to_float<T>((uint16_t)(pair >> 16))};
}

struct Mma {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};
// Gathers the fragments of 32 lanes, multiplies, scatters.
template <class T>
inline void mma_of_warp(void** records) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; lane++) {
    const auto* r = (const Mma*)records[lane];
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 8; i++)
      a[g + 8 * (i >> 1 & 1)][2 * t + (i & 1) + 8 * (i >> 2)] = to_float<T>((uint16_t)(r->a[i >> 1] >> 16 * (i & 1)));
    for (int i = 0; i < 4; i++)
      b[2 * t + (i & 1) + 8 * (i >> 1)][g] = to_float<T>((uint16_t)(r->b[i >> 1] >> 16 * (i & 1)));
  }
  for (int lane = 0; lane < 32; lane++) {
    auto* r = (Mma*)records[lane];
    for (int i = 0; i < 4; i++) {
      const int row = lane / 4 + 8 * (i >> 1), column = 2 * (lane % 4) + (i & 1);
      double sum = r->d[i];
      for (int k = 0; k < 16; k++) sum += (double)a[row][k] * b[k][column];
      r->d[i] = (float)sum;
    }
  }
}
template <class T>
inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  shim::counters.mma += shim::current->lane == 0;
  Mma record{d, a, {b0, b1}};
  shim::warp_collective("mma", &record, mma_of_warp<T>);
}

inline float exp2_approx(float x) { return exp2f(x); }

struct Exchange {
  uint32_t value, result;
  int source;
};
inline void exchange_of_warp(void** records) {
  for (int lane = 0; lane < 32; lane++)
    ((Exchange*)records[lane])->result = ((Exchange*)records[((Exchange*)records[lane])->source])->value;
}
template <class T>
inline T exchange(T x, int source) {
  Exchange record{0, 0, source & 31};
  memcpy(&record.value, &x, 4);
  shim::warp_collective("shfl", &record, exchange_of_warp);
  memcpy(&x, &record.result, 4);
  return x;
}
template <class T>
inline T exchange_lanes(T x, int lane_mask) {
  return exchange(x, shim::current->lane ^ lane_mask);
}
inline float from_lane(float x, int lane) { return exchange(x, lane); }

}  // namespace peftkern
#endif  // PEFTKERN_SHIM_DEVICE_H_
