# SPDX-License-Identifier: Apache-2.0
"""A :class:`peftkern.PrefixKV` in a plain Hugging Face model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeGuard, cast

from torch import nn

from ...checkpoint import PREFIX_NAME
from ...layer_shapes import LayerShape
from ..adapter_folders import AdapterFolder
from ..cache import KeyValue
from ..calls import running
from ..prefix_patch import PrefixPatch, PrefixSource
from ..wiring import Patch

__all__ = ["LayerPrefix", "ModulePrefix", "is_layer_prefix"]


class LayerPrefix(Protocol):
    """The interface of a prefix module, which :class:`peftkern.PrefixKV` implements."""

    shapes: Sequence[LayerShape | None]
    lengths: Sequence[int]

    def layer_kv(self) -> Sequence[KeyValue | None]:
        """Per layer (prefix_k, prefix_v), [Hkv, P, D] and [Hkv, P, D_v]. Those of length 0 are ignored."""


def is_layer_prefix(value: object) -> TypeGuard[LayerPrefix]:
    """Whether ``value`` is a :class:`LayerPrefix`. From Python 3.12, ``isinstance`` ignores a module's parameters."""
    return all(hasattr(value, name) for name in (*LayerPrefix.__annotations__, "layer_kv"))


class ModulePrefix(PrefixSource):
    """The prefix is a submodule of the Hugging Face model.

    Callers pass masks, positions and caches of the sequence alone. The hook on the backbone adds the prefix to them.

    Args:
        prefix: the module.
        shift_positions: the sequence's positions start after the longest prefix. False: they start at 0.
        freeze: clear ``requires_grad`` of the model's own parameters while it is patched.
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
        patch.check_geometry("prefix", self.prefix.shapes)

    def wire(self, patch: Patch) -> None:
        """Make the prefix a submodule of the Hugging Face model, so that it stays when wrappers are removed."""
        if self.freeze:
            patch.wiring.freeze(patch.model.parameters())
        patch.wiring.add_submodule(patch.base, PREFIX_NAME, cast(nn.Module, self.prefix))
        AdapterFolder.install(patch, PREFIX_NAME, cast(nn.Module, self.prefix))

    def layer_kv(self, patch: PrefixPatch) -> Sequence[KeyValue | None]:
        """Per layer (prefix_k, prefix_v); None for a layer of length 0."""
        # The module that runs may be a replica, which has its own copy of the prefix.
        prefix = getattr(running.module(patch, patch.base), PREFIX_NAME)
        pairs: Any = zip(prefix.layer_kv(), self.prefix.lengths, strict=True)
        return [kv if length else None for kv, length in pairs]
