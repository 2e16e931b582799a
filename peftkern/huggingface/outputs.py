# SPDX-License-Identifier: Apache-2.0
"""Outputs of a model in the form that its caller expects."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..model_info import CACHE_NAMES, given_cache
from .packing import LogitRows, PackedBatch

__all__ = ["unpack_all", "unpack_logits", "without_cache"]


def unpack_all(packed: PackedBatch, x: Any) -> Any:
    """Hidden states [1, N, E], the logits of a router [N, X], or a tuple of them, unpacked: [B, S, E], [B * S, X]."""
    if isinstance(x, tuple):
        return tuple(unpack_all(packed, y) for y in x)
    if not isinstance(x, Tensor):
        return x
    return packed.unpack(x) if x.dim() > 2 else packed.unpack(x[None]).flatten(0, 1)


def without_cache(kwargs: dict[str, Any], output: Any) -> Any:
    """The output without the cache. ``generate`` would continue with a cache that the caller did not request."""
    if isinstance(output, tuple):
        return tuple(item for item in output if item is not given_cache(kwargs))
    return type(output)(**{key: value for key, value in output.items() if key not in CACHE_NAMES})


def unpack_logits(rows: LogitRows, output: Any, *, deferred: bool) -> Any:
    """The base model's output with unpacked logits.

    Args:
        rows: the rows on which the output layer has run.
        output: a tuple or a ``ModelOutput``.
        deferred: unpack them when they are read. Training steps rarely read the logits of the whole batch, because
            the model has computed the loss.
    """
    if isinstance(output, tuple):  # the logits follow the losses, which are scalars
        place = next(i for i, x in enumerate(output) if x.dim() > 2)
        return (*output[:place], rows.unpack(output[place], deferred=deferred), *output[place + 1 :])
    output["logits"] = rows.unpack(output["logits"], deferred=deferred)
    return output
