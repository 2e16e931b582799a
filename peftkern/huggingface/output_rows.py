# SPDX-License-Identifier: Apache-2.0
"""Reads the hidden states that the output layer of a model receives, so that a loss needs no logits [B, S, V].

The model's own forward runs. A hook on its output layer keeps the input and passes on a few rows, so the layer costs
little and everything after it sees logits [B, n, V]. From these the scale and the softcap are found, in every call:
a hook, an adapter or a config may have changed since the last one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..distillation import logits_of

__all__ = ["Head", "OutputRows", "causal_model", "read_rows"]

#: Arguments with which a forward would compute a loss, or fewer rows.
_LEFT_OUT = ("labels", "logits_to_keep", "num_items_in_batch")
#: Rows per sample on which the output layer is tried.
_TRIED = 2
#: They are tried as they are, and times factors that make ``hidden @ weight.T`` about this large: a softcap that the
#: logits themselves do not reach shows there.
_LARGE = (100.0, 5000.0)
#: Rounding of logits, relative to the largest, up to which a description of the output layer is taken as right.
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
        other_losses: names of losses that the model returns though no labels were passed (of routers of experts).
    """

    hidden: Tensor
    head: Head
    other_losses: tuple[str, ...] = ()


def causal_model(model: nn.Module) -> PreTrainedModel:
    """The causal language model that is ``model``, or in it.

    Raises:
        ValueError: if there is none.
    """
    base = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if base is None:
        raise ValueError(f"model: expected a transformers PreTrainedModel, or one inside, got {type(model).__name__}")
    _check_causal(base)
    return base


def read_rows(model: nn.Module, batch: Mapping[str, Any]) -> OutputRows:
    """Run a causal language model up to its output layer.

    Args:
        model: a Hugging Face model or a module that holds one, patched or not.
        batch: arguments of its forward; ``labels`` and ``logits_to_keep`` are left out.

    Raises:
        ValueError: for a model that is not a causal language model, has no output layer, or whose logits follow from
            it in another way than by a bias, a scale and a softcap; for an output layer with an adapter, or to be
            trained.
    """
    base = causal_model(model)
    layer: Any = base.get_output_embeddings()
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.dtype not in _TOLERANCE:
        got = type(base).__name__ + (f" with {weight.dtype}" if isinstance(weight, Tensor) else "")
        raise ValueError(f"model: expected a causal language model with an output layer of floats, got {got}")
    _check_parameters(layer)
    hidden, tried, dtype, output = _run(model, layer, batch)
    form = _find(base, layer, tried, output["logits"].detach(), dtype)
    others = tuple(name for name, x in output.items() if "loss" in name and x is not None)
    return OutputRows(hidden, Head(weight, getattr(layer, "bias", None), *form), others)


def _check_causal(base: PreTrainedModel) -> None:
    """Refuse a model whose logits are not those of the next tokens of its batch."""
    is_causal = [x.is_causal for x in base.get_decoder().modules() if hasattr(x, "is_causal")]
    kinds = {
        "an encoder-decoder": getattr(base.config, "is_encoder_decoder", False),
        "a model that cannot generate": not base.can_generate(),
        "a model whose attention is not causal": bool(is_causal) and not any(is_causal),
    }
    if kind := next((kind for kind, is_it in kinds.items() if is_it), None):
        raise ValueError(f"model: expected a causal language model, got {type(base).__name__}, {kind}")


def _check_parameters(layer: nn.Module) -> None:
    """Refuse an adapter, whose effect may be less than a rounding, and parameters that would get no gradient."""
    named = dict(layer.named_parameters())
    if others := [name for name in named if name not in ("weight", "bias")]:
        raise ValueError(f"model: expected an output layer with a weight and a bias, got {others}: merge adapters")
    if torch.is_grad_enabled() and (trained := [name for name, x in named.items() if x.requires_grad]):
        raise ValueError(f"model: expected a frozen output layer, got {trained} to be trained")


def _run(model: nn.Module, layer: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, torch.dtype, Any]:
    """Run a model with an output layer that computes the logits of few rows.

    Args:
        model, batch: as for :func:`read_rows`.
        layer: the output layer.

    Returns:
        The input of the output layer [B, P + S, E], the rows [B, n, E] that it has run on instead, the dtype in which
        it has multiplied them (of an autocast within the model, for example), and the model's output with logits
        [B, n, V] of them.
    """
    inputs: list[tuple[Tensor, Tensor]] = []
    dtypes: list[torch.dtype] = []

    def keep(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        rows = _tried(args[0].detach(), module) if args[0].dim() == 3 else args[0]
        inputs.append((args[0], rows))
        return (rows, *args[1:])

    batch = {name: x for name, x in batch.items() if name not in _LEFT_OUT}
    handles = (
        layer.register_forward_pre_hook(keep),
        layer.register_forward_hook(lambda module, args, logits: dtypes.append(logits.dtype)),
    )
    try:
        output = model(**{"use_cache": False, **batch, "return_dict": True})
    finally:
        for handle in handles:
            handle.remove()
    if len(inputs) != 1 or inputs[0][0].dim() != 3:
        got = f"{len(inputs)} calls" if len(inputs) != 1 else f"input {list(inputs[0][0].shape)}"
        raise ValueError(f"model: expected an output layer that is called once, with [B, S, E], got {got}")
    return *inputs[0], dtypes[0], output


def _tried(hidden: Tensor, layer: Any) -> Tensor:
    """The rows [B, n, E] on which an output layer is tried, of its input [B, P + S, E].

    They are the last of each sample, but padded positions may hold zeros or NaN, which say nothing.
    """
    size = hidden.abs().amax(-1)
    order = torch.arange(1, size.shape[1] + 1, device=size.device) * ((size > 0) & size.isfinite())
    places = order.topk(min(_TRIED, size.shape[1]), dim=1).indices
    rows = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[2]))
    if not rows.numel():
        return rows
    known = rows[rows.isfinite().all(2)]
    if not len(known):
        return torch.cat([rows] * (len(_LARGE) + 1), 1)
    raw = logits_of(known, layer.weight, bias=getattr(layer, "bias", None))
    largest = max(float(raw.abs().max()), 1e-3)
    most = torch.finfo(rows.dtype).max / (2 * float(known.abs().max()) + 1)  # beyond it, they would overflow
    return torch.cat([rows, *(rows * min(large / largest, most) for large in _LARGE)], 1)


def _find(
    base: PreTrainedModel, layer: Any, rows: Tensor, logits: Tensor, dtype: torch.dtype
) -> tuple[float, float | None]:
    """The scale and the softcap for which ``logits`` [B, n, V] follow from ``rows`` [B, n, E] and the weight.

    Raises:
        ValueError: if none do, within the rounding of ``dtype`` and of the weight's.
    """
    weight = layer.weight
    dtypes, device = [weight.dtype, dtype], rows.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtypes.append(torch.get_autocast_dtype(device))
    dtype = max(dtypes, key=lambda x: _TOLERANCE.get(x, 0.0))
    raw = logits_of(rows.flatten(0, 1), weight, bias=getattr(layer, "bias", None)).float().view(*rows.shape[:2], -1)
    numbers = _numbers(base.config.get_text_config())
    if raw.shape == logits.shape and raw.numel():
        by_run = (len(rows), len(_LARGE) + 1, -1)
        known = rows.isfinite().all(2).view(by_run)[:, 0]
        if not known.any():
            return 1.0, None  # of hidden states that are all NaN or infinite, no form gives a number
        raw, want = (x.view(*by_run, x.shape[2]).transpose(1, 2)[known] for x in (raw, logits.float()))
        runs = list(zip(raw.unbind(1), want.unbind(1), strict=True))
        for softcap in (None, *(x for x in numbers if x > 0)):
            scale = _scale(*runs[0], softcap, numbers, _SCALE_TOLERANCE[dtype])
            if scale is not None and all(_agree(*run, scale, softcap, _TOLERANCE[dtype]) for run in runs):
                return scale, softcap
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
        raw = raw * (want.abs() < 0.8 * softcap)  # beyond it, atanh would multiply roundings
        want = softcap * torch.atanh((want / softcap).clamp(-0.8, 0.8))
    measured = float((raw * want).sum() / (raw * raw).sum().clamp(min=torch.finfo(raw.dtype).tiny))
    scale = min([*numbers, *(1 / x for x in numbers)], key=lambda x: abs(x - measured))
    return scale if abs(measured - scale) <= tolerance * abs(scale) else None


def _agree(raw: Tensor, want: Tensor, scale: float, softcap: float | None, tolerance: float) -> bool:
    """Whether logits follow from ``raw`` logits, which are rounded too, by a scale and a softcap."""
    got = raw * scale
    bound = tolerance * got.abs().max()
    if softcap is not None:
        got = softcap * torch.tanh(got / softcap)
        bound = bound * (1 - (got / softcap).square())
    return bool(((got - want).abs() <= bound + tolerance * want.abs().max()).all())
