# SPDX-License-Identifier: Apache-2.0
"""How the keys and values of several layers lie in one flat parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from .layer_shapes import LayerShape
from .model_info import KeyValue

__all__ = ["Group", "checked", "groups_of", "shares_parameter", "with_layers_that_share"]


@dataclass(frozen=True)
class Group:
    """Layers whose keys and values lie in one parameter, [P, width] or [A, P, width] in a bank.

    A single layer has [P, Hkv * D + Hkv * D_v]. Several layers have PEFT's layout [P, L * 2 * Hkv * D]: the keys and
    the values of the first layer, of the second layer, and so on, each with the largest Hkv and D of all layers. A
    layer with fewer heads or a smaller head dim uses the first ones, as in PEFT.

    Attributes:
        layers: the layers.
        length: P.
        shapes: of each layer.
    """

    layers: range
    length: int
    shapes: tuple[LayerShape, ...]

    @property
    def cell(self) -> tuple[int, int]:
        """The largest (Hkv, D)."""
        return max(shape.num_kv_heads for shape in self.shapes), max(shape.head_dim for shape in self.shapes)

    @property
    def width(self) -> int:
        """Numbers per token."""
        if len(self.layers) == 1:
            return self.shapes[0].width
        heads, dim = self.cell
        return len(self.layers) * 2 * heads * dim

    def views(self, block: Tensor) -> list[KeyValue]:
        """Views (key, value) [(A,) Hkv, P, D] of each layer, from one ``unbind`` or ``split`` of [(A,) P, width]."""
        if len(self.layers) == 1:
            heads, dim, value_dim = self.shapes[0]
            key, value = block.split([heads * dim, heads * value_dim], -1)
            return [tuple(x.unflatten(-1, (heads, -1)).transpose(-3, -2) for x in (key, value))]  # type: ignore[list-item]
        cells = block.unflatten(-1, (2 * len(self.layers), *self.cell)).unbind(-3)
        pieces = [cell.transpose(-3, -2) for cell in cells]
        return [
            (_cut(key, shape), _cut(value, shape))
            for shape, key, value in zip(self.shapes, pieces[::2], pieces[1::2], strict=True)
        ]

    def block(self, kv: Sequence[KeyValue]) -> Tensor:
        """The first P tokens of (key, value) [(A,) Hkv, >= P, D] of each layer as [(A,) P, width].

        Cells that no layer reads are 0.
        """
        flat = []
        for pair in kv:
            for x in pair:
                if len(self.layers) > 1:
                    heads, dim = self.cell
                    x = pad(x, (0, dim - x.shape[-1], 0, 0, 0, heads - x.shape[-3]))
                flat.append(x[..., : self.length, :].transpose(-3, -2).flatten(-2))
        return torch.cat(flat, -1)


def _cut(x: Tensor, shape: LayerShape) -> Tensor:
    """The part of a cell [..., Hkv, P, D] that a layer reads."""
    if (x.shape[-3], x.shape[-1]) == shape[:2]:
        return x
    return x[..., : shape.num_kv_heads, :, : shape.head_dim]


def shares_parameter(lengths: Sequence[int], shapes: Sequence[LayerShape | None]) -> bool:
    """Whether all layers lie in one parameter, in PEFT's layout."""
    return len(set(lengths)) == 1 and all(s is not None and s.head_dim == s.value_head_dim for s in shapes)


def groups_of(lengths: Sequence[int], shapes: Sequence[LayerShape | None]) -> list[Group]:
    """One group for all layers where :func:`shares_parameter`, otherwise one for each layer with a prefix."""
    if shares_parameter(lengths, shapes):
        return [Group(range(len(shapes)), lengths[0], tuple(shape for shape in shapes if shape is not None))]
    return [
        Group(range(layer, layer + 1), length, (shape,))
        for layer, (length, shape) in enumerate(zip(lengths, shapes, strict=True))
        if length and shape is not None
    ]


def checked(layer: int, pair: KeyValue | None, shape: LayerShape, length: int, argument: str = "init") -> KeyValue:
    """The given (key, value) of a layer, if it has the shape that is needed. Otherwise raise, naming ``argument``."""
    for x, dim, name in zip(pair or (None, None), (shape.head_dim, shape.value_head_dim), ("D", "D_v"), strict=True):
        got = None if x is None else list(x.shape)
        if got is None or len(got) != 3 or (got[0], got[2]) != (shape.num_kv_heads, dim) or got[1] < length:
            raise ValueError(
                f"{argument}: layer {layer}: expected keys and values [Hkv = {shape.num_kv_heads}, at least {length} "
                f"tokens, {name} = {dim}], got {got}"
            )
    return pair  # type: ignore[return-value]


def with_layers_that_share(
    layers: Sequence[KeyValue | None], shapes: Sequence[LayerShape | None], length: int
) -> list[KeyValue | None]:
    """Zeros for the layers that have a shape but cache nothing, because they read the keys of another layer."""
    like = next(pair[0] for pair in layers if pair is not None)
    return [
        pair if pair is not None or shape is None else _zeros(like, shape, length)
        for pair, shape in zip([*layers, *[None] * (len(shapes) - len(layers))], shapes, strict=True)
    ]


def _zeros(like: Tensor, shape: LayerShape, length: int) -> KeyValue:
    heads, dim, value_dim = shape
    return like.new_zeros(heads, length, dim), like.new_zeros(heads, length, value_dim)
