// SPDX-License-Identifier: Apache-2.0
// Kernel launches on the host side: selects the device for the duration of a call, knows its limits, turns errors into
// a status.
#ifndef PEFTKERN_CUDA_LAUNCH_H_
#define PEFTKERN_CUDA_LAUNCH_H_

#include <cuda_runtime.h>

#include "../../peftkern.h"
#include "../kernels/common.cuh"

namespace peftkern {

inline int status_of(cudaError_t error) {
  return error == cudaSuccess ? PEFTKERN_OK : PEFTKERN_CUDA_ERROR + (int)error;
}

// Launches the kernels of one call on a stream. Makes the stream's device current and restores the previous one at the
// end.
class Launcher {
 public:
  Launcher(int64_t device, void* stream) : stream_(static_cast<cudaStream_t>(stream)) {
    status_ = status_of(cudaGetDevice(&previous_));
    if (status_ == PEFTKERN_OK && previous_ != (int)device) {
      status_ = status_of(cudaSetDevice((int)device));
      changed_ = status_ == PEFTKERN_OK;
    }
    const auto limit = [&](cudaDeviceAttr attribute, int& value) {
      if (status_ == PEFTKERN_OK) status_ = status_of(cudaDeviceGetAttribute(&value, attribute, (int)device));
    };
    limit(cudaDevAttrMultiProcessorCount, multiprocessors_);
    limit(cudaDevAttrMaxSharedMemoryPerBlockOptin, shared_bytes_);
  }
  ~Launcher() {
    if (changed_) cudaSetDevice(previous_);
  }
  Launcher(const Launcher&) = delete;
  Launcher& operator=(const Launcher&) = delete;

  int status() const { return status_; }
  int multiprocessors() const { return multiprocessors_; }

  // Launches nothing if an earlier launch failed or the grid is empty.
  template <class Params>
  void launch(void (*kernel)(Params), int x, int y, int z, int threads, int shared_bytes, const Params& params) {
    if (status_ != PEFTKERN_OK || x == 0 || y == 0 || z == 0) return;
    if (shared_bytes > shared_bytes_) {
      status_ = PEFTKERN_SHARED_MEMORY;
      return;
    }
    if (shared_bytes > 48 << 10)
      status_ = status_of(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    void* arguments[] = {const_cast<Params*>(&params)};
    if (status_ == PEFTKERN_OK)
      status_ = status_of(cudaLaunchKernel(kernel, dim3(x, y, z), dim3(threads), arguments, shared_bytes, stream_));
  }

 private:
  cudaStream_t stream_;
  int status_, previous_ = 0, multiprocessors_ = 0, shared_bytes_ = 0;
  bool changed_ = false;
};

inline const char* device_error_string(int status) {
  return cudaGetErrorString((cudaError_t)(status - PEFTKERN_CUDA_ERROR));
}

}  // namespace peftkern
#endif  // PEFTKERN_CUDA_LAUNCH_H_
