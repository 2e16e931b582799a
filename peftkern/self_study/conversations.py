# SPDX-License-Identifier: Apache-2.0
"""Questions and answers about a document, and their file of JSON lines."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..files import append_to_file, replace_file

__all__ = ["Conversation", "ConversationFile", "read_conversations"]

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Conversation:
    """One question and its answer.

    Attributes:
        kind: name of the seed prompt.
        question, answer: as text.
        prompt_ids: tokens of the question's turn, up to the answer.
        answer_ids: tokens of the answer, with the one that ends it unless it was too long.
    """

    kind: str
    question: str
    answer: str
    prompt_ids: list[int]
    answer_ids: list[int]


class ConversationFile:
    """Conversations that one run after the other appends to.

    The first line describes how they are made. A line that an interrupted run has written in part is removed, and so
    are the others of its batch, which are made together.

    Args:
        path: of the file, which is created if it does not exist.
        made_with: everything that determines the conversations.
        batch_size: conversations that are made together.

    Attributes:
        conversations: those in the file, in order.

    Raises:
        ValueError: for a file that was made with other options, or is damaged before its last line.
    """

    def __init__(self, path: str | os.PathLike[str], made_with: dict[str, Any], batch_size: int) -> None:
        self.path = Path(path)
        header = {"peftkern_self_study": FORMAT_VERSION, **made_with}
        if not self.path.exists():
            replace_file(self.path, _line(header))
        found, self.conversations = _read(self.path)
        if found != header:
            names = sorted(name for name in {*found, *header} if found.get(name) != header.get(name))
            raise ValueError(
                f"path: expected a file made with the same {', '.join(names)}, got {self.path}; remove it, or choose "
                "another one"
            )
        whole = len(self.conversations) - len(self.conversations) % batch_size
        if len(self.conversations) < made_with["count"]:
            self.conversations = self.conversations[:whole]
        complete = b"".join(map(_line, (header, *map(asdict, self.conversations))))
        if self.path.read_bytes() != complete:
            replace_file(self.path, complete)

    def append(self, conversations: Sequence[Conversation]) -> None:
        """Add conversations of one batch."""
        append_to_file(self.path, b"".join(_line(asdict(conversation)) for conversation in conversations))
        self.conversations += conversations


def read_conversations(path: str | os.PathLike[str]) -> list[Conversation]:
    """The conversations in a file that :func:`.synthesise` has written. A torn last line is left out.

    Raises:
        ValueError: for a file of another format, or one that is damaged before its last line.
    """
    return _read(Path(path))[1]


def _line(value: Any) -> bytes:
    return (json.dumps(value, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _read(path: Path) -> tuple[dict[str, Any], list[Conversation]]:
    *lines, torn = path.read_bytes().split(b"\n")  # what follows the last line break is not a whole line
    header: Any = None
    conversations = []
    for number, line in enumerate(lines):
        try:
            value = json.loads(line)
            if number == 0:
                header = value
                if header.get("peftkern_self_study") != FORMAT_VERSION:
                    raise ValueError(f"format {header.get('peftkern_self_study')}")
            else:
                conversations.append(
                    Conversation(**{field.name: value[field.name] for field in fields(Conversation)})
                )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}, line {number + 1}: expected JSON of self-study format {FORMAT_VERSION}, got {error}"
            ) from error
    if header is None:
        raise ValueError(f"{path}: expected a file of self-study format {FORMAT_VERSION}, got {torn[:40]!r}")
    return header, conversations
