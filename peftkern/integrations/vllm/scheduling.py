# SPDX-License-Identifier: Apache-2.0
"""The half of the connector that lives beside vLLM's scheduler: which request gets which prefix, into which slots."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..prefix_folder import PrefixFolder, ServedPrefix
from .geometry import Shape, check_numbers, check_shapes
from .requests import check, name_of, put_prefix_before, replace_by_stub

__all__ = ["Load", "Scheduling", "Step"]

logger = logging.getLogger("vllm.peftkern")


@dataclass
class Load:
    """Write the last ``len(slots)`` tokens of a prefix into these slots of the paged cache."""

    digest: str
    slots: list[int]


@dataclass
class Step:
    """What the workers do in one step.

    Attributes:
        arrivals: layers of the prefixes, by digest, that the workers do not have yet.
        drops: digests of prefixes that the workers can forget.
        loads: what is written before the model runs.
        failed_blocks: blocks of refused requests. vLLM ends the requests whose blocks are reported as not loaded.
    """

    arrivals: dict[str, Sequence[tuple[Tensor, Tensor] | None]] = field(default_factory=dict)
    drops: set[str] = field(default_factory=set)
    loads: list[Load] = field(default_factory=list)
    failed_blocks: set[int] = field(default_factory=set)


class Scheduling:
    """Bookkeeping of requests with prefixes.

    A request keeps the prefix that its file contained when the request arrived, also when it is preempted and
    computed again. The workers get the tensors from here, once, so that all of them have the same.

    Args:
        folder: the prefixes.
        default: name of the prefix of requests that name none.
        shapes: the model's layers with keys.
        dtypes: in which the model computes and stores keys and values, without those of quantised caches.
        block_size: tokens of a block of the paged cache.
        max_model_len: tokens that a request may have.
    """

    def __init__(
        self,
        folder: PrefixFolder,
        default: str | None,
        shapes: Mapping[int, Shape],
        dtypes: Sequence[torch.dtype],
        block_size: int,
        max_model_len: int,
    ) -> None:
        self.folder, self.default, self.shapes, self.dtypes = folder, default, shapes, dtypes
        self.block_size, self.max_model_len = block_size, max_model_len
        #: The prefix of each unfinished request; None for a refused one.
        self.requests: dict[str, ServedPrefix | None] = {}
        self._sent: set[str] = set()
        self._step = Step()
        # Clients choose salts, too. They cannot guess this one.
        self._nonce = secrets.token_hex(16)

    def add(self, request: Any) -> None:
        """Give a new request its prefix, or refuse it.

        Raises nothing: vLLM ends the engine, with all of its requests, when a connector raises.
        """
        try:
            name = name_of(request.kv_transfer_params, self.default)
            if name is None:
                return
            prefix = self.folder.get(name)
            check_shapes(prefix, self.shapes)
            check_numbers(prefix, self.dtypes)
            check(request, prefix.length, self.max_model_len)
            put_prefix_before(request, prefix.length, f"{self._nonce}:{prefix.digest}")
            self.requests[request.request_id] = prefix
        except Exception as error:
            is_fault = not isinstance(error, ValueError)
            logger.error("Request %s is refused: %s", request.request_id, error, exc_info=is_fault)
            replace_by_stub(request, f"{self._nonce}:refused")
            self.requests[request.request_id] = None

    def num_loaded_tokens(self, request: Any, num_computed_tokens: int) -> int:
        """Tokens that are loaded behind the first ``num_computed_tokens``, which lie in the cache already."""
        if request.request_id not in self.requests:
            return 0
        prefix = self.requests[request.request_id]
        length = 1 if prefix is None else prefix.length
        return max(length - num_computed_tokens, 0)

    def allocated(self, request: Any, block_ids: Sequence[int], num_loaded_tokens: int) -> None:
        """Plan a load into a request's blocks, from its first block on."""
        if not num_loaded_tokens:
            return
        prefix = self.requests[request.request_id]
        if prefix is None:
            self._step.failed_blocks.add(block_ids[0])
            return
        size = self.block_size
        tokens = range(prefix.length - num_loaded_tokens, prefix.length)
        self._step.loads.append(Load(prefix.digest, [block_ids[t // size] * size + t % size for t in tokens]))
        if prefix.digest not in self._sent:
            self._sent.add(prefix.digest)
            self._step.arrivals[prefix.digest] = prefix.layers

    def finish(self, request: Any) -> None:
        """Forget a request."""
        self.requests.pop(request.request_id, None)

    def take_step(self) -> Step:
        """The plan of this step; the next one is empty."""
        unkept = self._sent - self.folder.digests()
        if unkept:
            unkept -= {prefix.digest for prefix in self.requests.values() if prefix is not None}
            self._sent -= unkept
        step, self._step = self._step, Step()
        step.drops = unkept
        return step
