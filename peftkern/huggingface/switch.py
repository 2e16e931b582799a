# SPDX-License-Identifier: Apache-2.0
"""A patched model reads another prefix for a while, without being patched again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from torch import nn

from ..argument_types import checks_arguments
from ..overrides import overridden
from .sources.module_prefix import ModulePrefix, is_layer_prefix
from .wiring import PATCH, changing

__all__ = ["packing", "switched"]

Model = TypeVar("Model", bound=nn.Module)


@checks_arguments()
@contextlib.contextmanager
def switched(model: Model, prefix: nn.Module) -> Iterator[Model]:
    """Within the block, a patched model reads ``prefix`` in place of its own.

    A teacher and a student that differ only in what they read are then one model::

        patch(model, cartridge, freeze=True)
        with switched(model, document), torch.no_grad():
            teacher = model(**batch).logits
        student = model(**batch).logits

    Blocks of several threads may overlap: the one that was entered last and has not ended counts.

    Nothing is copied or tried again. Sequences begin after the tokens of the prefix that is read. A cache that was
    filled in the block contains the block's prefix, and is continued only there. A model that is unpatched in the
    block stays so.

    Args:
        model: patched with a :class:`peftkern.PrefixKV`.
        prefix: for the same layers. It may have another length. A bank needs a model that was patched with a bank,
            where a single prefix is allowed too.

    Raises:
        ValueError: for a model without such a patch, or a prefix of another kind.
    """
    change: Any = model.__dict__.get(PATCH)
    source = getattr(change, "source", None)
    if not isinstance(source, ModulePrefix):
        got = "one that is not patched" if change is None else "one with another kind of prefix or prompt"
        raise ValueError(f"model: expected one that was given to patch with a PrefixKV, got {got}")
    if not is_layer_prefix(prefix):
        raise ValueError(f"prefix: expected a PrefixKV, got {type(prefix).__name__}")
    with changing(model):
        entry = source.enter(change, prefix)
    try:
        yield model
    finally:
        with changing(model):
            source.leave(entry, change if model.__dict__.get(PATCH) is change else None)


@contextlib.contextmanager
def packing(model: nn.Module, batch: Mapping[str, Any]) -> Iterator[bool]:
    """Within the block, forwards with gradients are training steps, which are packed, while dropout stays as it is.

    Args:
        model: patched with a :class:`peftkern.PrefixKV`.
        batch: arguments of a forward, several sequences per row.

    Yields:
        Whether the model can run such batches. If it cannot, nothing is changed.
    """
    patch: Any = model.__dict__[PATCH]
    if patch.packer.why_unpackable(batch) is not None:
        yield False
        return
    with overridden([patch.backbone], "training", True):
        yield True
