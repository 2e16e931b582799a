# SPDX-License-Identifier: Apache-2.0
"""The model asks questions about a document, and answers them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..huggingface.fingerprint import fingerprint
from ..huggingface.probing import quiet
from ..huggingface.switch import switched
from ..modules import PrefixKV
from .batches import check_positions
from .chat import Chat
from .conversations import Conversation, ConversationFile
from .identity import digest_of, digest_of_text
from .prompts import SEED_PROMPTS, SeedPrompt

__all__ = ["Synthesis", "synthesise"]


@dataclass(frozen=True)
class Synthesis:
    """How questions and answers are made.

    Attributes:
        seed: of passages, kinds of questions and samples. The same seed makes the same conversations.
        prompts: kinds of questions, one after the other.
        passage_tokens: tokens of the passage that a question is about.
        question_tokens, answer_tokens: the most tokens of a question and an answer.
        batch_size: conversations that are generated together.
        question_temperature, answer_temperature: of the samples; 0 takes the likeliest token.
    """

    seed: int = 0
    prompts: Sequence[SeedPrompt] = SEED_PROMPTS
    passage_tokens: int = 64
    question_tokens: int = 32
    answer_tokens: int = 64
    batch_size: int = 16
    question_temperature: float = 0.8
    answer_temperature: float = 0.5

    def __post_init__(self) -> None:
        for name in ("passage_tokens", "question_tokens", "answer_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("question_temperature", "answer_temperature"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if not self.prompts:
            raise ValueError("prompts: expected at least one, got none")


def synthesise(
    model: Any,
    tokenizer: Any,
    document: PrefixKV,
    text: str,
    path: str | os.PathLike[str],
    count: int,
    options: Synthesis | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[Conversation]:
    """Conversations about a document, made by the model that reads it.

    For each conversation, the model sees the document, a passage of it and a seed prompt, and writes a question. It
    then answers the question, seeing the document alone. Every batch is appended to a file as soon as it is made; a
    run that was interrupted continues behind the last whole batch, and makes the same conversations.

    Args:
        model: patched with a :class:`peftkern.PrefixKV` of any length for the same layers.
        tokenizer: of the model.
        document: the prefix of the whole document, ``PrefixKV.from_text(model, tokenizer, chat.document(text))`` with
            ``chat = Chat(tokenizer)``.
        text: the document, from which passages are taken.
        path: of the file of JSON lines.
        count: how many conversations.
        options: seed, lengths and so on.
        progress: called with the number of conversations made, and ``count``.

    Raises:
        ValueError: for a file that was made with other options, or with another model, tokenizer or document, or is
            damaged; for a document behind which a question and its answer exceed the model's positions.
    """
    options = options or Synthesis()
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    writer = _Writer(model, tokenizer, document, text, options)
    prompts = [list(prompt) for prompt in options.prompts]
    made_with = {
        "count": count, **asdict(options), "prompts": prompts, "text": digest_of_text(text),
        "document": digest_of(document), **writer.identity(),
    }  # fmt: skip
    file = ConversationFile(path, made_with, options.batch_size)
    with switched(model, document), quiet(model):
        while (done := len(file.conversations)) < count:
            if progress is not None:
                progress(done, count)
            file.append(writer.write(range(done, min(done + options.batch_size, count))))
    if progress is not None:
        progress(count, count)
    return file.conversations


class _Writer:
    """Generates conversations with a model that reads the document."""

    def __init__(self, model: Any, tokenizer: Any, document: PrefixKV, text: str, options: Synthesis) -> None:
        self.model, self.tokenizer, self.document, self.options = model, tokenizer, document, options
        self.chat = Chat(tokenizer)
        self.ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        ends = getattr(model.generation_config, "eos_token_id", None)
        ends = tokenizer.eos_token_id if ends is None else ends
        self.ends: list[int] = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)

    def identity(self) -> dict[str, str]:
        """Digests of the model, of how it generates, and of the tokenizer."""
        turns = [self.chat.turn(prompt.instruction) for prompt in self.options.prompts]
        vocabulary: dict[str, int] = getattr(self.tokenizer, "get_vocab", dict)()
        return {
            "model": fingerprint(self.model),
            "generation": digest_of_text([self.model.generation_config.to_dict(), self.ends]),
            "tokenizer": digest_of_text([vocabulary, self.ids, self._text(self.ids), turns]),
        }

    def write(self, numbers: range) -> list[Conversation]:
        """The conversations of these numbers, which are one batch."""
        options = self.options
        seed = options.seed * 1_000_003 + numbers.start
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)  # of the samples; the caller's state is restored behind the block
        kinds = [options.prompts[number % len(options.prompts)] for number in numbers]
        asked = [self.chat.turn(f'Passage: "{self._passage(generator)}"\n\n{kind.instruction}') for kind in kinds]
        drafts = self._generate(asked, options.question_tokens, options.question_temperature)
        questions = [_clean(self._text(x)) or kind.otherwise for x, kind in zip(drafts, kinds, strict=True)]
        prompts = [self.chat.turn(question) for question in questions]
        answers = self._generate(prompts, options.answer_tokens, options.answer_temperature)
        return [
            Conversation(kind.name, question, self._text(answer), prompt, answer)
            for kind, question, prompt, answer in zip(kinds, questions, prompts, answers, strict=True)
        ]

    def _passage(self, generator: torch.Generator) -> str:
        last = max(0, len(self.ids) - self.options.passage_tokens)
        start = int(torch.randint(last + 1, (), generator=generator))
        return " ".join(self._text(self.ids[start : start + self.options.passage_tokens]).split())

    def _generate(self, prompts: Sequence[Sequence[int]], most: int, temperature: float) -> list[list[int]]:
        """The tokens that follow each prompt, with the first one that ends an answer."""
        longest = max(map(len, prompts))
        check_positions(self.model, self.document, longest + most, "document")
        pad = self.ends[0] if self.ends else 0
        ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        device = self.model.get_input_embeddings().weight.device
        sample = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        out: Tensor = self.model.generate(
            ids.to(device), attention_mask=mask.to(device), max_new_tokens=most, pad_token_id=pad,
            eos_token_id=self.ends or None, **(sample if temperature else {"do_sample": False}),
        )  # fmt: skip
        return [self._until_end(row) for row in out[:, longest:].tolist()]

    def _until_end(self, ids: list[int]) -> list[int]:
        ends = [place for place, token in enumerate(ids) if token in self.ends]
        return ids[: ends[0] + 1] if ends else ids

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def _clean(draft: str) -> str:
    """The first line of a draft without quotation marks and a name of the speaker."""
    line = next((line.strip() for line in draft.splitlines() if line.strip()), "")
    name, colon, rest = line.partition(":")
    if colon and rest.strip() and len(name.split()) <= 2:
        line = rest.strip()
    return line.strip("\"'*“” ")
