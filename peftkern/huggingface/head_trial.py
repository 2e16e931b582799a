# SPDX-License-Identifier: Apache-2.0
"""Tries whether the output layer of a model runs on rows of a packed batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .layout import IGNORED, next_labels
from .probing import is_transient, some_tokens
from .trial import Trial, difference, tolerance

__all__ = ["try_head"]


def try_head(base: PreTrainedModel, trial: Trial) -> bool:
    """Whether the base model's own forward computes logits and loss for each row independently.

    The forward runs on the backbone's hidden states of a batch, and again on those of the rows that predict a label.
    Logits and loss must agree.

    Args:
        base: the base model.
        trial: a trial whose backbone has run.
    """
    backbone = trial.backbone
    ids = some_tokens(backbone, 2 * 3).view(2, 3)
    targets = next_labels(ids)
    rows = (targets.flatten() != IGNORED).nonzero().squeeze(1).flip(0)
    labels = torch.nn.functional.pad(targets.flatten()[rows], (1, 0), value=IGNORED)[None]

    def forward_with(output: Any, labels: Tensor) -> Any:
        """The base model's forward, with a backbone that returns ``output``."""
        previous = backbone.__dict__.get("forward")
        backbone.forward = lambda *args, **kwargs: output
        try:
            mask = torch.ones_like(ids)  # which some losses read
            return type(base).forward(base, input_ids=ids, attention_mask=mask, labels=labels, use_cache=False)
        finally:
            del backbone.forward
            if previous is not None:
                backbone.forward = previous

    def agree(got: Tensor, want: Tensor) -> bool:
        return got.shape == want.shape and difference(got, want) <= 8 * tolerance(want.dtype)

    try:
        kind, hidden = type(trial.output), trial.output["last_hidden_state"].flatten(0, 1)[: ids.numel()]
        want = forward_with(kind(last_hidden_state=hidden.view(*ids.shape, -1)), ids)
        chosen = hidden[torch.nn.functional.pad(rows, (0, 1))][None]
        got = forward_with(kind(last_hidden_state=chosen), labels)
        wanted = want["logits"].flatten(0, 1)[rows]
        return agree(got["logits"][0, :-1], wanted) and agree(got["loss"][None], want["loss"][None])
    except Exception as error:
        if is_transient(error):
            raise
        return False
