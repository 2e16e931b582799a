// SPDX-License-Identifier: Apache-2.0
#define PEFTKERN_ISA amx_bf16
#define PEFTKERN_LANES 16
#include "attention_backward.h"
#include "attention_decode.h"
