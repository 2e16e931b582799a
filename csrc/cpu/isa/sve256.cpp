// SPDX-License-Identifier: Apache-2.0
#define PEFTKERN_ISA sve256
#define PEFTKERN_LANES 8
#include "../kernels.h"

PEFTKERN_DEFINE_KERNELS(Fp32)
