// SPDX-License-Identifier: Apache-2.0
#define PEFTKERN_ISA avx512
#define PEFTKERN_LANES 16
#include "../kernels.h"

PEFTKERN_DEFINE_KERNELS(Fp32)
