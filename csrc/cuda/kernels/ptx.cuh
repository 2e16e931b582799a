// SPDX-License-Identifier: Apache-2.0
// Everything that is not plain C++: the instructions of compute capability 8.0 that the kernels use, and the two 16-bit
// element types. No other file contains inline PTX. tests/gpu_free/shim/device.h implements the same functions for a
// CPU.
#ifndef PEFTKERN_CUDA_PTX_H_
#define PEFTKERN_CUDA_PTX_H_

#include <cstdint>

namespace peftkern {

// Elements in memory. Arithmetic is on fp32, or on pairs packed into 32 bits, the first element in the low half.
struct fp16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

}  // namespace peftkern

#if defined(PEFTKERN_HOST_SHIM)
#include "device.h"
#else

#define PEFTKERN_DEVICE __device__ __forceinline__
#define PEFTKERN_HOST_DEVICE __host__ __device__ __forceinline__
#define PEFTKERN_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define PEFTKERN_PARAMS const __grid_constant__
#define PEFTKERN_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

namespace peftkern {

PEFTKERN_DEVICE uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// 16 bytes from global to shared memory, both 16-byte aligned; if not `valid`, zeros are written and `source` is not
// read.
PEFTKERN_DEVICE void copy_async(uint32_t target, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(valid ? 16 : 0)
               : "memory");
}
PEFTKERN_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending copy groups of this thread are pending.
template <int kPending>
PEFTKERN_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements: lane 8 j + r gives the address of row r of matrix j. Lane l receives, of each,
// the elements (l / 4, 2 (l % 4)) and the next in its row; transposed (2 (l % 4), l / 4) and the next in its column.
PEFTKERN_DEVICE void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
PEFTKERN_DEVICE void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// d += a b: a [16, 16] and b [16, 8] of T, d [16, 8] of fp32. With g = lane / 4 and t = lane % 4:
//   a[0], a[1], a[2], a[3]  rows g, g + 8, g, g + 8 and columns 2 t, 2 t, 2 t + 8, 2 t + 8, and the next column
//   b0, b1                  rows 2 t, 2 t + 8 and the next row, column g
//   d[0..1], d[2..3]        rows g, g + 8, columns 2 t and 2 t + 1
template <class T>
PEFTKERN_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
#define PEFTKERN_MMA(T, name)                                                                    \
  template <>                                                                                    \
  PEFTKERN_DEVICE void mma<T>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                          \
                 ".f32 {%0, %1, %2, %3}, "                                                       \
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                 \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                \
  }
PEFTKERN_MMA(fp16, "f16")
PEFTKERN_MMA(bf16, "bf16")
#undef PEFTKERN_MMA

// Two fp32 to a packed pair, to nearest even.
template <class T>
PEFTKERN_DEVICE uint32_t pack(float low, float high);
template <>
PEFTKERN_DEVICE uint32_t pack<fp16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <>
PEFTKERN_DEVICE uint32_t pack<bf16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

template <class T>
PEFTKERN_DEVICE float2 unpack(uint32_t pair);
template <>
PEFTKERN_DEVICE float2 unpack<fp16>(uint32_t pair) {
  float2 r;
  asm("{.reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
      : "=f"(r.x), "=f"(r.y)
      : "r"(pair));
  return r;
}
template <>
PEFTKERN_DEVICE float2 unpack<bf16>(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

PEFTKERN_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

PEFTKERN_DEVICE uint32_t exchange_lanes(uint32_t x, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, x, lane_mask);
}
PEFTKERN_DEVICE float exchange_lanes(float x, int lane_mask) { return __shfl_xor_sync(0xffffffffu, x, lane_mask); }
PEFTKERN_DEVICE float from_lane(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }

}  // namespace peftkern
#endif  // PEFTKERN_HOST_SHIM
#endif  // PEFTKERN_CUDA_PTX_H_
