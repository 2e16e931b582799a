# SPDX-License-Identifier: Apache-2.0
"""A tiny tokenizer and data sets in memory for TRL's trainers, and one way to run all of them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import datasets
import torch
import trl
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from torch import Tensor
from transformers import PreTrainedTokenizerFast, PrinterCallback

import peftkern
from tests.huggingface.kinds import (
    KINDS,
    PEFT_KINDS,
    PREFIX,
    assert_learns,
    losses_differ,
    patched_model,
    stock_model,
    trained,
)
from tests.huggingface.models import FAMILIES, VOCAB, Family, difference

datasets.disable_progress_bars()

LLAMA = FAMILIES["llama (GQA)"]
TOLERANCE = 5e-5

SPECIAL = ["[PAD]", "<s>", "</s>", "[UNK]", "user", "assistant"]
WORDS = [f"w{i}" for i in range(VOCAB - len(SPECIAL))]
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{ 'assistant ' }}{% generation %}{{ message['content'] + ' </s> ' }}{% endgeneration %}
{%- else -%}
{{ message['role'] + ' ' + message['content'] + ' ' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'assistant ' }}{%- endif -%}"""


def tokenizer():
    words = Tokenizer(
        tokenizer_models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", bos_token="<s>", eos_token="</s>", unk_token="[UNK]",
        chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def words(seed: int, length: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator).tolist())


def messages(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


@functools.cache
def data(name: str) -> datasets.Dataset:
    """Six samples of different lengths, or, for ``"equal"`` ones, of one length."""
    columns: dict[str, list[Any]] = {
        "text": [{"text": words(i, 5 + i)} for i in range(6)],
        "completion": [
            {"prompt": words(i, 3 + i % 3), "completion": " " + words(i + 50, 2 + 5 * i % 4)} for i in range(6)
        ],
        "chat": [
            {"messages": messages("user", words(i, 3)) + messages("assistant", words(i + 50, 2 + i))}
            for i in range(6)
        ],
        "preference": [
            {"prompt": words(i, 3), "chosen": " " + words(i + 20, 3 + i % 3), "rejected": " " + words(i + 40, 5)}
            for i in range(6)
        ],
        "equal preference": [
            {"prompt": words(i, 3), "chosen": " " + words(i + 20, 4), "rejected": " " + words(i + 40, 4)}
            for i in range(6)
        ],
        "unpaired": [
            {"prompt": words(i, 3), "completion": " " + words(i + 20, 3 + i % 3), "label": i % 2 == 0}
            for i in range(6)
        ],
        "prompts": [{"prompt": words(i, 2 + i % 3)} for i in range(6)],
        "equal prompts": [{"prompt": words(i, 4)} for i in range(6)],
    }[name]  # type: ignore[assignment]
    return datasets.Dataset.from_list(columns)  # type: ignore[arg-type]


SETTINGS = {
    **{"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "optim": "sgd", "learning_rate": 1.0},
    **{"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 3, "per_device_train_batch_size": 3},
    **{"logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True, "seed": 0, "data_seed": 0},
}
"""In fp32 and by plain gradient descent, so that a run shows how exact the gradients are.

TRL's defaults are bf16 and gradient checkpointing, which have tests of their own.
"""


def make_trainer(name: str, model: Any, rows: datasets.Dataset, folder: Any, *, more: Any = None, **settings: Any):
    """``trl``'s trainer of this name; ``more`` are arguments of the trainer, ``settings`` of its configuration."""
    config = getattr(trl, f"{name}Config")(output_dir=str(folder), **{**SETTINGS, **settings})
    trainer = getattr(trl, f"{name}Trainer")(
        model=model, args=config, train_dataset=rows, processing_class=tokenizer(), **(more or {})
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


@dataclasses.dataclass
class Run:
    """The results of a training run: the logs of each step and the trained parameter."""

    logs: list[dict[str, float]]
    parameter: Tensor

    @property
    def losses(self) -> list[float]:
        return [log["loss"] for log in self.logs]


def train(trainer: Any) -> Run:
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return Run(logs, trained(trainer.model))


def run(name: str, model: Any, rows: datasets.Dataset, folder: Any, **arguments: Any) -> Run:
    return train(make_trainer(name, model, rows, folder, **arguments))


def assert_same_run(got: Run, want: Run, metrics: tuple[str, ...] = (), *, tolerance: float = TOLERANCE) -> None:
    """Losses, trained parameters, and TRL's ``metrics`` are equal."""
    assert_learns(want.losses)
    losses = losses_differ(got.losses, want.losses)
    assert losses <= tolerance, f"losses differ by {losses:.1e}: {got.losses}, wanted {want.losses}"
    parameter = difference(got.parameter, want.parameter)
    assert parameter <= tolerance, f"the trained parameters differ by {parameter:.1e}"
    for metric in metrics:
        mine, theirs = ([log[metric] for log in r.logs] for r in (got, want))
        assert torch.allclose(torch.tensor(mine), torch.tensor(theirs), rtol=10 * tolerance, atol=tolerance), (
            f"{metric}: {mine}, wanted {theirs}"
        )


ORDERS = ("patch, then trainer", "trainer, then patch")
CASES = [(kind, ORDERS[0]) for kind in KINDS] + [(kind, ORDERS[1]) for kind in PEFT_KINDS]


def patched_run(
    name: str, kind: str, order: str, rows: datasets.Dataset, folder: Any, family: Family = LLAMA, **arguments: Any
) -> Run:
    """A run of a model that is patched before or after the trainer is made."""
    if order == ORDERS[0]:
        return run(name, patched_model(kind, family), rows, folder, **arguments)
    trainer = make_trainer(name, stock_model(kind, family), rows, folder, **arguments)
    peftkern.patch(trainer.model)
    return train(trainer)


__all__ = ["PREFIX", "Run", "assert_same_run", "data", "make_trainer", "patched_run", "run", "tokenizer", "train"]
