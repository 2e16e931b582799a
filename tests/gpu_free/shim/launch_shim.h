// SPDX-License-Identifier: Apache-2.0
// csrc/cuda/launch/launch.h for a CPU: a launch runs the kernel before it returns, and a failed check is its status.
#ifndef PEFTKERN_SHIM_LAUNCH_H_
#define PEFTKERN_SHIM_LAUNCH_H_

#include "runtime.h"

namespace peftkern {

// The kernel under way and its parameters, where the runtime does not take them for global memory.
template <class Params>
struct Launched {
  static inline void (*kernel)(Params);
  alignas(16) static inline unsigned char params[sizeof(Params)];
  static void run(const void* p) { kernel(*static_cast<const Params*>(p)); }
};

class Launcher {
 public:
  Launcher(int64_t device, void*) : status_(device == 0 ? PEFTKERN_OK : PEFTKERN_INVALID_ARGUMENT) {}

  int status() const { return status_; }
  int multiprocessors() const { return 4; }

  template <class Params>
  void launch(void (*kernel)(Params), int x, int y, int z, int threads, int shared_bytes, const Params& params) {
    if (status_ != PEFTKERN_OK || x == 0 || y == 0 || z == 0) return;
    if (shared_bytes > 99 << 10) {  // the smallest limit among the supported devices
      status_ = PEFTKERN_SHARED_MEMORY;
      return;
    }
    Launched<Params>::kernel = kernel;
    memcpy(Launched<Params>::params, &params, sizeof params);
    const shim::Launch launch{{(unsigned)x, (unsigned)y, (unsigned)z}, threads, shared_bytes, Launched<Params>::run,
                              Launched<Params>::params, (int64_t)sizeof params, (const void*)kernel};
    if (!shim::launch(launch)) status_ = PEFTKERN_CUDA_ERROR;
  }

 private:
  int status_;
};

inline const char* device_error_string(int) { return shim::message(); }

}  // namespace peftkern
#endif  // PEFTKERN_SHIM_LAUNCH_H_
