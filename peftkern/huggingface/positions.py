# SPDX-License-Identifier: Apache-2.0
"""Tables of learned positions, which a prefix makes too short sooner than a model's own checks expect."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.import_utils import is_tracing

from .cache import PrefixCache

__all__ = ["PositionTable", "watch_tables"]


class PositionTable:
    """Raises where a sequence behind a prefix runs off the table, before an index error or a device assertion does.

    Args:
        table: the embedding of positions.
    """

    def __init__(self, table: nn.Embedding) -> None:
        self.padding_idx = table.padding_idx
        #: OPT and BART add the first row themselves; all others are handed row numbers.
        self.takes_positions = hasattr(table, "offset")
        # Rows before position 0: a fixed number (OPT, BART), or those up to the padding's (RoBERTa).
        self.first = int(getattr(table, "offset", 0 if self.padding_idx is None else self.padding_idx + 1))
        self.num_positions = table.num_embeddings - self.first
        #: Whether positions count the tokens of the attention mask (OPT).
        self.reads_mask = "attention_mask" in inspect.signature(table.forward).parameters

    def check(self, cache: PrefixCache, kwargs: dict[str, Any]) -> None:
        """Raise ValueError unless a forward of the backbone with these arguments stays on the table.

        Values of tensors are looked at only where their shapes leave it open, and on a GPU, where that waits for the
        device, only if the whole sequence with its padding does not fit.
        """
        end = self._end(cache, kwargs)
        if end > self.num_positions:
            raise ValueError(
                f"input_ids: expected at most {self.num_positions} positions, the length of the model's position "
                f"table, got {end}, of which the prefix takes {cache.consumed_positions}; shorten the sequence, or "
                "patch a PrefixKV with shift_positions=False, which takes none"
            )

    def _end(self, cache: PrefixCache, kwargs: dict[str, Any]) -> int:
        """Position after the last token, or a bound of it that is on the table."""
        input_ids: Tensor | None = kwargs.get("input_ids")
        position_ids: Tensor | None = kwargs.get("position_ids")
        mask: Tensor | None = kwargs.get("attention_mask")
        tokens: Tensor = kwargs["inputs_embeds"] if input_ids is None else input_ids
        end: int = cache.get_seq_length() + tokens.shape[1]
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
        if self.padding_idx is not None and input_ids is not None:  # padding has one row for all
            return cache.get_seq_length() + int((input_ids != self.padding_idx).sum(1).max())
        return end


@contextlib.contextmanager
def watch_tables(model: nn.Module) -> Iterator[list[PositionTable]]:
    """Fills a list with the position tables of ``model`` while it runs on two equal tokens without a prefix.

    No names: an embedding that gives two equal tokens its first two rows is one of positions.
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
