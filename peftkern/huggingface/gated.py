# SPDX-License-Identifier: Apache-2.0
"""A prefix with a softmax of its own, which one attention module reads beside its sequence (LLaMA-Adapter)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import prefix_attention
from .cache import KeyValue, PrefixOptions, like_key

__all__ = ["GatedPrefix"]

#: tanh of it is 1 in every dtype. The op multiplies by tanh(gate), and the values contain the actual factor.
_OPEN = 30.0


@dataclass(eq=False)
class GatedPrefix:
    """The gated prefix of one call of an attention module.

    ``out = attention(q, k, v) + softmax(scale * q key^T) value``

    Attributes:
        key: [Hkv, P, D], without rotary embedding.
        value: [Hkv, P, D], multiplied by the gate. A factor of the values is a factor of the output, and its gradient
            is exact, so the gate may be any number.
        scale: of the scores.
        options: for the attention function.
        apart: whether the module adds the prefix's output itself, instead of the attention function.
        out: [B, S, Hq * D], the prefix's output, if it is apart.
        served: whether the attention function has read the prefix.
    """

    key: Tensor
    value: Tensor
    scale: float
    options: PrefixOptions
    apart: bool
    out: Tensor | None = None
    served: bool = False

    def joins(self, module: nn.Module, dropout: float, scaling: float | None, **kwargs: Any) -> bool:
        """Whether one call of the op computes both parts: not if they differ in scale, dropout, softcap or bias.

        Args:
            module: the attention module.
            dropout, scaling, kwargs: arguments of its attention.
        """
        scaling = self.key.shape[-1] ** -0.5 if scaling is None else scaling
        others = ("softcap", "s_aux", "position_bias", "cu_seq_lens_q")
        alike = dropout == 0.0 and math.isclose(scaling, self.scale) and all(kwargs.get(n) is None for n in others)
        return alike and not self.apart

    def pair(self, key: Tensor) -> KeyValue:
        """Keys and values as attention reads them beside ``key``."""
        self.served = True
        return like_key((self.key, self.value), key)

    def open_gate(self, query: Tensor) -> Tensor:
        """[Hq], the op's gate."""
        return query.new_full((query.shape[1],), _OPEN, dtype=torch.float32)

    def attend(self, query: Tensor, key: Tensor) -> Tensor:
        """The prefix's output alone, [B, S, Hq, D].

        Args:
            query: [B, Hq, S, D].
            key: [B, Hkv, T, D], of the sequence.
        """
        nothing = key[:, :, :0].detach()
        out: Tensor = prefix_attention(
            query, nothing, nothing, *self.pair(key), causal=False, scale=self.scale, backend=self.options.backend
        )
        return out.transpose(1, 2)
