# SPDX-License-Identifier: Apache-2.0
"""What the parts of a prefix know of the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .layer_shapes import LayerShape
from .model_info import KeyValue

__all__ = ["PrefixFields"]


class PrefixFields(nn.Module):
    """The attributes of a prefix, described in :class:`.PrefixKV`, and the methods that it defines for its parts."""

    parts: dict[str, range]
    shapes: tuple[LayerShape | None, ...]
    lengths: tuple[int, ...]
    positions: int
    num_prefixes: int | None
    prefix_lens: Tensor | None
    num_frozen_tokens: int
    peft_seq2seq_layout: bool
    trainable: nn.ParameterList
    frozen: nn.ParameterList
    learn_length: bool
    gate_logits: nn.Parameter | None

    def layer_kv(self) -> list[KeyValue | None]:
        """(prefix_k, prefix_v) of each layer."""
        raise NotImplementedError

    def _like(self, length: Sequence[int], **options: Any) -> Any:
        """A prefix with the same geometry and other lengths."""
        raise NotImplementedError
