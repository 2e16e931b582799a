# SPDX-License-Identifier: Apache-2.0
"""Distillation between Hugging Face models, and the loss of labels, without logits [B, S, V]."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING

from ..argument_types import checks_arguments
from ..distillation import Objective, Reduction, cross_entropy, distillation_loss, top_k_log_probs
from .call_arguments import tokens_of
from .layout import IGNORED
from .output_rows import causal_model, read_rows
from .prompt_patch import PromptPatch
from .wiring import PATCH

__all__ = ["TopK", "capture_top_k", "distil", "label_loss"]


class TopK(NamedTuple):
    """The K most likely tokens of a teacher in M rows, most likely first.

    Attributes:
        ids: int64 [M, K].
        log_probs: fp32 [M, K], normalized over the whole vocabulary.
    """

    ids: Tensor
    log_probs: Tensor


@checks_arguments()
@torch.no_grad()
def capture_top_k(
    model: nn.Module, batch: Mapping[str, Any], k: int, *, rows: Tensor | None = None, temperature: float = 1.0
) -> TopK:
    """The K most likely next tokens of a teacher: what :func:`distil` needs of it.

    Args:
        model: a causal language model, patched or not. It runs in the mode that it is in: call ``eval()`` first.
        batch: arguments of its forward.
        k: 1 <= K <= V.
        rows: bool [B, S], the tokens whose successors are asked for. Default: those before a label, if the batch has
            ``labels``, or else those of ``attention_mask`` [B, at least S], whose last S columns count, or else all.
        temperature: by which the logits are divided.

    Returns:
        The ids and log-probabilities [M, K] of the M chosen rows, in the order of the batch.

    Raises:
        ValueError: naming the argument, what was expected and what was passed.
    """
    rows = _rows(batch, rows)
    hidden, head, _ = read_rows(model, batch)
    chosen = _chosen(hidden, rows)
    return TopK(*top_k_log_probs(chosen, head.lm_head, k, temperature=temperature, **head.options()))


@checks_arguments()
def distil(
    model: nn.Module,
    batch: Mapping[str, Any],
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
    *,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    objective: Objective = "cross_entropy",
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """:func:`peftkern.distillation_loss` of a student.

    The model's own forward runs, with its prefix or prompt, up to its output layer.

    Args:
        model: a causal language model, patched or not, whose output layer is frozen.
        batch: arguments of its forward.
        teacher_ids, teacher_log_probs: [M, K], from :func:`capture_top_k`.
        rows: bool [B, S] with M true values, the rows of the student that correspond to those of the teacher, in
            order. Default: as for :func:`capture_top_k`.
        temperature, objective, weights, reduction: as for :func:`peftkern.distillation_loss`; ``weights`` is [M].

    Raises:
        ValueError: naming the argument, what was expected and what was passed.
    """
    rows = _rows(batch, rows)
    hidden, head, _ = read_rows(model, batch)
    chosen = _chosen(hidden, rows)
    return distillation_loss(
        chosen, head.lm_head, teacher_ids, teacher_log_probs, temperature=temperature, objective=objective,
        weights=weights, reduction=reduction, **head.options(),
    )  # fmt: skip


@checks_arguments()
def label_loss(model: nn.Module, batch: Mapping[str, Any], *, reduction: Reduction = "mean") -> Tensor:
    """The loss of a causal language model, as its own forward computes it from ``labels``, without logits [B, S, V].

    Args:
        model: a causal language model, patched or not, whose output layer is frozen.
        batch: arguments of its forward, with ``labels`` [B, S]; -100 is ignored. ``num_items_in_batch`` divides the
            sum instead of the number of labels.
        reduction: as for :func:`peftkern.distillation_loss`; ``"none"`` gives the loss of each label, in the order of
            the batch. ``"sum"`` and ``"none"`` are not divided.

    Raises:
        ValueError: naming the argument, what was expected and what was passed.
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        raise ValueError(f"batch: expected labels [B, S], got {type(labels).__name__}")
    for name in ("shift_labels", "ignore_index"):
        if batch.get(name) is not None:
            raise ValueError(f"batch: expected labels, which are shifted here and -100 where ignored, got {name}")
    _check_loss(causal_model(model))
    hidden, head, others = read_rows(model, batch)
    if others:
        raise ValueError(f"model: expected the loss of labels alone, got {', '.join(others)} too: switch them off")
    num_before = hidden.shape[1] - labels.shape[1]
    targets = nn.functional.pad(labels[:, 1:], (num_before, 1), value=IGNORED)
    if num_before:  # the last row of a prompt predicts the first token
        targets[:, num_before - 1] = labels[:, 0]
    elif isinstance(getattr(model, PATCH, None), PromptPatch) and bool((labels[:, 0] != IGNORED).any()):
        raise ValueError("labels: expected -100 for first tokens, whose prompt is not shown, got others")
    rows = targets != IGNORED
    chosen, targets = hidden[rows.to(hidden.device)], targets[rows]
    num_items = batch.get("num_items_in_batch") if reduction == "mean" else None
    reduction = "sum" if num_items is not None else reduction
    loss = cross_entropy(chosen, head.lm_head, targets.to(hidden.device), reduction=reduction, **head.options())
    return loss if num_items is None else loss / torch.as_tensor(num_items, device=loss.device)


def _check_loss(base: PreTrainedModel) -> None:
    """Refuse a model whose forward computes another loss than that of labels shifted by one."""
    names = inspect.unwrap(type(base).forward).__code__.co_names
    loss = base.loss_function if "loss_function" in names else "a loss of its own"
    if loss is not LOSS_MAPPING["ForCausalLM"]:
        got = getattr(loss, "__name__", loss)
        raise ValueError(f"model: expected one that computes ForCausalLMLoss, got {type(base).__name__} with {got}")


def _rows(batch: Mapping[str, Any], rows: Tensor | None) -> Tensor:
    """bool [B, S]: the rows of a batch that count."""
    shape = tokens_of(batch).shape[:2]
    if rows is not None:
        if not isinstance(rows, Tensor) or rows.dtype != torch.bool or rows.shape != shape:
            got = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
            raise ValueError(f"rows: expected bool {list(shape)}, got {got}")
        return rows
    if isinstance(labels := batch.get("labels"), Tensor):
        return nn.functional.pad(labels[:, 1:] != IGNORED, (0, 1))
    mask = batch.get("attention_mask")
    if mask is None:
        return torch.ones(shape, dtype=torch.bool)
    if isinstance(mask, Tensor) and mask.dim() == 2 and len(mask) == shape[0] and mask.shape[1] >= shape[1]:
        return mask[:, mask.shape[1] - shape[1] :] != 0  # the columns before are those of a prefix or cache
    got = str(list(mask.shape)) if isinstance(mask, Tensor) else type(mask).__name__
    raise ValueError(f"rows: expected rows, or an attention_mask [{shape[0]}, at least {shape[1]}], got one of {got}")


def _chosen(hidden: Tensor, rows: Tensor) -> Tensor:
    """[M, E]: the hidden states of the rows; those of a prompt before the sequences are left out."""
    return hidden[:, hidden.shape[1] - rows.shape[1] :][rows.to(hidden.device)]
