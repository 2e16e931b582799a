# SPDX-License-Identifier: Apache-2.0
"""Reads the hidden states that the output layer of a model receives, so that a loss needs no logits [B, S, V].

The model's own forward runs. A hook on its output layer keeps the input and passes on no rows, so the layer costs
nothing and everything after it sees logits [B, 0, V]. How logits follow from the hidden states (a bias, a scale, a
softcap) is tried once per model, on a few rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..distillation import logits_of
from .call_arguments import tokens_of
from .probing import quiet

__all__ = ["Head", "OutputRows", "read_rows"]

#: Arguments with which a forward would compute a loss, or fewer rows.
_LEFT_OUT = ("labels", "logits_to_keep", "num_items_in_batch")
#: Rows per sample on which the output layer is tried.
_TRIED = 2
#: The largest logit of the second trial: a softcap that the first does not reach shows there.
_LARGE = 100.0
#: Difference of logits, relative to the largest, up to which a description of the output layer is taken as right.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
#: Difference of a scale from the measured one, which is a mean over all logits and so more exact than each of them.
_SCALE_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 3e-3, torch.float16: 1e-3}


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


class _Found(NamedTuple):
    """What the trial has found for an output layer. Its weight and bias are read anew for each call."""

    scale: float
    softcap: float | None
    dtype: torch.dtype


#: By output layer.
_found: WeakKeyDictionary[nn.Module, _Found] = WeakKeyDictionary()


def read_rows(model: nn.Module, batch: Mapping[str, Any]) -> OutputRows:
    """Run a causal language model up to its output layer.

    Args:
        model: a Hugging Face model or a module that holds one, patched or not.
        batch: arguments of its forward; ``labels`` and ``logits_to_keep`` are left out.

    Raises:
        ValueError: for a model without an output layer, or whose logits follow from it in another way than by a bias,
            a scale and a softcap.
    """
    base = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if base is None:
        raise ValueError(f"model: expected a transformers PreTrainedModel, or one inside, got {type(model).__name__}")
    layer: Any = base.get_output_embeddings()
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.dtype not in _TOLERANCE:
        got = type(base).__name__ + (f" with {weight.dtype}" if isinstance(weight, Tensor) else "")
        raise ValueError(f"model: expected a causal language model with an output layer of floats, got {got}")
    found = _found.get(layer)
    if found is None or found.dtype != weight.dtype:
        with quiet(model):
            found = _found[layer] = _try_layer(model, base, layer, batch)
    hidden, _ = _run(model, layer, batch, shown=0)
    return OutputRows(hidden, Head(weight, getattr(layer, "bias", None), found.scale, found.softcap))


def _run(
    model: nn.Module, layer: nn.Module, batch: Mapping[str, Any], *, shown: int, factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(the input of the output layer [B, P + S, E], the model's logits [B, shown, V] of its last rows).

    Args:
        model, batch: as for :func:`read_rows`.
        layer: the output layer.
        shown: the number of rows that the output layer runs on.
        factor: by which its input is multiplied.
    """
    inputs: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0] if factor == 1 else args[0] * factor
        inputs.append(hidden)
        return (hidden[..., hidden.shape[-2] - shown :, :], *args[1:])

    batch = {name: x for name, x in batch.items() if name not in _LEFT_OUT}
    handle = layer.register_forward_pre_hook(keep)
    try:
        output = model(**{"use_cache": False, **batch, "return_dict": True})
    finally:
        handle.remove()
    if len(inputs) != 1 or inputs[0].dim() != 3:
        got = f"{len(inputs)} calls" if len(inputs) != 1 else f"input {list(inputs[0].shape)}"
        raise ValueError(f"model: expected an output layer that is called once, with [B, S, E], got {got}")
    return inputs[0], output.logits


def _try_layer(model: nn.Module, base: PreTrainedModel, layer: Any, batch: Mapping[str, Any]) -> _Found:
    """Find the scale and the softcap for which the model's logits of a few rows follow from the hidden states.

    The numbers are tried on the rows as they are, and on multiples of them with large logits.

    Raises:
        ValueError: if none agree.
    """
    shown = min(_TRIED, tokens_of(batch).shape[1])
    runs, factor = [], 1.0
    for _ in range(2):
        hidden, logits = _run(model, layer, batch, shown=shown, factor=factor)
        rows, want = hidden[:, hidden.shape[1] - shown :].flatten(0, 1), logits.flatten(0, 1).float()
        runs.append((logits_of(rows, layer.weight, bias=getattr(layer, "bias", None)).float(), want))
        factor = _LARGE / max(float(want.abs().max()) if want.numel() else 0.0, 1e-3)
    numbers = _numbers(base.config.get_text_config())
    if all(raw.shape == want.shape and raw.numel() for raw, want in runs):
        for softcap in (None, *(x for x in numbers if x > 0)):
            scale = _scale(*runs[0], softcap, numbers, _SCALE_TOLERANCE[layer.weight.dtype])
            if scale is not None and all(_agree(raw, want, scale, softcap, layer.weight.dtype) for raw, want in runs):
                return _Found(scale, softcap, layer.weight.dtype)
    raise ValueError(
        "model: expected logits that are hidden states times output embeddings, with a bias, a scale and a softcap "
        f"from the config, got others from {type(base).__name__}"
    )


def _numbers(config: Any) -> list[float]:
    """The numbers of a config, and 1."""
    numbers = [x for x in vars(config).values() if isinstance(x, int | float) and not isinstance(x, bool)]
    return list(dict.fromkeys([1.0, *(float(x) for x in numbers if x and math.isfinite(x))]))


def _scale(raw: Tensor, want: Tensor, softcap: float | None, numbers: list[float], tolerance: float) -> float | None:
    """The number, or 1 / number, that ``want / raw`` rounds to; None if there is none."""
    if softcap is not None:
        want = softcap * torch.atanh((want / softcap).clamp(-0.99, 0.99))
    measured = float((raw * want).sum() / (raw * raw).sum().clamp(min=torch.finfo(raw.dtype).tiny))
    scale = min([*numbers, *(1 / x for x in numbers)], key=lambda x: abs(x - measured))
    return scale if abs(measured - scale) <= tolerance * abs(scale) else None


def _agree(raw: Tensor, want: Tensor, scale: float, softcap: float | None, dtype: torch.dtype) -> bool:
    """Whether logits follow from ``raw`` logits by a scale and a softcap."""
    got = raw * scale if softcap is None else softcap * torch.tanh(raw * (scale / softcap))
    return bool((got - want).abs().max() <= _TOLERANCE[dtype] * want.abs().max())
