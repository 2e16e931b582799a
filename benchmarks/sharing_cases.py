# SPDX-License-Identifier: Apache-2.0
"""Batches whose rows share text, the models that run them, and their steps: the cases of :mod:`.sharing`.

``python -m benchmarks.sharing_cases`` reads an order as JSON and prints the peak memory of its step in bytes.
"""

from __future__ import annotations

import gc
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, logging

import peftkern
from peftkern.tools.bench import memory
from peftkern.tools.bench.providers import DTYPES

from .common import Row
from .end_to_end.models import config_of, smollm2_config

SIDES = ("plain", "shared")
LAYERS = 4  # of the small model
BETA = 0.1  # of the loss of DPO

Tokens = list[int]


@dataclass(frozen=True)
class Batch:
    """Rows of prompts and answers.

    Attributes:
        ids, mask: [B, S], tokens, and 1 where they are no padding.
        scored: bool [B, S], the tokens whose log-probabilities are asked for.
        weights: [B], the advantages of a policy gradient.
        reference: [B], the log-probabilities of the answers under the model without adapter; None if not needed.
    """

    ids: Tensor
    mask: Tensor
    scored: Tensor
    weights: Tensor
    reference: Tensor | None = None

    @property
    def answers(self) -> int:
        """The number of last columns that contain all scored tokens; at least 1."""
        columns = self.scored.any(0).nonzero()
        return self.ids.shape[1] - int(columns[0]) if len(columns) else 1

    def least_rows(self) -> int:
        """The number of different beginnings of rows: as few rows can run through a model."""
        nodes: dict[tuple[int, int], int] = {}
        for tokens, mask in zip(self.ids, self.mask.bool(), strict=True):
            node = 0
            for token in tokens[mask].tolist():
                node = nodes.setdefault((node, token), len(nodes) + 1)
        return len(nodes)


class Text:
    """Random text, reproducible. Lengths are divided by ``scale``."""

    def __init__(self, vocab: int, scale: int = 1) -> None:
        self.vocab, self.scale = vocab, scale
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, length: int) -> Tokens:
        """``length`` tokens, none of which is the padding token 0."""
        size = (max(1, length // self.scale),)
        return torch.randint(1, self.vocab, size, generator=self.generator).tolist()  # type: ignore[no-any-return]

    def some(self, number: int, shortest: int, longest: int) -> list[Tokens]:
        """Texts of ``shortest`` to ``longest`` tokens, evenly spaced."""
        return [self(int(length)) for length in torch.linspace(shortest, longest, number)]


def lay_out(pairs: Sequence[tuple[Tokens, Tokens]], padding: Iterable[int] = (), aligned: bool = True) -> Batch:
    """A batch of (prompt, answer) pairs.

    Args:
        pairs: one per row.
        padding: tokens of the first columns where they are padding; 0 elsewhere.
        aligned: answers begin in one column, behind prompts that are padded on the left, as in TRL's GRPO. False:
            answers follow their prompts, and rows are padded on the right, as in TRL's DPO.
    """
    start = max(len(prompt) for prompt, _ in pairs)
    firsts = [start - len(prompt) if aligned else 0 for prompt, _ in pairs]
    columns = max(first + len(a) + len(b) for first, (a, b) in zip(firsts, pairs, strict=True))
    filling = torch.zeros(columns, dtype=torch.long)
    common = torch.tensor(list(padding), dtype=torch.long)[:columns]
    filling[: len(common)] = common
    ids, mask = filling.repeat(len(pairs), 1), torch.zeros(len(pairs), columns, dtype=torch.long)
    scored = mask.bool()
    for row, (first, (prompt, answer)) in enumerate(zip(firsts, pairs, strict=True)):
        middle, end = first + len(prompt), first + len(prompt) + len(answer)
        ids[row, first:end], mask[row, first:end], scored[row, middle:end] = torch.tensor(prompt + answer), 1, True
    weights = torch.linspace(-1, 2, len(pairs))  # the gradients of equal rows do not cancel out
    return Batch(ids, mask, scored, weights)


def grpo(text: Text) -> Batch:
    """A group of 8 completions of one prompt."""
    prompt = text(256)
    return lay_out([(prompt, answer) for answer in text.some(8, 64, 128)])


def dpo(text: Text) -> Batch:
    """4 prompts with a chosen and a rejected answer each: the chosen ones first."""
    prompts, answers = text.some(4, 128, 256), text.some(8, 32, 128)
    return lay_out(list(zip(prompts * 2, answers, strict=True)), aligned=False)


def choices(text: Text) -> Batch:
    """4 questions with 4 choices each, behind examples that all of them share."""
    examples, questions, answers = text(512), [text(40) for _ in range(4)], text.some(16, 8, 24)
    prompts = [examples + question for question in questions for _ in range(4)]
    return lay_out(list(zip(prompts, answers, strict=True)), aligned=False)


def no_sharing(text: Text) -> Batch:
    """8 different rows without padding."""
    return lay_out([(text(32), text(96)) for _ in range(8)])


def equal_rows(text: Text) -> Batch:
    """8 times the same row."""
    return lay_out([(text(32), text(96))] * 8)


def prefix_of_another(text: Text) -> Batch:
    """4 pairs of rows; the second is the first half of the first."""
    prompts, answers = [text(32) for _ in range(4)], [text(96) for _ in range(4)]
    halves = [answer[: len(answer) // 2] for answer in answers]
    return lay_out(list(zip(prompts * 2, answers + halves, strict=True)))


def only_padding(text: Text) -> Batch:
    """Different rows, padded on the left with the same text."""
    prompts, padding = text.some(8, 8, 64), text(64)
    return lay_out([(prompt, text(64)) for prompt in prompts], padding)


def empty_answers(text: Text) -> Batch:
    """4 prompts with an empty answer and a short one each."""
    prompts = text.some(4, 32, 96)
    return lay_out([(prompt, answer) for prompt in prompts for answer in ([], text(32))])


def groups_of_one(text: Text) -> Batch:
    """8 prompts of different lengths with an answer each."""
    return lay_out(list(zip(text.some(8, 16, 64), text.some(8, 32, 96), strict=True)))


def many_groups(text: Text) -> Batch:
    """64 groups of 2 short rows."""
    prompts, answers = [text(8) for _ in range(64)], text.some(128, 4, 8)
    return lay_out(list(zip([p for p in prompts for _ in range(2)], answers, strict=True)))


def duplicates(text: Text) -> Batch:
    """4 different rows, each twice."""
    rows = list(zip(text.some(4, 16, 64), text.some(4, 32, 96), strict=True))
    return lay_out(rows + rows)


@dataclass(frozen=True)
class Case:
    """A kind of batch and what is computed of it.

    Attributes:
        goal: ``policy`` (the loss of GRPO), ``preference`` (the loss of DPO) or ``likelihood`` (no gradients).
        fused: log-probabilities come from TRL's fused output layer instead of from logits.
        small: runs a model of SmolLM2-135M's width and few layers.
    """

    make: Callable[[Text], Batch]
    goal: str = "policy"
    fused: bool = False
    small: bool = False


SHAPES = {
    "grpo": Case(grpo), "grpo, fused head": Case(grpo, fused=True), "dpo": Case(dpo, "preference", fused=True),
    "choices": Case(choices, "likelihood"),
}  # fmt: skip
ADVERSARIAL = {
    name: Case(make, small=True)
    for name, make in {
        "no sharing": no_sharing, "all rows equal": equal_rows, "a row begins another": prefix_of_another,
        "common padding": only_padding, "empty answers": empty_answers, "groups of 1": groups_of_one,
        "64 groups of 2": many_groups, "duplicates": duplicates,
    }.items()
}  # fmt: skip
CASES = SHAPES | ADVERSARIAL


class Work:
    """A model with LoRA, a batch, and the step that is measured.

    Args:
        order: ``case``; ``side``, one of :data:`SIDES`; ``dtype``; ``path`` of the weights or None for random ones;
            ``quick`` for a tiny model and short rows.
    """

    def __init__(self, order: Row) -> None:
        self.case = CASES[order["case"]]
        self.model = _model(self.case, order)
        text = Text(self.model.config.vocab_size, 8 if order["quick"] else 1)
        self.batch = self.case.make(text)
        if self.case.goal == "preference":
            with self.model.disable_adapter(), torch.no_grad():
                self.batch = replace(self.batch, reference=self._log_probs().sum(1))
        if order["side"] == "shared":
            peftkern.patch(self.model, share="prefixes")

    def step(self) -> Tensor:
        """Forward, and backward if the case has a loss.

        Returns:
            Terms whose sum is the loss, or the log-likelihood of each row.
        """
        if self.case.goal == "likelihood":
            with torch.no_grad():
                return self._log_probs().sum(1)
        self.model.zero_grad()
        terms = self._loss_terms(self._log_probs())
        terms.sum().backward()
        return terms.detach()

    def gradients(self) -> list[Tensor]:
        """The gradients that the last step left, one per LoRA matrix."""
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def _loss_terms(self, log_probs: Tensor) -> Tensor:
        batch = self.batch
        if self.case.goal == "policy":
            return -(batch.weights[:, None] * log_probs).sum(1) / batch.scored.sum().clamp(min=1)
        assert batch.reference is not None
        chosen, rejected = (log_probs.sum(1) - batch.reference).chunk(2)
        return -logsigmoid(BETA * (chosen - rejected)) / len(chosen)

    def _log_probs(self) -> Tensor:
        """[B, answers], the log-probabilities of the scored tokens, 0 for others."""
        batch, last = self.batch, self.batch.answers
        inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, "use_cache": False}
        if self.case.fused:
            labels = batch.ids.masked_fill(~batch.scored, -100)
            # Without Triton, TRL's head scores every place. On a GPU it scores those with labels, which counts here.
            with mock.patch("trl.trainer.utils._use_triton", return_value=True):
                log_probs = self.model(**inputs, labels=labels, fused_lm_head=True).log_probs
            return log_probs[:, -last:]  # type: ignore[no-any-return]
        logits = self.model(**inputs, logits_to_keep=last + 1).logits[:, :-1]
        log_probs = selective_log_softmax(logits, batch.ids[:, -last:])
        return log_probs * batch.scored[:, -last:]


def selective_log_softmax(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities [B, S] of ``ids`` [B, S] from ``logits`` [B, S, V], row by row, as in TRL's function."""
    ids = ids[..., None]
    if logits.dtype == torch.float32:
        sums = torch.stack([row.logsumexp(-1) for row in logits])
        return logits.gather(-1, ids)[..., 0] - sums
    return torch.stack([row.log_softmax(-1).gather(-1, i)[..., 0] for row, i in zip(logits, ids, strict=True)])


def has_fused_head() -> bool:
    """Whether TRL is installed, in a version with a fused output layer."""
    try:
        from trl.trainer.utils import add_fused_lm_head  # noqa: F401
    except ImportError:
        return False
    return True


def _model(case: Case, order: Row) -> Any:
    """A model with LoRA on its attention. Its adapter is not zero, so that all matrices have gradients."""
    dtype = DTYPES[order["dtype"]]
    torch.manual_seed(0)
    if order["path"] and not case.small:
        base = AutoModelForCausalLM.from_pretrained(order["path"], dtype=dtype)
    else:
        small = case.small and not order["quick"]
        config = config_of("smollm2-135m", LAYERS) if small else smollm2_config(order["quick"])
        config.tie_word_embeddings = True
        base = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if case.fused:
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(base, outputs=("log_probs", "entropy"))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=targets))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.02, generator=generator)
    return model.eval() if case.goal == "likelihood" else model.train()


def serve(order: Row) -> float | None:
    """Peak memory of a step beside the model, in bytes."""
    torch.set_num_threads(order["threads"])
    work = Work(order)
    batch = work.batch
    short = work.case.make(Text(work.model.config.vocab_size, 8))
    work.batch = replace(short, reference=batch.reference)
    work.step()  # the first call makes lasting allocations
    work.batch = batch
    work.model.zero_grad()
    gc.collect()
    return memory.peak_bytes(work.step)


if __name__ == "__main__":
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)  # from transformers and PEFT
    memory.return_freed_memory()
    print(json.dumps(serve(json.load(sys.stdin))))
