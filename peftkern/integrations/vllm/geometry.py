# SPDX-License-Identifier: Apache-2.0
"""Which layers, heads and dtypes a model's keys have, and which heads are a tensor-parallel rank's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..prefix_folder import ServedPrefix

__all__ = ["Shape", "check_numbers", "check_shapes", "layer_index", "layers_by_index", "rank_heads"]


class Shape(NamedTuple):
    """Of one layer, over all ranks."""

    num_kv_heads: int
    head_dim: int
    value_head_dim: int


def layer_index(name: str) -> int:
    """The number in a layer's name, such as 5 in ``model.layers.5.self_attn.attn``.

    Raises:
        ValueError: for a name without a number or with several.
    """
    numbers = [int(part) for part in name.split(".") if part.isdecimal()]
    if len(numbers) != 1:
        raise ValueError(f"model: expected attention layers with one number in their names, got {name!r}")
    return numbers[0]


def layers_by_index(names: Iterable[str]) -> dict[int, str]:
    """Names of layers by their numbers.

    Raises:
        ValueError: for two layers of one number (cross-attention, draft models).
    """
    found: dict[int, str] = {}
    for name in names:
        other = found.setdefault(layer_index(name), name)
        if other != name:
            raise ValueError(f"model: expected one attention layer of each number, got {other!r} and {name!r}")
    return found


def check_shapes(prefix: ServedPrefix, shapes: Mapping[int, Shape]) -> None:
    """Raise ValueError if a prefix was made for a model of other layers than ``shapes``, of those with keys."""
    layers = {index for index, pair in enumerate(prefix.layers) if pair is not None}
    if layers != set(shapes):
        raise ValueError(
            f"prefix {prefix.name!r}: expected keys of the model's {len(shapes)} layers with a cache, got "
            f"{len(layers)} layers{_first_difference(layers, set(shapes))}"
        )
    for index, shape in shapes.items():
        pair = prefix.layers[index]
        assert pair is not None
        key, value = pair
        found = Shape(key.shape[1], key.shape[2], value.shape[2])
        if found != shape:
            raise ValueError(f"prefix {prefix.name!r}: expected a layer {index} of {shape}, got {found}")


def check_numbers(prefix: ServedPrefix, dtypes: Iterable[torch.dtype]) -> None:
    """Raise ValueError if a number of a prefix is too large for one of the dtypes, which would make it infinite."""
    for dtype in dtypes:
        most = torch.finfo(dtype).max
        if prefix.largest > most:
            raise ValueError(
                f"prefix {prefix.name!r}: expected numbers up to {most:g}, because the model's keys and values are "
                f"{dtype}, got {prefix.largest:g}"
            )


def _first_difference(found: set[int], expected: set[int]) -> str:
    return f" (layer {min(found ^ expected)} is in one of the two only)"


def rank_heads(x: Tensor, num_kv_heads: int, rank: int, world_size: int) -> Tensor:
    """A rank's share [P, num_kv_heads, D] of keys or values [P, Hkv, D].

    vLLM gives each rank Hkv / world_size consecutive heads, or with more ranks than heads one head, which
    world_size / Hkv consecutive ranks share.
    """
    heads = x.shape[1]
    if num_kv_heads != max(heads // world_size, 1) or max(heads, world_size) % min(heads, world_size):
        raise ValueError(
            f"prefix: expected heads that {world_size} ranks of {num_kv_heads} heads share evenly, got {heads}"
        )
    first = rank * heads // world_size
    return x[:, first : first + num_kv_heads]
