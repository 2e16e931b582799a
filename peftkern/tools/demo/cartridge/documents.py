# SPDX-License-Identifier: Apache-2.0
"""The documents: chapters of Python's own documentation, which every Python contains, or a file."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

from ....user_cache import expanded
from ..options import DemoError

__all__ = ["Document", "read_documents"]

#: Chapters of the language reference, about 2,000 tokens each.
_TOPICS = {"import": "The import statement", "execmodel": "The execution model"}


class Document(NamedTuple):
    """A text and its title."""

    title: str
    text: str


def read_documents(chosen: str | None, count: int) -> list[Document]:
    """The file ``chosen``, else the first ``count`` chapters of Python's documentation.

    Raises:
        DemoError: if there are none.
    """
    if chosen is not None:
        path = expanded(chosen)
        try:
            text = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise DemoError(f"--data {path}: cannot be read as text ({error})") from error
        if not text:
            raise DemoError(f"--data {path}: expected a text, got an empty file")
        return [Document(path.name, text)]
    if importlib.util.find_spec("pydoc_data") is None:
        raise DemoError("no document found: this Python has no pydoc_data. Name a text file with --data.")
    from pydoc_data.topics import topics

    return [Document(f"{title} (Python's documentation)", topics[name].strip()) for name, title in _TOPICS.items()][
        :count
    ]
