# SPDX-License-Identifier: Apache-2.0
"""What identifies a model, so that results of another one are not taken for its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import PREFIX_NAME

__all__ = ["fingerprint"]

#: Values of a weight that count each for itself.
_SAMPLE = 64
#: Values of a weight that are summed at once.
_CHUNK = 1 << 22
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
#: What a configuration says about the file that it is from.
_ORIGIN = ("_name_or_path", "architectures", "dtype", "transformers_version")


def fingerprint(model: Any) -> str:
    """SHA-256 of a model's configuration and weights, without the prefix of a patch.

    A weight counts with its name, dtype, shape, the sum of its bits as integers, and a sample of its values. The sum
    is exact in whatever order it is computed, so the same model has the same fingerprint on every device.
    """
    config = {name: value for name, value in model.config.to_dict().items() if name not in _ORIGIN}
    weights = [
        [name, *map(_summary, _parts(value.detach()))]
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor) and PREFIX_NAME not in name.split(".")
    ]
    return hashlib.sha256(json.dumps([config, weights], sort_keys=True, default=str).encode()).hexdigest()


def _parts(value: Tensor) -> Iterator[Tensor]:
    """The plain tensors in a tensor subclass, such as a quantized weight."""
    if not hasattr(value, "__tensor_flatten__"):
        yield value
        return
    for name in value.__tensor_flatten__()[0]:
        yield from _parts(getattr(value, name))


def _summary(value: Tensor) -> list[Any]:
    shape = [str(value.dtype), list(value.shape)]
    if value.is_meta or not value.numel():  # the values of an offloaded weight are elsewhere
        return shape
    bits = value.view(_INTEGERS[value.element_size()]).flatten()
    total = sum(int(part.sum(dtype=torch.int64)) for part in bits.split(_CHUNK))
    return [*shape, total, bits[:: max(1, len(bits) // _SAMPLE)].tolist()]
