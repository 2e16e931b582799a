# SPDX-License-Identifier: Apache-2.0
"""The accuracy of LoRA, a prefix, a prompt, and LoRA with a prefix, trained on the same movie reviews.

    python -m benchmarks.hybrids --seeds 3            writes results/hybrids.csv
    python -m benchmarks.hybrids --only lora prefix   these two
    python -m benchmarks.hybrids --cpu-time           beside other work

SmolLM2-135M-Instruct in fp32 names the sentiment of short reviews. Each seed has an order of the reviews and initial
values of LoRA. Prefix and prompt start from two labelled reviews. The reviews on which accuracy is measured are the
same for all, and were used to choose neither learning rates nor steps. The error is the standard error of the mean
over seeds. All models are patched: steps run without padding, with logits of labels only. A run is skipped if the
file has its row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import peft
from torch import nn

import peftkern
from peftkern.tools.demo.reviews import EXAMPLES, Task

from .common import Row
from .review_training import Settings, Trained, Way, compare

LORA_LR, PREFIX_LR, PROMPT_LR = 1e-3, 3e-3, 1e-2


def with_lora(base: Any, settings: Settings) -> Any:
    """A ``PeftModel`` with LoRA on the query and value projections."""
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=settings.rank, lora_alpha=2 * settings.rank, target_modules=["q_proj", "v_proj"]
    )
    return peft.get_peft_model(base, config)


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that train."""
    return [p for p in module.parameters() if p.requires_grad]


def lora(base: Any, task: Task, settings: Settings) -> Trained:
    """LoRA alone. The patch has no prefix; it skips padding and computes logits of labels only."""
    model = with_lora(base, settings)
    peftkern.patch(model, share="prefixes", logits="labelled")
    return Trained(model, [(trainable(model), LORA_LR)])


def prefix(base: Any, task: Task, settings: Settings) -> Trained:
    """Keys and values of every layer."""
    learned = peftkern.PrefixKV.from_text(base, task.tokenizer, EXAMPLES, settings.length)
    peftkern.patch(base, learned, freeze=True, logits="labelled")
    return Trained(base, [(trainable(learned), PREFIX_LR)])


def prompt(base: Any, task: Task, settings: Settings) -> Trained:
    """Input embeddings."""
    learned = peftkern.SoftPrompt.from_text(base, task.tokenizer, EXAMPLES, settings.length)
    peftkern.patch(base, learned, freeze=True, logits="labelled")
    return Trained(base, [(trainable(learned), PROMPT_LR)])


def lora_and_prefix(base: Any, task: Task, settings: Settings) -> Trained:
    """Both, each with its learning rate."""
    learned = peftkern.PrefixKV.from_text(base, task.tokenizer, EXAMPLES, settings.length)
    model = with_lora(base, settings)
    weights = trainable(model)
    peftkern.patch(model, learned, logits="labelled")
    return Trained(model, [(weights, LORA_LR), (trainable(learned), PREFIX_LR)])


WAYS: dict[str, Way] = {"lora": lora, "prefix": prefix, "prompt": prompt, "lora + prefix": lora_and_prefix}


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Run, write and print."""
    title = "Movie reviews: what is trained"
    return compare("hybrids", title, str(__doc__), WAYS, arguments)


if __name__ == "__main__":
    main()
