// SPDX-License-Identifier: Apache-2.0
#define PEFTKERN_ISA neon_bf16
#define PEFTKERN_LANES 4
#include "../kernels.h"
#include "../layouts/bf16_pairs.h"

PEFTKERN_DEFINE_KERNELS(Bf16Pairs, Fp32)
