// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "memory.h"

namespace ptx {
inline void track_registers(Warp&, const Instruction&) {}
inline bool complete_bulk_copy(Machine&) { return false; }
inline const Definition kHopper[] = {{"hopper", [](Machine&, Warp&, const Instruction&, Mask) {}}};
}  // namespace ptx
