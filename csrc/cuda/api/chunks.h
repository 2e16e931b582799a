// SPDX-License-Identifier: Apache-2.0
// The launch of the kernels of chunks.cuh.
#ifndef PEFTKERN_CUDA_API_CHUNKS_H_
#define PEFTKERN_CUDA_API_CHUNKS_H_

#include "../kernels/chunks.cuh"
#include "arguments.h"

namespace peftkern {

// Whether a grid can have a thread for every chunk of so many elements.
inline bool copyable(int64_t elements) { return elements >= 0 && elements / 8 < (int64_t)kCopyThreads * 0x7fffffff; }

// Launches `kernel` for `results` tensors of params.count chunks each.
template <class Params>
int launch(int64_t device, void* stream, void (*kernel)(Params), int results, const Params& params) {
  Launcher launcher(device, stream);
  const int blocks = (int)((params.count + kCopyThreads - 1) / kCopyThreads);
  launcher.launch(kernel, blocks, results, 1, kCopyThreads, 0, params);
  return launcher.status();
}

}  // namespace peftkern
#endif  // PEFTKERN_CUDA_API_CHUNKS_H_
