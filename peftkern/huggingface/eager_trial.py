# SPDX-License-Identifier: Apache-2.0
"""The trial of a model without a cache, in which a stock model could hold the prefix.

The patched model is compared with two runs of the stock model: as it is, and with eager attention whose keys and
values begin with the prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..eager_attention import attention_of, use_attention
from .cache import WITHOUT_PREFIX, PrefixCache
from .call_arguments import forward_arguments
from .positions import PositionTable, default_positions
from .trial import Outputs, Trial, difference

__all__ = ["NAME", "EagerTrial", "attention_with_prefix"]

#: Name of :func:`attention_with_prefix` among the implementations of ``transformers``.
NAME = "peftkern_eager_prefix"


class EagerTrial(Trial):
    """Runs of a backbone that takes no cache, in which windows do not hide the prefix."""

    in_window = False

    def _try_prefix(self) -> str | None:
        ids, mask = self.ids, self.mask
        with use_attention(self.backbone, NAME, attention_with_prefix):
            with self.measured_linear_layers():
                stock = self.run(self.cache(stores=False), ids, mask)
            moved = [kv and (self.round_otherwise(kv[0]), self.round_otherwise(kv[1])) for kv in self.prefix]
            self._rounding = self.measure_rounding(self.run(self.cache(False, moved), ids, mask), stock, mask)
        what = f"{self.kind} with a prefix"
        got = self.run(self.cache(stores=False), ids[:1], None)
        reason = self.compare(what, got, [x[:1] for x in stock], None, self._rounding)
        if reason is None:
            got = self.run(self.cache(stores=False), ids, mask)
            reason = self.compare(f"{what} and padding", got, stock, mask, self._rounding)
        if reason is not None:
            return reason
        nothing = [kv and (kv[0][:, :0], kv[1][:, :0]) for kv in self.prefix]
        got, stock = self.run(self.cache(False, nothing), ids, mask), self._run_stock()
        return self.compare(f"{self.kind} with an empty prefix", got, stock, mask, self.worst_rounding())

    def _run_stock(self, position_ids: Tensor | None = None) -> Outputs:
        """Outputs of the backbone without a prefix, with the attention that it had before the patch."""
        positions: dict[str, Any] = {} if position_ids is None else {"position_ids": position_ids}
        return self.recorded(
            input_ids=self.ids, attention_mask=self.mask, peftkern_prefix=WITHOUT_PREFIX, **positions
        )

    def run(self, cache: Any, tokens: Tensor, mask: Tensor | None, also: Sequence[nn.Module] = ()) -> Outputs:
        """:meth:`recorded` with a prefix."""
        return self.recorded_with(cache, also, input_ids=tokens, attention_mask=mask)

    def try_positions(self, tables: list[PositionTable]) -> str | None:
        """Why positions cannot count the prefix; None if they can."""
        if any(hasattr(module, "compute_bias") for module in self.prefix_layers):
            return None  # relative positions, which count the prefix
        if "position_ids" not in forward_arguments(self.backbone):
            return f"{self.kind} takes no position_ids"
        padding = getattr(self.backbone.config.get_text_config(), "pad_token_id", None)
        if padding is not None:  # which some models leave out when they count
            self.ids = self.ids.masked_fill(self.mask == 0, padding)
        usual = default_positions(tables, {"input_ids": self.ids})
        stock, given = self._run_stock(), self._run_stock(usual)
        if self.compare("", given, stock, self.mask, self.worst_rounding()) is not None:
            return f"{self.kind} counts positions in another way than from the first token on"
        if difference(self._run_stock(2 * usual)[-1], stock[-1]) == 0:
            return f"{self.kind} ignores position_ids"
        return None


def attention_with_prefix(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    peftkern_prefix: PrefixCache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Eager attention over prefix and sequence, concatenated for every sample. All queries see the prefix."""
    found = None if peftkern_prefix is None else peftkern_prefix.prefix_for(module, key, value, attention_mask)
    if found is not None:
        prefix_k, prefix_v = (x.to(key.dtype).expand(key.shape[0], *x.shape) for x in found[1])
        key, value = torch.cat([prefix_k, key], 2), torch.cat([prefix_v, value], 2)
        attention_mask = _with_columns(attention_mask, key.shape[2])
        if "position_bias" in kwargs:
            kwargs["position_bias"] = _with_columns(kwargs["position_bias"], key.shape[2])
    return attention_of(module)(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]


def _with_columns(bias: Tensor | None, num_keys: int) -> Tensor | None:
    """A mask or bias [..., T] with zeros for the prefix, [..., P + T]; one that covers the prefix stays."""
    return bias if bias is None else nn.functional.pad(bias, (max(0, num_keys - bias.shape[-1]), 0))
