# SPDX-License-Identifier: Apache-2.0
"""Banks: several prefixes in the same parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch.nn.functional import pad

from .argument_types import checks_arguments
from .prefix_fields import PrefixFields

__all__ = ["Bank"]


class Bank(PrefixFields):
    """The part of a prefix that combines prefixes to a bank, and takes them out again.

    Attributes:
        num_prefixes: A; None for a single prefix.
        prefix_lens: [A] int32, the number of tokens of each prefix, the others of which nothing reads.
    """

    @classmethod
    @checks_arguments()
    def stack(cls, prefixes: Sequence[Self]) -> Self:
        """A bank of copies of prefixes, which may differ in length.

        Args:
            prefixes: for the same model, with the same number of frozen tokens, and one length for all layers each.
                The bank has the dtype of the longest.

        Raises:
            ValueError: naming the prefix that does not fit the first one.

        >>> import peftkern
        >>> geometry = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16}
        >>> bank = peftkern.PrefixKV.stack([peftkern.PrefixKV(None, n, **geometry) for n in (3, 5)])
        >>> bank.prefix_lens
        tensor([3, 5], dtype=torch.int32)
        """
        if not prefixes:
            raise ValueError("prefixes: expected at least one, got none")
        lens = [_length(prefix, f"prefixes[{index}]") for index, prefix in enumerate(prefixes)]
        first = prefixes[lens.index(max(lens))]
        like = next(first.parameters(), torch.empty(0))  # none, if all layers have their own and no tokens
        bank: Self = first._like(
            first.lengths, num_prefixes=len(prefixes), positions=None, dtype=like.dtype, device=like.device
        )
        for index, prefix in enumerate(prefixes):
            bank.replace(index, prefix)
        return bank

    @checks_arguments()
    @torch.no_grad()
    def replace(self, index: int, prefix: Self) -> None:
        """Copy a prefix into the bank in place of another one.

        Parameters, patch and compiled code stay, so a server may replace prefixes between two calls.

        Args:
            index: of the prefix that is replaced.
            prefix: at most as long as the bank.

        Raises:
            ValueError: for a prefix that does not fit the bank.
        """
        self._check_index(index)
        length = _length(prefix, "prefix")
        if prefix.shapes != self.shapes or prefix.num_frozen_tokens != self.num_frozen_tokens:
            raise ValueError(
                f"prefix: expected one for the bank's layers {self.shapes} with {self.num_frozen_tokens} frozen "
                f"tokens, got {prefix.shapes} with {prefix.num_frozen_tokens}"
            )
        if length > max(self.lengths):
            raise ValueError(f"prefix: expected at most the bank's {max(self.lengths)} tokens, got {length}")
        if length:  # without tokens, there may be no parameters
            for own, other in zip(self.frozen, prefix.frozen, strict=True):
                own[index].copy_(other)
            for own, other in zip(self.trainable, prefix.trainable, strict=True):
                own[index].copy_(pad(other, (0, 0, 0, own.shape[1] - other.shape[0])))
        assert self.prefix_lens is not None
        self.prefix_lens[index] = length

    @checks_arguments()
    @torch.no_grad()
    def select(self, index: int) -> Self:
        """A copy of one prefix of the bank, for example to save it in PEFT's format."""
        self._check_index(index)
        assert self.prefix_lens is not None
        length = int(self.prefix_lens[index])
        like = next(self.parameters(), torch.empty(0))
        lengths = [length if n else 0 for n in self.lengths]
        prefix: Self = self._like(lengths, num_prefixes=None, positions=None, dtype=like.dtype, device=like.device)
        if length:
            for own, other in zip(prefix.frozen, self.frozen, strict=True):
                own.copy_(other[index])
            for own, other in zip(prefix.trainable, self.trainable, strict=True):
                own.copy_(other[index, : own.shape[0]])
        return prefix

    def _check_index(self, index: int) -> None:
        if self.num_prefixes is None:
            raise ValueError("self: expected a bank (num_prefixes), got a single prefix")
        if not 0 <= index < self.num_prefixes:
            raise ValueError(f"index: expected 0 to {self.num_prefixes - 1}, got {index}")


def _length(prefix: Any, name: str) -> int:
    """The number of tokens of a single prefix with one length for all layers."""
    if not isinstance(prefix, Bank):
        raise ValueError(f"{name}: expected a PrefixKV, got {type(prefix).__name__}")
    lengths = {n for n, shape in zip(prefix.lengths, prefix.shapes, strict=True) if shape is not None}
    unfit = [
        option
        for option in ("num_prefixes", "projection", "peft_seq2seq_layout", "learn_length", "state")
        if getattr(prefix, option)
    ]
    if lengths and prefix.positions != max(lengths):
        unfit.append("positions")
    if len(lengths) != 1 or unfit:
        got = f"{unfit[0]}={getattr(prefix, unfit[0])}" if unfit else f"lengths {sorted(lengths)}"
        raise ValueError(f"{name}: expected a single prefix of one length for all layers, got {got}")
    return int(lengths.pop())
