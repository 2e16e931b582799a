# SPDX-License-Identifier: Apache-2.0
"""Reads the hidden states that the output layer of a model receives, so that a loss needs no logits [B, S, V].

The model's own forward runs. A hook on its output layer keeps the input and passes on no rows, so the layer costs
nothing and everything after it sees logits [B, 0, V]. How logits follow from the hidden states (a bias, a scale, a
softcap) is tried once per model, on a few rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..distillation import logits_of

__all__ = ["Head", "OutputRows", "read_rows"]

#: Rows per sample on which the output layer is tried.
_TRIED = 2
#: Difference of logits, relative to the largest, up to which a description of the output layer is taken as right.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 2e-2, torch.float16: 4e-3}


class Head(NamedTuple):
    """How logits follow from hidden states; arguments of :func:`peftkern.distillation_loss`."""

    lm_head: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    def options(self) -> dict[str, Any]:
        """The optional arguments."""
        return {"bias": self.bias, "scale": self.scale, "softcap": self.softcap}


class OutputRows(NamedTuple):
    """What the output layer of a model would have read.

    Attributes:
        hidden: [B, P + S, E]; P > 0 if the model shows the rows of a prompt before the sequences.
        head: the output layer.
    """

    hidden: Tensor
    head: Head


class _Kept(NamedTuple):
    """What the trial has found for an output layer; its weight and bias are read anew for each call."""

    scale: float
    softcap: float | None
    dtype: torch.dtype


#: By output layer.
_tried: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()


def read_rows(model: nn.Module, batch: Mapping[str, Any]) -> OutputRows:
    """Run a causal language model up to its output layer.

    Args:
        model: a Hugging Face model or a module that holds one, patched or not.
        batch: arguments of its forward; ``labels`` and ``logits_to_keep`` are left out.

    Raises:
        ValueError: for a model without an output layer, or whose logits do not follow from it by a scale and a softcap.
    """
    base = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if base is None:
        raise ValueError(f"model: expected a transformers PreTrainedModel, or one inside, got {type(model).__name__}")
    layer: Any = base.get_output_embeddings()
    if not isinstance(layer, nn.Module) or not isinstance(getattr(layer, "weight", None), Tensor):
        raise ValueError(f"model: expected a causal language model with an output layer, got {type(base).__name__}")
    kept = _tried.get(layer)
    if kept is None or kept.dtype != layer.weight.dtype:
        kept = _tried[layer] = _try_layer(model, base, layer, batch)
    hidden, _ = _run(model, layer, batch, shown=0)
    return OutputRows(hidden, Head(layer.weight, getattr(layer, "bias", None), kept.scale, kept.softcap))


def _run(model: nn.Module, layer: nn.Module, batch: Mapping[str, Any], shown: int) -> tuple[Tensor, Tensor]:
    """(the input of the output layer [B, P + S, E], the model's logits [B, shown, V] of the last rows)."""
    inputs: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        inputs.append(args[0])
        return (args[0][..., args[0].shape[-2] - shown :, :], *args[1:])

    batch = {name: x for name, x in batch.items() if name not in ("labels", "logits_to_keep", "num_items_in_batch")}
    handle = layer.register_forward_pre_hook(keep)
    try:
        output = model(**{"use_cache": False, **batch, "return_dict": True})
    finally:
        handle.remove()
    if len(inputs) != 1 or inputs[0].dim() != 3:
        got = f"{len(inputs)} calls" if len(inputs) != 1 else f"input {list(inputs[0].shape)}"
        raise ValueError(f"model: expected an output layer that is called once, with [B, S, E], got {got}")
    return inputs[0], output.logits


@torch.no_grad()
def _try_layer(model: nn.Module, base: PreTrainedModel, layer: Any, batch: Mapping[str, Any]) -> _Kept:
    """Compare the model's logits of a few rows with those of a scale and a softcap.

    Raises:
        ValueError: if none agree.
    """
    random_states = torch.random.get_rng_state()
    try:
        hidden, logits = _run(model, layer, batch, shown=_TRIED)
    finally:
        torch.random.set_rng_state(random_states)
    rows, want = hidden[:, -_TRIED:].flatten(0, 1), logits.flatten(0, 1).float()
    config = base.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    bias = getattr(layer, "bias", None)
    raw = logits_of(rows, layer.weight, bias=bias).float()
    if raw.shape == want.shape:
        for cap in dict.fromkeys((softcap, None)):
            scale = _scale(raw, want if cap is None else cap * torch.atanh((want / cap).clamp(-0.999, 0.999)), config)
            got = logits_of(rows, layer.weight, bias=bias, scale=scale, softcap=cap).float()
            if (got - want).abs().max() <= _TOLERANCE[layer.weight.dtype] * want.abs().max():
                return _Kept(scale, cap, layer.weight.dtype)
    raise ValueError(
        f"model: expected logits that are hidden states times the output embeddings, a scale and a softcap, got others "
        f"from {type(base).__name__}"
    )


def _scale(raw: Tensor, want: Tensor, config: Any) -> float:
    """The number, 1 or from the config, that is nearest to ``want / raw``; the quotient itself is rounded."""
    quotient = float((raw * want).sum() / (raw * raw).sum().clamp(min=torch.finfo(raw.dtype).tiny))
    numbers = {1.0}
    for x in vars(config).values():
        if isinstance(x, int | float) and not isinstance(x, bool) and x and math.isfinite(x):
            numbers |= {float(x), 1 / x}
    return min(numbers, key=lambda x: (abs(x - quotient), x))
