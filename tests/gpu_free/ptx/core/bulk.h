// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "memory.h"

namespace ptx {
inline bool complete_bulk_copy(Machine&) { return false; }
}  // namespace ptx
