# SPDX-License-Identifier: Apache-2.0
"""Where a patch for a prefix of keys and values gets its prefix from."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..prefix_parts import DECODER
from ..recurrent_state import LayerState
from .cache import KeyValue, PrefixCache
from .mixed import PrefixBank
from .wiring import Source

__all__ = ["PrefixSource"]


class PrefixSource(Source):
    """Provides the prefix keys and values of every layer."""

    @property
    @abstractmethod
    def offset(self) -> int:
        """Positions that the model counts for the prefix."""

    @abstractmethod
    def check(self, patch: Any) -> None:
        """Raise ValueError unless the shape of the prefix fits the model."""

    @property
    def parts(self) -> Sequence[str]:
        """The parts of an encoder-decoder that have a prefix: see :class:`peftkern.PrefixKV`."""
        return DECODER

    @abstractmethod
    def layer_kv(self, patch: Any, part: str = "decoder") -> Sequence[KeyValue | None]:
        """Per layer of a part (prefix_k, prefix_v), each [Hkv, P, D]; None for a layer without a prefix."""

    @property
    def has_bank(self) -> bool:
        """Whether calls select prefixes of a bank."""
        return False

    def bank_of(self, patch: Any, prefix_ids: Any, batch: int) -> PrefixBank | None:
        """The prefixes that a call selects for its samples; None without a bank.

        Args:
            prefix_ids: that argument of the call.
            batch: B.
        """
        return None

    def layer_bias(self, patch: Any) -> Sequence[Tensor | None]:
        """Per layer [P], added to the scores of the prefix tokens, or None; empty if no layer has one."""
        return ()

    @property
    def has_bias(self) -> bool:
        """Whether some layer has a bias."""
        return False

    @property
    def has_gaps(self) -> bool:
        """Whether tokens may have been removed between others, so that a token's place does not tell its position."""
        return False

    def layer_states(self, patch: Any) -> Sequence[Sequence[LayerState]]:
        """For each layer, its states [1, ...] before the first token; empty for fresh states."""
        return ()

    #: Whether parts of the model that compute positions and masks of images count the prefix as text, as in PEFT.
    keeps_bugs: bool = False

    def stock_cache(self, cache: PrefixCache, batch: int, backbone: PreTrainedModel) -> Any:
        """A stock cache with one copy of the prefix per sample."""
        return cache.as_stock(batch, backbone.dtype, backbone.config)
