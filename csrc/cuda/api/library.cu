// SPDX-License-Identifier: Apache-2.0
// The entry points that describe the library: its version, its architectures, the texts of its statuses.
#include "../launch/launch.h"

#ifndef PEFTKERN_CUDA_ARCHITECTURES
#define PEFTKERN_CUDA_ARCHITECTURES ""
#endif

using namespace peftkern;

extern "C" {

int peftkern_cuda_abi_version(void) { return PEFTKERN_CUDA_ABI_VERSION; }

const char* peftkern_cuda_architectures(void) { return PEFTKERN_CUDA_ARCHITECTURES; }

const char* peftkern_cuda_error_string(int status) {
  switch (status) {
    case PEFTKERN_OK: return "ok";
    case PEFTKERN_INVALID_ARGUMENT: return "a size, dtype or option out of range";
    case PEFTKERN_MISALIGNED: return "a pointer or stride is not a multiple of 16 bytes";
    case PEFTKERN_SHARED_MEMORY: return "the device has too little shared memory per block";
  }
  return status >= PEFTKERN_CUDA_ERROR ? device_error_string(status) : "unknown status";
}

}  // extern "C"
