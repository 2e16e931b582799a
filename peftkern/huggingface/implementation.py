# SPDX-License-Identifier: Apache-2.0
"""Refuses calls of a patched model whose attention implementation has been replaced since."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention import NAME, Implementation
from .survey import PrefixLayerInfo

__all__ = ["check_implementation", "without_prefix"]


def check_implementation(model: PreTrainedModel, layers: Iterable[PrefixLayerInfo]) -> None:
    """Raise ValueError if the attention of ``transformers`` has replaced ours in a patched model.

    It would run without the prefix, and with masks and biases of another width. Functions of others may call ours.

    Args:
        model: runs the layers.
        layers: those with a prefix.
    """
    implementation = model.config._attn_implementation
    if isinstance(implementation, Implementation) or implementation == NAME:
        return
    function = ALL_ATTENTION_FUNCTIONS.get(implementation)
    if function is None or function.__module__.startswith("transformers."):  # the eager one is in the modeling file
        raise without_prefix("would run", model, [layer.name for layer in layers])


def without_prefix(runs: str, model: PreTrainedModel, names: Iterable[str]) -> ValueError:
    """The error for attention that runs without its prefix, because its implementation is not ours."""
    return ValueError(
        f"model: attention {runs} without its prefix in {', '.join(names)}; expected 'peftkern' as attention "
        f"implementation, got {str(model.config._attn_implementation)!r}; unpatch the model and patch it again"
    )
