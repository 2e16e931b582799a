# SPDX-License-Identifier: Apache-2.0
"""Extends relative position biases (T5 and its relatives) over the prefix."""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor, nn

from .cache import PrefixCache
from .wiring import Wiring

__all__ = ["SpanningBias"]


class _Calls(threading.local):
    """The running attention modules of this thread, with the number of their prefix tokens, innermost last."""

    spans: tuple[tuple[Any, int], ...] = ()


# One per process instead of one per module, so that models can be copied while they run.
_calls = _Calls()


class SpanningBias:
    """Makes an attention module's ``compute_bias`` return [1, Hq, S, P + T] for the prefix and the sequence.

    The module requests biases for T keys, starting at the position that its cache reports, or at 0 if checkpointing
    has removed the cache. Neither number is needed: the queries are the last of the P + T positions.
    """

    def __init__(self, module: Any) -> None:
        self.module = module

    def install(self, wiring: Wiring) -> None:
        """Replace the module's ``compute_bias`` by :meth:`compute_bias`."""
        wiring.add_hooks(
            self.module.register_forward_pre_hook(self.begin, with_kwargs=True),
            self.module.register_forward_hook(self.finish, always_call=True),
        )
        wiring.set_attribute(self.module, "compute_bias", self.compute_bias)

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook: record the number of prefix tokens of this call."""
        cache = kwargs.get("peftkern_prefix")
        _calls.spans = (*_calls.spans, (module, cache.span if isinstance(cache, PrefixCache) else 0))

    def finish(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook: the call has returned or raised."""
        _calls.spans = _calls.spans[:-1]

    def compute_bias(
        self, query_length: int, key_length: int, device: Any = None, past_seen_tokens: int = 0
    ) -> Tensor:
        """Replaces the method of the module, with the same arguments."""
        module, span = _calls.spans[-1] if _calls.spans else (self.module, 0)
        if span:
            key_length += span
            past_seen_tokens = key_length - query_length
        original = type(self.module).compute_bias
        return original(  # type: ignore[no-any-return]
            module, query_length, key_length, device=device, past_seen_tokens=past_seen_tokens
        )
