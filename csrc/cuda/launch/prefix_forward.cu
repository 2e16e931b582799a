// SPDX-License-Identifier: Apache-2.0
// Launches of the prefix's forward for one head dim, PEFTKERN_HEAD_DIM.
#include <algorithm>

#include "launches.h"
#include "../kernels/prefix_forward.cuh"

namespace peftkern {

template <int kHeadDim>
void Kernels<kHeadDim>::prefix_forward(Launcher& launcher, int64_t dtype, PrefixForward args) {
  using Shape = PrefixForwardShape<kHeadDim>;
  const Call& call = args.call;
  args.resident = std::min((call.prefix_len + 15) / 16 * 16, Shape::kMaxResident);
  const int resident_blocks = Shape::kBlocks * launcher.multiprocessors();
  const int blocks =
      std::min(row_tiles<Shape::kRows>(call).count(), (resident_blocks + call.num_kv_heads - 1) / call.num_kv_heads);
  const auto run = [&](void (*kernel)(PrefixForward)) {
    launcher.launch(kernel, blocks, call.num_kv_heads, 1, Shape::kThreads, 2 * Tile<kHeadDim>::bytes(args.resident),
                    args);
  };
  const bool options = has_options(call);
  if (dtype == PEFTKERN_FLOAT16)
    run(options ? peftkern::prefix_forward<fp16, kHeadDim, true> : peftkern::prefix_forward<fp16, kHeadDim, false>);
  else
    run(options ? peftkern::prefix_forward<bf16, kHeadDim, true> : peftkern::prefix_forward<bf16, kHeadDim, false>);
}

template void Kernels<PEFTKERN_HEAD_DIM>::prefix_forward(Launcher&, int64_t, PrefixForward);

}  // namespace peftkern
