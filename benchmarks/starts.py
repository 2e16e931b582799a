# SPDX-License-Identifier: Apache-2.0
"""What a prefix or prompt learns in equal steps from different initial values.

    python -m benchmarks.starts --seeds 3             writes results/starts.csv
    python -m benchmarks.starts --cpu-time            beside other work

A start is random (standard deviation 0.02), zero, vocabulary (random tokens: a prompt takes their embeddings, a
prefix their keys and values) or text (two labelled reviews, as in `benchmarks.hybrids`). Everything else is as there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

import peftkern
from peftkern import PrefixKV, SoftPrompt
from peftkern.tools.demo.reviews import Task

from .common import Row
from .hybrids import PREFIX_LR, PROMPT_LR, prefix, prompt, trainable
from .review_training import Settings, Trained, Way, compare

#: Makes the prefix or prompt from (base model, length).
Make = Callable[[Any, int], nn.Module]

STARTS: dict[str, tuple[Make, float]] = {
    "prefix, random": (lambda base, length: PrefixKV(base, length), PREFIX_LR),
    "prefix, zero": (lambda base, length: PrefixKV(base, length, init="zero"), PREFIX_LR),
    "prefix, vocabulary": (lambda base, length: PrefixKV.from_vocabulary(base, length), PREFIX_LR),
    "prompt, random": (lambda base, length: SoftPrompt(base, length), PROMPT_LR),
    "prompt, vocabulary": (lambda base, length: SoftPrompt(base, length, init="vocab"), PROMPT_LR),
}


def trained(make: Make, rate: float, base: Any, task: Task, settings: Settings) -> Trained:
    """The base model with a new prefix or prompt."""
    learned = make(base, settings.length)
    peftkern.patch(base, learned, freeze=True, logits="labelled")
    return Trained(base, [(trainable(learned), rate)])


WAYS: dict[str, Way] = {
    **{name: partial(trained, make, rate) for name, (make, rate) in STARTS.items()},
    "prefix, text": prefix,
    "prompt, text": prompt,
}


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Run, write and print."""
    return compare("starts", "Movie reviews: where training starts", str(__doc__), WAYS, arguments)


if __name__ == "__main__":
    main()
