# SPDX-License-Identifier: Apache-2.0
"""Features of a call: one alone, or several together, so that a few calls have them all."""

from __future__ import annotations

import dataclasses
from typing import Any

from peftkern.testing.cases import FEATURES, Shape, feature

#: Sets that have every feature. One kernel has the slope of a softcap and the loops of a bias.
SETS = (
    "plain", "scale key_mask kv_cache window softcap", "narrow_values bias softcap",
    "bank wide_values sinks gate dropout", "non_causal ragged_bank prefix_bias", "packed packed_window",
    "packed_prompt", "packed_shared", "packed_shared_window", "packed_several",
    "window_after_prefix several_prefixes", "bias_row packed_bank",
)  # fmt: skip
assert {name for names in SETS for name in names.split()} == set(FEATURES)


def together(names: str, shape: Shape) -> tuple[Shape, dict[str, Any]]:
    """Turn on features, named with spaces between them; of options that two of them set, the last one's is kept.

    ``kv_cache`` has 15 cached keys.
    """
    options: dict[str, Any] = {}
    for name in names.split():
        shape = dataclasses.replace(shape, T=shape.S + 15) if name == "kv_cache" else feature(name, shape)[0]
    for name in names.split():
        options.update(feature(name, shape)[1])
    return shape, options
