# SPDX-License-Identifier: Apache-2.0
"""How a document and questions about it are written for a model."""

from __future__ import annotations

from typing import Any

__all__ = ["Chat"]


class Chat:
    """Writes a document as a system message, and a question as the user's turn behind it.

    The tokens of both together are those of the tokenizer's chat template, so that a model reads the turn in the same
    way behind the document and behind a cartridge. Without a template, or with one that writes the two parts
    differently, the document is plain text, and a turn is ``Question: ...  Answer:``.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.has_template = self._writes_parts()

    def document(self, text: str) -> list[int]:
        """The tokens of a document, for :meth:`peftkern.PrefixKV.from_text`."""
        if self.has_template:
            return self._tokens(self._apply([{"role": "system", "content": text}]))
        ids = list(self.tokenizer(f"{text.strip()}\n\n")["input_ids"])
        end = getattr(self.tokenizer, "eos_token_id", None)
        # Some tokenizers end a text, but a question follows here.
        return ids[:-1] if ids and ids[-1] == end else ids

    def turn(self, question: str) -> list[int]:
        """The tokens of a question behind the document, up to the answer."""
        if not self.has_template:
            return self._tokens(f"Question: {question}\nAnswer:")
        before = [{"role": "system", "content": "-"}]
        return self._tokens(self._turn_text(before, question))

    def _turn_text(self, before: list[dict[str, str]], question: str) -> str:
        whole = self._apply([*before, {"role": "user", "content": question}], add_generation_prompt=True)
        return whole.removeprefix(self._apply(before))

    def _apply(self, messages: list[dict[str, str]], **options: Any) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _writes_parts(self) -> bool:
        """Whether a template writes the user's turn in the same way behind every system message."""
        if not getattr(self.tokenizer, "chat_template", None):
            return False
        turns = set()
        for text in ("Some text.", "Other\n\ntext"):
            before = [{"role": "system", "content": text}]
            try:
                written, turn = self._apply(before), self._turn_text(before, "What?")
            except Exception:  # templates raise errors of many kinds, for example for a system message
                return False
            turns.add(turn)
            if text not in written or text in turn:
                return False
        return len(turns) == 1
