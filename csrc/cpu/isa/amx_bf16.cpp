// SPDX-License-Identifier: Apache-2.0
#define PEFTKERN_ISA amx_bf16
#define PEFTKERN_LANES 16
#include "../kernels.h"
#include "../layouts/amx_tiles.h"

PEFTKERN_DEFINE_KERNELS(AmxTiles, Fp32)
