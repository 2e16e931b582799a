# SPDX-License-Identifier: Apache-2.0
"""Tables of learned positions, which a sequence with a prefix can exceed without the model noticing."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.import_utils import is_tracing

from .cache import PrefixCache
from .call_arguments import tokens_of

__all__ = ["PositionTable", "default_positions", "shift_positions", "watch_tables"]


class PositionTable:
    """Raises if a sequence with a prefix exceeds the table, before an index error or a device assertion occurs.

    Args:
        table: the embedding of positions.
    """

    def __init__(self, table: nn.Embedding) -> None:
        self.padding_idx = table.padding_idx
        #: OPT and BART add the number of the first row themselves; all others take row numbers.
        self.takes_positions = hasattr(table, "offset")
        # Rows before position 0: a fixed number (OPT, BART), or the rows up to the padding's (RoBERTa).
        self.first = int(getattr(table, "offset", 0 if self.padding_idx is None else self.padding_idx + 1))
        self.num_positions = table.num_embeddings - self.first
        #: Whether positions count the tokens of the attention mask (OPT).
        self.reads_mask = "attention_mask" in inspect.signature(table.forward).parameters

    def check(self, cache: PrefixCache, kwargs: dict[str, Any]) -> None:
        """Raise ValueError if a forward of the backbone with these arguments exceeds the table.

        Tensor values are read only where shapes do not decide, and on a GPU, where this waits for the device, only if
        the whole sequence with its padding does not fit.
        """
        end = self._end(cache, kwargs)
        if end > self.num_positions:
            raise ValueError(
                f"input_ids: expected at most {self.num_positions} positions, the length of the model's position "
                f"table, got {end}, of which the prefix takes {cache.consumed_positions}; shorten the sequence, or "
                "patch a PrefixKV with shift_positions=False, which takes none"
            )

    def _end(self, cache: PrefixCache, kwargs: dict[str, Any]) -> int:
        """Position after the last token, or any number within the table if it is known to fit."""
        input_ids: Tensor | None = kwargs.get("input_ids")
        position_ids: Tensor | None = kwargs.get("position_ids")
        mask: Tensor | None = kwargs.get("attention_mask")
        tokens: Tensor = kwargs["inputs_embeds"] if input_ids is None else input_ids
        end = cache.end(tokens.shape[1])
        if is_tracing(tokens) or tokens.numel() == 0:
            return end if position_ids is None and self.padding_idx is None and not self.reads_mask else 0
        if position_ids is not None:
            if end <= self.num_positions and position_ids.device.type != "cpu":
                return end
            return int(position_ids.max()) + 1 - (0 if self.takes_positions else self.first)
        if end <= self.num_positions:
            return end
        if self.reads_mask and mask is not None:
            return int(mask.sum(1).max())
        if self.padding_idx is not None and input_ids is not None:  # all padding shares one row
            return cache.get_seq_length() + int((input_ids != self.padding_idx).sum(1).max())
        return end


@contextlib.contextmanager
def watch_tables(model: nn.Module) -> Iterator[list[PositionTable]]:
    """Fill a list with the position tables of ``model``, which must run on two equal tokens within the block.

    Tables are not found by name: an embedding that returns its first two rows for two equal tokens is a table of
    positions.
    """
    tables: dict[nn.Module, PositionTable] = {}

    def look(module: nn.Embedding, args: tuple[Any, ...], output: Tensor) -> None:
        table = PositionTable(module)
        rows = module.weight[table.first : table.first + 2]
        if output.shape[-2:] == rows.shape and torch.equal(output.reshape(-1, rows.shape[-1])[-2:], rows):
            tables[module] = table

    found: list[PositionTable] = []
    handles = [module.register_forward_hook(look) for module in model.modules() if isinstance(module, nn.Embedding)]
    try:
        yield found
        found.extend(tables.values())
    finally:
        for handle in handles:
            handle.remove()


def default_positions(tables: list[PositionTable], kwargs: Mapping[str, Any]) -> Tensor:
    """The positions [B or 1, S] that a model without a cache gives the tokens of a call.

    They count from the first column. Where padding has a row of the table (RoBERTa), that row follows all padding,
    and other tokens are counted from the row behind it.

    Args:
        tables: the model's.
        kwargs: arguments of the call.
    """
    tokens, input_ids = tokens_of(kwargs), kwargs.get("input_ids")
    padding = next((table.padding_idx for table in tables if table.padding_idx is not None), None)
    columns = torch.arange(tokens.shape[1], device=tokens.device)[None]
    if padding is None:
        return columns
    if input_ids is None:
        return columns + padding + 1
    real: Tensor = (input_ids != padding).long()
    return real.cumsum(1) * real + padding


def shift_positions(offset: int, tables: list[PositionTable], kwargs: dict[str, Any]) -> None:
    """Count the prefix in the positions of a call of a model without a cache.

    Args:
        offset: positions that the prefix takes.
        tables: the model's tables of learned positions.
        kwargs: arguments of the call, changed in place.
    """
    given = kwargs.get("position_ids")
    if given is not None:
        kwargs["position_ids"] = given + offset
        return
    positions = default_positions(tables, kwargs)
    padding = next((table.padding_idx for table in tables if table.padding_idx is not None), None)
    shifted = positions + offset
    kwargs["position_ids"] = shifted if padding is None else torch.where(positions == padding, positions, shifted)
