// SPDX-License-Identifier: Apache-2.0
// The part of the CUDA runtime that csrc/cuda calls, for a CPU with two devices of four multiprocessors and the least
// shared memory of all supported GPUs. A launch runs the kernel before it returns, and a failed check is its error.
#ifndef PEFTKERN_SHIM_CUDA_RUNTIME_H_
#define PEFTKERN_SHIM_CUDA_RUNTIME_H_

#include <cstring>

#include "runtime.h"

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchFailure = 719
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = struct CUstream_st*;

struct dim3 {
  unsigned x, y = 1, z = 1;
  explicit dim3(unsigned x_size, unsigned y_size = 1, unsigned z_size = 1) : x(x_size), y(y_size), z(z_size) {}
};

constexpr int kShimDevices = 2;
constexpr size_t kShimSharedBytes = 99 << 10;

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? shim::message() : error == cudaErrorInvalidDevice ? "invalid device" : "?";
}

inline cudaError_t cudaGetDevice(int* device) { return *device = shim::device, cudaSuccess; }

inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kShimDevices) return cudaErrorInvalidDevice;
  return shim::device = device, cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= kShimDevices) return cudaErrorInvalidDevice;
  *value = attribute == cudaDevAttrMultiProcessorCount ? 4 : (int)kShimSharedBytes;
  return cudaSuccess;
}

template <class Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params), cudaFuncAttribute, int bytes) {
  if ((size_t)bytes > kShimSharedBytes) return cudaErrorInvalidValue;
  return shim::shared_limit((const void*)kernel) = bytes, cudaSuccess;
}

// The kernel under way and its parameters, where the runtime does not take them for global memory.
template <class Params>
struct ShimLaunched {
  static inline void (*kernel)(Params);
  alignas(16) static inline unsigned char params[sizeof(Params)];
  static void run(const void* p) { kernel(*static_cast<const Params*>(p)); }
};

template <class Params>
cudaError_t cudaLaunchKernel(void (*kernel)(Params), dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                             cudaStream_t) {
  using Launched = ShimLaunched<Params>;
  if (shared_bytes > shim::shared_limit((const void*)kernel)) return cudaErrorInvalidValue;
  Launched::kernel = kernel;
  memcpy(Launched::params, arguments[0], sizeof(Params));
  const shim::Launch launch{{grid.x, grid.y, grid.z}, (int)block.x,     (int)shared_bytes,    Launched::run,
                            Launched::params,         sizeof(Params), (const void*)kernel};
  return shim::launch(launch) ? cudaSuccess : cudaErrorLaunchFailure;
}

#endif  // PEFTKERN_SHIM_CUDA_RUNTIME_H_
