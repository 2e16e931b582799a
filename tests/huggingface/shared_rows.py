# SPDX-License-Identifier: Apache-2.0
"""Batches whose rows begin alike, and steps of models on them, for tests of ``share="prefixes"``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from peftkern.huggingface import sharer, sharing
from tests.huggingface.models import VOCAB

_g = torch.Generator().manual_seed(3)
A, B, C, D, E, F = (torch.randint(3, VOCAB, (n,), generator=_g).tolist() for n in (6, 5, 4, 3, 2, 4))

#: Three rows that begin with A, one of them twice, and one that does not.
ROWS = [A + B, A + C, A + D, F, A + B]

Inputs = dict[str, Any]


def share_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of tests are small: share whatever their rows have in common."""
    monkeypatch.setattr(sharing, "MIN_SAVED_ROWS", 1)
    monkeypatch.setattr(sharer, "MAX_ROWS", 0.99)


def padded(rows: list[list[int]], side: str = "right") -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask), [B, S]."""
    length = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        columns = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[i, columns], mask[i, columns] = torch.tensor(row, dtype=torch.long), 1
    return ids, mask


def inputs_of(rows: list[list[int]], side: str = "right") -> Inputs:
    """Arguments of a call; every second row has labels behind its third column only."""
    ids, mask = padded(rows, side)
    labels = ids.masked_fill(mask == 0, -100)
    labels[::2, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def left_inputs(rows: list[list[int]]) -> Inputs:
    """Arguments of a call with padding on the left, positions that count tokens, and labels of the last columns."""
    ids, mask = padded(rows, "left")
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : ids.shape[1] - 3] = -100
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "position_ids": positions}


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train(model: Any, inputs: Inputs) -> tuple[Any, dict[str, Tensor]]:
    """(the output, gradients of all parameters) of a training step with the model's own loss."""
    model.train()
    model.zero_grad()
    output = model(**inputs)
    (output["loss"] if "loss" in output else output[0].square().mean()).backward()
    return output, gradients(model)


def differ(got: Any, want: Any) -> float:
    """The largest relative difference of two equal structures of tensors. Gradients are relative to the largest."""
    if isinstance(want, dict):
        assert got.keys() == want.keys()
        largest = max(float(x.norm()) for x in want.values())
        return max(float((got[name] - want[name]).norm()) for name in want) / max(largest, 1e-30)
    assert got.shape == want.shape, f"expected {list(want.shape)}, got {list(got.shape)}"
    return float((got - want).detach().norm() / want.detach().norm().clamp(min=1e-30))
