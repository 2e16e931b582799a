# SPDX-License-Identifier: Apache-2.0
"""PEFT's and native prefixes and prompts: each patched model, and the stock PEFT model with the same weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import peftkern
from peftkern import SoftPrompt
from tests.huggingface import models
from tests.huggingface.models import PREFIX, Family

KINDS = ("prefix", "prompt", "native prefix", "native prompt")
"""PREFIX_TUNING, PROMPT_TUNING, PrefixKV and SoftPrompt."""

PEFT_KINDS = ("prefix", "prompt")


def is_native(kind: str) -> bool:
    return kind.startswith("native ")


def stock_model(kind: str, family: Family) -> Any:
    """The PEFT model, unpatched."""
    build = models.peft_model if kind.endswith("prefix") else models.prompt_model
    return build(family, patched=False)


def native_module(kind: str, family: Family) -> Any:
    """The PrefixKV or SoftPrompt with the weights of :func:`stock_model`."""
    stock = stock_model(kind, family)
    if kind.endswith("prefix"):
        return models.native_prefix(stock)
    # Of an encoder-decoder, PEFT's prompt has rows for the decoder too, which it never uses.
    return SoftPrompt(stock.get_base_model(), PREFIX, init=models.peft_prefix(stock).detach()[:PREFIX])


def patched_model(kind: str, family: Family, **options: Any) -> Any:
    """The patched model with the same weights."""
    if not is_native(kind):
        return peftkern.patch(stock_model(kind, family), **options)
    return peftkern.patch(models.base_model(family), native_module(kind, family), freeze=True, **options)


def trained(model: Any) -> Tensor:
    """The trained parameter, of the same shape in all models of a kind."""
    # "ref" is the adapter that TRL adds as the reference.
    (parameter,) = (p for name, p in model.named_parameters() if p.requires_grad and ".ref." not in name)
    parameter = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    if parameter.dim() == 2 and parameter.shape[0] == 2 * PREFIX:  # the rows that PEFT never uses
        return parameter[:PREFIX].detach()
    return parameter.detach()


def losses_differ(got: list[float], want: list[float]) -> float:
    """The largest relative difference of two loss curves."""
    assert len(got) == len(want), f"{len(got)} losses, stock has {len(want)}"
    return max(abs(a - b) / abs(b) for a, b in zip(got, want, strict=True))


def assert_learns(losses: list[float]) -> None:
    """The losses change from step to step."""
    assert len(set(losses)) == len(losses), f"the same loss twice: {losses}"
    assert torch.isfinite(torch.tensor(losses)).all(), f"losses are not finite: {losses}"
