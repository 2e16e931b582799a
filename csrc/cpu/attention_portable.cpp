// SPDX-License-Identifier: Apache-2.0
#define PEFTKERN_ISA portable
#define PEFTKERN_LANES 4
#include "attention_backward.h"
#include "attention_decode.h"
