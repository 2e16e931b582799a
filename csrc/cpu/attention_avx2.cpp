// SPDX-License-Identifier: Apache-2.0
#define PEFTKERN_ISA avx2
#define PEFTKERN_LANES 8
#include "attention_backward.h"
#include "attention_decode.h"
