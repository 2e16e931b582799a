// SPDX-License-Identifier: Apache-2.0
#define PEFTKERN_ISA portable
#define PEFTKERN_LANES 4
#include "../kernels.h"

PEFTKERN_DEFINE_KERNELS(Fp32)
