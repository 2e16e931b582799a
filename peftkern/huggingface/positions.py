# SPDX-License-Identifier: Apache-2.0
"""Tables of learned positions, which a prefix makes too short sooner than a model's own checks expect."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn
from transformers.utils.import_utils import is_tracing

from .cache import PrefixCache

__all__ = ["PositionTable", "find_position_tables"]


class PositionTable:
    """Raises where a sequence behind a prefix runs off the table, before an index error or a device assertion does.

    Args:
        table: the embedding of positions.
        owner: the module that it belongs to.
    """

    def __init__(self, table: nn.Embedding, owner: nn.Module) -> None:
        self.owner = owner
        self.padding_idx = table.padding_idx
        # Rows before position 0: a fixed number (OPT, BART), or those up to the padding's (RoBERTa).
        self.first = int(getattr(table, "offset", 0 if self.padding_idx is None else self.padding_idx + 1))
        self.num_positions = table.num_embeddings - self.first
        self.cache: PrefixCache | None = None
        self.num_tokens = 0
        self.handle = table.register_forward_pre_hook(self.check_lookup, with_kwargs=True)

    def begin(self, cache: PrefixCache | None, kwargs: dict[str, Any]) -> None:
        """A forward of the backbone starts; ``cache`` is None if it has no prefix."""
        self.cache = cache
        if cache is None:
            return
        input_ids: Tensor | None = kwargs.get("input_ids")
        tokens: Tensor = kwargs["inputs_embeds"] if input_ids is None else input_ids
        self.num_tokens = tokens.shape[1]
        # BERT and its kin cut positions and token types out of a buffer, before they look anything up.
        if not hasattr(self.owner, "position_ids") or kwargs.get("position_ids") is not None:
            return
        num_tokens = self.num_tokens
        if self.padding_idx is not None and input_ids is not None and input_ids.numel() and not is_tracing(input_ids):
            num_tokens = int((input_ids != self.padding_idx).sum(1).max())  # padding has one row for all
        if cache.get_seq_length() + num_tokens > self.num_positions:
            self._fail(cache, num_tokens)

    def check_lookup(self, module: nn.Embedding, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook on the table. OPT and BART add the first row themselves; all others are handed row numbers."""
        if self.cache is None:
            return
        rows: Tensor = kwargs["position_ids"] if "position_ids" in kwargs else args[0]
        limit = self.num_positions + (0 if hasattr(module, "offset") else self.first)
        if not is_tracing(rows) and rows.numel() and int(rows.max()) >= limit:
            self._fail(self.cache, self.num_tokens)

    def _fail(self, cache: PrefixCache, num_tokens: int) -> None:
        raise ValueError(
            f"input_ids: expected at most {self.num_positions} positions, the length of the model's position table, "
            f"got {cache.get_seq_length() + num_tokens}, of which the prefix takes {cache.offset}; shorten the "
            "sequence, or patch a PrefixKV with shift_positions=False, which takes none"
        )


def find_position_tables(model: nn.Module) -> list[PositionTable]:
    """The embeddings of ``model`` that are named after positions, watched from here on."""
    tables = []
    for name, module in model.named_modules():
        owner, _, attribute = name.rpartition(".")
        if isinstance(module, nn.Embedding) and re.search("pos|wpe", attribute):
            tables.append(PositionTable(module, model.get_submodule(owner)))
    return tables
