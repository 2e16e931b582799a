# SPDX-License-Identifier: Apache-2.0
"""The steps of the cartridge demo on one document, and on two that are composed."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from .... import self_study
from ....checkpoint import load_prefix, save_prefix
from ....checkpoint_files import WEIGHTS_NAME
from ....huggingface.fingerprint import fingerprint
from ....modules import PrefixKV
from ....self_study import (
    HELD_OUT_PROMPTS,
    SEED_PROMPTS,
    Chat,
    Comparison,
    Conversation,
    Study,
    Synthesis,
    Targets,
    Training,
)
from ..options import DemoError
from .documents import Document
from .options import Options

__all__ = ["SHARE", "Lab", "Lesson", "compose", "read", "study"]

#: Tokens of a document per token of its cartridge, if no length is given.
SHARE = 16


@dataclass
class Lab:
    """What all steps share.

    Attributes:
        model: patched, frozen.
        bars: gives the function that shows the progress of a step: ``bars(title, total)(done, note)``.
        stop: whether training should end early.
    """

    model: Any
    tokenizer: Any
    options: Options
    out: Path
    bars: Callable[[str, int], Callable[[int, str], None]]
    stop: Callable[[], bool]

    def told(self, title: str, total: int) -> Callable[[int, int], None]:
        """A progress function of a step that counts its parts, and ends it if the user has asked for that."""
        tell = self.bars(title, total)

        def progress(done: int, _: int) -> None:
            tell(done, "")
            if self.stop():
                raise KeyboardInterrupt

        return progress


@dataclass
class Lesson:
    """One document with its questions and its cartridges.

    Attributes:
        prefix: of the whole document, which the teacher reads.
        start: the cartridge before training, the document's first P tokens.
        trained: one per run.
        losses: of each run.
        targets: of the teacher on the questions for training.
        held_out: other questions, from other seed prompts.
        compared: no document, start, trained (one per run) and whole document beside the teacher.
    """

    document: Document
    prefix: PrefixKV
    start: PrefixKV
    targets: Targets
    held_out: list[Conversation]
    trained: list[PrefixKV]
    losses: list[list[float]]
    compared: dict[str, Comparison]


def read(lab: Lab, document: Document) -> tuple[PrefixKV, PrefixKV]:
    """The prefix of a document, and the start of its cartridge. The model must not be patched.

    Both are saved, so that a run continues with the same values on other machines, which round differently.

    Raises:
        DemoError: for a document that is too short or too long.
    """
    text, options = Chat(lab.tokenizer).document(document.text), lab.options
    made_from = json.dumps([text, options.length, fingerprint(lab.model)])
    folder = lab.out / "documents" / hashlib.sha256(made_from.encode()).hexdigest()[:16]
    try:
        prefix = _saved(folder / "whole", lambda: PrefixKV.from_text(lab.model, lab.tokenizer, text))
        tokens = max(prefix.lengths)
        length = options.length or max(2, tokens // SHARE)
        if length >= tokens:
            raise DemoError(f"--length: expected less than the {tokens} tokens of the document, got {length}")
        # The first token is an attention sink, which Cartridges freezes.
        start = _saved(
            folder / "start",
            lambda: PrefixKV.from_text(lab.model, lab.tokenizer, text, length, num_frozen_tokens=1),
        )
    except ValueError as error:
        raise DemoError(f"{document.title}: {error}") from error
    return prefix.requires_grad_(False), start


def _saved(folder: Path, make: Callable[[], PrefixKV]) -> PrefixKV:
    """The prefix in a folder, which is made and saved if there is none."""
    if not (folder / WEIGHTS_NAME).exists():
        save_prefix(make(), folder)
    return cast(PrefixKV, load_prefix(folder))


def ask(lab: Lab, document: Document, prefix: PrefixKV, name: str, *, held_out: bool = False) -> list[Conversation]:
    """Questions about a document and the answers of the model that reads it."""
    options = lab.options
    count = options.eval_rows if held_out else options.questions
    title = "held-out questions" if held_out else "questions"
    prompts = HELD_OUT_PROMPTS if held_out else SEED_PROMPTS
    synthesis = Synthesis(
        seed=2 * options.seed + held_out, prompts=prompts, passage_tokens=32, question_tokens=24,
        answer_tokens=options.answer, batch_size=min(32, count),
    )  # fmt: skip
    return self_study.synthesise(
        lab.model, lab.tokenizer, prefix, document.text, lab.out / f"{name}-{title.replace(' ', '-')}.jsonl", count,
        synthesis, progress=lab.told(title, count),
    )  # fmt: skip


def teach(lab: Lab, prefix: PrefixKV, questions: list[Conversation], name: str) -> Targets:
    """What the teacher predicts in the answers."""
    path = lab.out / f"{name}-targets.safetensors"
    return self_study.capture(lab.model, prefix, questions, path=path, progress=lab.told("teacher", len(questions)))


def learn(lab: Lab, start: PrefixKV, studies: list[Study], name: str, run: int) -> tuple[PrefixKV, list[float]]:
    """A trained copy of a cartridge, and its losses; fewer than ``steps`` if the user has stopped the run."""
    options, cartridge = lab.options, copy.deepcopy(start)
    steps = options.steps * (1 if len(studies) == 1 else 2)  # as many for each of two documents
    training = Training(steps, options.batch_size, options.lr, seed=options.seed + run)
    tell = lab.bars(f"training {run + 1} of {options.runs}" if len(studies) == 1 else "joint training", steps)
    losses = self_study.train(
        lab.model, cartridge, studies, lab.out / f"{name}-training-{run}.safetensors", training,
        progress=lambda done, loss: tell(done, f"loss {loss:.3f}"), stop=lab.stop,
    )  # fmt: skip
    if len(losses) < steps:
        raise KeyboardInterrupt
    tell(steps, f"loss {losses[-1]:.3f}")
    return cartridge, losses


def study(lab: Lab, document: Document, prefix: PrefixKV, start: PrefixKV) -> Lesson:
    """Everything about one document."""
    questions = ask(lab, document, prefix, "first")
    held_out = ask(lab, document, prefix, "first", held_out=True)
    targets = teach(lab, prefix, questions, "first")
    trained, losses = [], []
    for run in range(lab.options.runs):
        cartridge, found = learn(lab, start, [Study(targets)], "first", run)
        trained.append(cartridge)
        losses.append(found)
    students = {"no document": PrefixKV(lab.model, 0), "start": start}
    students |= {f"trained {run}": cartridge for run, cartridge in enumerate(trained)} | {"whole document": prefix}
    total = -(-len(held_out) // 16) * (1 + len(students))
    compared = self_study.compare(lab.model, prefix, students, held_out, progress=lab.told("comparing", total))
    return Lesson(document, prefix, start, targets, held_out, trained, losses, compared)


def compose(
    lab: Lab, first: Lesson, document: Document, prefix: PrefixKV, start: PrefixKV, both: PrefixKV
) -> tuple[PrefixKV, dict[str, Comparison]]:
    """Cartridges of two documents, trained to be read alone and together.

    Args:
        first: the first document.
        document, prefix, start: the second one.
        both: the prefix of both documents, which the teacher of the composition reads.

    Returns:
        The bank of both cartridges, and its rows beside that teacher on held-out questions about both documents.
    """
    questions = ask(lab, document, prefix, "second")
    held_out = ask(lab, document, prefix, "second", held_out=True)
    asked = [*first.targets.conversations, *questions]
    studies = [
        Study(first.targets, (0,)),
        Study(teach(lab, prefix, questions, "second"), (1,)),
        Study(teach(lab, both, asked, "both"), (0, 1)),
    ]
    bank, _ = learn(lab, PrefixKV.stack([first.start, start]), studies, "both", 0)
    students: dict[str, Any] = {"no document": PrefixKV(lab.model, 0)}
    students |= {"first alone": (bank, (0,)), "second alone": (bank, (1,)), "both": (bank, (0, 1))}
    rows = [*first.held_out, *held_out]
    total = -(-len(rows) // 16) * (1 + len(students))
    return bank, self_study.compare(lab.model, both, students, rows, progress=lab.told("comparing", total))
