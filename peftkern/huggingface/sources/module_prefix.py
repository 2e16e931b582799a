# SPDX-License-Identifier: Apache-2.0
"""A :class:`peftkern.PrefixKV` in a plain Hugging Face model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeGuard, cast

from torch import nn

from ..cache import KeyValue
from ..calls import running
from ..prefix_patch import PrefixPatch, PrefixSource
from ..wiring import Patch

__all__ = ["LayerPrefix", "ModulePrefix", "is_layer_prefix"]

#: Name of the prefix as a submodule of the model.
SUBMODULE = "peftkern_prefix"


class LayerPrefix(Protocol):
    """What a patch needs of a prefix; :class:`peftkern.PrefixKV` is one."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    lengths: Sequence[int]

    def layer_kv(self) -> Sequence[KeyValue | None]:
        """Per layer (prefix_k, prefix_v), each [Hkv, P, D]; anything for a layer of length 0, which is left out."""


def is_layer_prefix(value: object) -> TypeGuard[LayerPrefix]:
    """Not by ``isinstance``, which from Python 3.12 on does not see a module's parameters and buffers."""
    return all(hasattr(value, name) for name in (*LayerPrefix.__annotations__, "layer_kv"))


class ModulePrefix(PrefixSource):
    """The prefix is a submodule of the Hugging Face model.

    Callers speak of the sequence alone: masks, positions and caches are put behind the prefix on their way into the
    backbone.

    Args:
        prefix: the module.
        shift_positions: the sequence's positions start behind the longest prefix; else at 0.
        freeze: switch ``requires_grad`` off for the model's own parameters while patched.
    """

    is_given = False

    def __init__(self, prefix: LayerPrefix, *, shift_positions: bool, freeze: bool) -> None:
        self.prefix = prefix
        self.shift_positions = shift_positions
        self.freeze = freeze

    @property
    def offset(self) -> int:
        """Positions that the model counts for the prefix."""
        return max(self.prefix.lengths, default=0) if self.shift_positions else 0

    def check(self, patch: PrefixPatch) -> None:
        """Raise ValueError unless the shape of the prefix fits the model."""
        patch.check_geometry("prefix", self.prefix.num_layers, self.prefix.num_kv_heads, self.prefix.head_dim)

    def wire(self, patch: Patch) -> None:
        """Make the prefix a submodule of the Hugging Face model, in which it stays when wrappers are taken off."""
        if self.freeze:
            patch.wiring.freeze(patch.model.parameters())
        patch.wiring.add_submodule(patch.base, SUBMODULE, cast(nn.Module, self.prefix))

    def layer_kv(self, patch: PrefixPatch) -> Sequence[KeyValue | None]:
        """Per layer (prefix_k, prefix_v); None for a layer of length 0."""
        # The module that runs: replicas have a prefix of their own.
        prefix = getattr(running.module(patch, patch.base), SUBMODULE)
        pairs: Any = zip(prefix.layer_kv(), self.prefix.lengths, strict=True)
        return [kv if length else None for kv, length in pairs]
