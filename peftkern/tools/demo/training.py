# SPDX-License-Identifier: Apache-2.0
"""Two copies of one model, stock PEFT and PEFT + peftkern, trained side by side on the same batches."""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...huggingface.probing import quiet
from ..bench import memory
from ..bench.measuring import take_turns
from .assets import ModelSource, Review
from .options import DTYPES, DemoError, Options
from .reviews import Batch, Task, training_rows

ARMS = ("stock", "peftkern")
TITLES = {"stock": "stock PEFT", "peftkern": "PEFT + peftkern"}
WARMUP_STEPS = 10
EVAL_BATCH = 16


class Pair(NamedTuple):
    """One training step of both arms on one batch. ``first`` names the arm that ran first; ``tokens`` is B * S."""

    step: int
    first: str
    tokens: int
    loss: dict[str, float]
    seconds: dict[str, float]


class Accuracy(NamedTuple):
    """Number of ``rows`` and of ``correct`` answers, each a choice between two labels."""

    correct: int
    rows: int

    @property
    def value(self) -> float:
        """Fraction of correct answers, p."""
        return self.correct / self.rows

    @property
    def standard_error(self) -> float:
        """Standard error of the fraction, sqrt(p (1 - p) / n)."""
        return math.sqrt(self.value * (1 - self.value) / self.rows)


@dataclass
class Arm:
    """A PEFT model and its optimizer."""

    model: Any
    optimizer: torch.optim.AdamW = field(init=False)

    def __post_init__(self) -> None:
        self.model.train()
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], weight_decay=0.0)

    @property
    def prefix(self) -> dict[str, nn.Parameter]:
        """Parameters that PEFT added, including frozen ones, by name."""
        return {name: p for name, p in self.model.named_parameters() if "prompt_encoder" in name}

    def train_step(self, batch: Batch, lr: float) -> tuple[float, float]:
        """Forward, backward, clipping and update; returns (loss, seconds)."""
        parameters = self.optimizer.param_groups[0]["params"]
        self.optimizer.param_groups[0]["lr"] = lr
        start = time.perf_counter()
        loss = self.model(**batch._asdict()).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        value = loss.item()
        return value, time.perf_counter() - start


def learning_rate(step: int, options: Options) -> float:
    """Linear warm-up over :data:`WARMUP_STEPS`, then linear decay to a twentieth of the peak."""
    warm = min(1.0, (step + 1) / min(WARMUP_STEPS, options.steps))
    return options.lr * warm * max(0.05, 1 - step / options.steps)


def faster_dtype(seconds: float = 0.05) -> tuple[str, str]:
    """The dtype that this processor multiplies faster, and a sentence with the ratio.

    Processors without bf16 instructions emulate them several times slower than fp32. The product has the shape of a
    layer of SmolLM2-135M.
    """
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(256, 576, generator=generator), torch.randn(576, 576, generator=generator)
    calls: dict[str, Callable[[], object]] = {
        name: functools.partial(nn.functional.linear, x.to(getattr(torch, dtype)), weight.to(getattr(torch, dtype)))
        for name, dtype in DTYPES.items()
    }
    times = take_turns(calls, seconds)
    ratio = times["fp32"].median / times["bf16"].median
    reason = f"bf16 matrix products run at {ratio:.2g} times the speed of fp32 on this processor"
    return ("bf16" if ratio >= 1 else "fp32"), reason


def load_base(source: ModelSource, options: Options) -> tuple[Any, Task]:
    """The frozen causal LM in the run's dtype, and the task for its tokenizer.

    Raises:
        DemoError: if the model cannot be loaded, or has too few positions for the prompts.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        base = AutoModelForCausalLM.from_pretrained(source.path, dtype=getattr(torch, DTYPES[options.dtype]))
        tokenizer = AutoTokenizer.from_pretrained(source.path)
    except (OSError, ValueError) as error:
        raise DemoError(f"{source.title} at {source.path} cannot be loaded: {error}") from error
    longest = getattr(base.config, "max_position_embeddings", None)
    if longest is not None and options.length + options.seq + 1 > longest:
        raise DemoError(
            f"--length {options.length} and --seq {options.seq}: prefix, prompt and label need "
            f"{options.length + options.seq + 1} positions, the model has {longest}"
        )
    return base.eval(), Task(tokenizer, options.seq)


def build_arms(base: Any, task: Task, options: Options) -> dict[str, Arm]:
    """Both arms, with the same frozen weights (shared in memory) and the same initial prefix; patches one of them.

    A prefix starts as the keys and values of a few examples, a prompt as their embeddings. From PEFT's random
    initialization neither learns more than chance in so few steps.

    Raises:
        DemoError: if PEFT or peftkern refuses the model.
    """
    import peft

    from ...model_info import given_cache

    new_config = {
        "prefix": peft.PrefixTuningConfig,
        "prompt": peft.PromptTuningConfig,
    }[options.method]
    examples = task.examples(options.length)
    models: dict[str, Any] = {}
    try:
        with torch.no_grad():
            cache = given_cache(base(input_ids=examples, use_cache=True))
        for arm in ARMS:
            config = new_config(task_type="CAUSAL_LM", num_virtual_tokens=options.length)
            # PEFT adds modules to the model it receives, so each arm gets its own modules around the same tensors
            models[arm] = peft.get_peft_model(sharing_copy(base), config)
            if options.method == "prompt":
                weight = models[arm].prompt_encoder["default"].embedding.weight
                weight.data.copy_(base.get_input_embeddings()(examples[0]))
            else:
                peft.initialize_kv_prefix_from_past_key_values(models[arm], past_key_values=cache)
        patch_fastest(models["peftkern"])
    except (ValueError, TypeError, NotImplementedError) as error:
        raise DemoError(f"{options.method} tuning of this model: {error}") from error
    return {arm: Arm(model) for arm, model in models.items()}


def patch_fastest(model: Any) -> None:
    """Patch a PEFT model whose logits nobody reads in training: packed, and the output layer on labelled rows only.

    A review has one label, so that this leaves one row per review to the output layer. Models that do not support it
    compute all logits.

    Raises:
        ValueError: if peftkern refuses the model.
    """
    from ...huggingface.patch import patch

    try:
        patch(model, logits="labelled")
    except ValueError:
        patch(model)


def sharing_copy(model: Any) -> Any:
    """A copy of a model with the same tensors."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)


def evaluate(model: Any, task: Task, reviews: Sequence[Review], advance: Callable[[int], None]) -> Accuracy:
    """Accuracy on ``reviews``; calls ``advance`` with the number of rows after each batch."""
    correct = 0
    with quiet(model):
        for input_ids, attention_mask, labels in task.eval_batches(reviews, EVAL_BATCH):
            positions, inverse = (attention_mask.sum(1) - 1 + _prompt_rows(model)).unique(return_inverse=True)
            logits = model(input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=positions).logits
            answers = logits[torch.arange(len(labels)), inverse][:, task.label_ids].argmax(-1)
            correct += int((answers == labels).sum())
            advance(len(labels))
    return Accuracy(correct, len(reviews))


def _prompt_rows(model: Any) -> int:
    """Number of logits before the first token's: the length of a prompt, 0 for a prefix."""
    config = getattr(model, "active_peft_config", None)
    is_prompt = config is not None and config.peft_type.value == "PROMPT_TUNING"
    return config.num_virtual_tokens if is_prompt else 0  # type: ignore[union-attr]


def train_pair(arms: dict[str, Arm], task: Task, train: Sequence[Review], step: int, options: Options) -> Pair:
    """Run step ``step`` (from 0) of both arms on the same batch. The arms take turns in running first."""
    batch = task.batch(training_rows(train, step, options.batch_size, options.seed))
    order = ARMS if step % 2 == 0 else ARMS[::-1]
    lr = learning_rate(step, options)
    results = {arm: arms[arm].train_step(batch, lr) for arm in order}
    loss, seconds = ({arm: results[arm][i] for arm in ARMS} for i in (0, 1))
    return Pair(step, order[0], batch.input_ids.numel(), loss, seconds)


@torch.no_grad()
def row_losses(model: Any, batch: Batch) -> Tensor:
    """Loss of each row. Shape [B], fp32."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.float()
    logits = logits[:, _prompt_rows(model) :]
    losses = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="none"
    )
    return losses.view(len(batch.labels), -1).sum(1)  # each row has one label


def rounding_error(arms: dict[str, Arm], batch: Batch) -> dict[str, float]:
    """Rounding error of a row's loss in the run's dtype: RMS distance to stock PEFT in fp32, per arm."""
    base = arms["stock"].model.get_base_model()  # shares its tensors with the other arm
    dtype = base.dtype
    rounded = {name: row_losses(arm.model, batch) for name, arm in arms.items()}
    base.float()
    exact = row_losses(arms["stock"].model, batch)
    base.to(dtype)
    return {name: float((losses - exact).square().mean().sqrt()) for name, losses in rounded.items()}


def saved_bytes(model: Any, batch: Batch) -> int:
    """Bytes that a forward pass saves for backward: distinct storages, without parameters and buffers."""
    known = [*model.parameters(), *model.buffers()]
    return memory.saved_bytes(lambda: model(**batch._asdict()).loss, known)
