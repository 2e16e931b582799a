# SPDX-License-Identifier: Apache-2.0
"""Relative position biases (T5 and its kin) that reach back over the prefix."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["SpanningBias"]


class SpanningBias:
    """Makes an attention module's ``compute_bias`` return [1, Hq, S, P + T] for the prefix and the sequence.

    The module asks for the T keys that it sees, from the position that its cache tells, or from 0 where checkpointing
    took the cache away. Relative positions need neither: the queries are the last of the P + T positions.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.span = 0
        self.handle = module.register_forward_pre_hook(self.note_span, with_kwargs=True)
        module.compute_bias = self.compute_bias

    def remove(self) -> None:
        """Give the module its own method back."""
        self.handle.remove()
        self.module.__dict__.pop("compute_bias", None)

    def note_span(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook: how many prefix tokens this call has."""
        cache = kwargs.get("peftkern_prefix")
        self.span = 0 if cache is None else cache.span

    def compute_bias(
        self, query_length: int, key_length: int, device: Any = None, past_seen_tokens: int = 0
    ) -> Tensor:
        """In place of the module's, for the same arguments."""
        if self.span:
            key_length += self.span
            past_seen_tokens = key_length - query_length
        original = type(self.module).compute_bias
        return original(  # type: ignore[no-any-return]
            self.module, query_length, key_length, device=device, past_seen_tokens=past_seen_tokens
        )
