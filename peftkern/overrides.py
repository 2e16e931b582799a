# SPDX-License-Identifier: Apache-2.0
"""Attributes that have another value for the duration of a block. Blocks of several threads may overlap.

Each block is an entry in the attribute's stack. The block that was entered last and has not ended counts, and once
all have ended the original value is back. A block that put back what it found would leave the value of another block
behind if that one ended first.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

__all__ = ["overridden"]


@dataclass
class _Entry:
    """A block that is running."""

    value: Any


@dataclass
class _Stack:
    """The blocks that change one attribute. ``owner`` keeps it alive, so that its id is not reused."""

    owner: Any
    original: Any
    entries: list[_Entry] = field(default_factory=list)

    @property
    def value(self) -> Any:
        """What counts now."""
        return self.entries[-1].value if self.entries else self.original


_stacks: dict[tuple[int, str], _Stack] = {}
_lock = threading.Lock()


@contextlib.contextmanager
def overridden(owners: Iterable[Any], name: str, value: Any) -> Iterator[None]:
    """Within the block, the attribute ``name`` of each of ``owners`` is ``value``."""
    entered: list[Any] = []
    entry = _Entry(value)
    try:
        for owner in owners:
            with _lock:
                _enter(owner, name, getattr(owner, name), entry)
                entered.append(owner)
                setattr(owner, name, value)
        yield
    finally:
        for owner in entered:
            with _lock:
                setattr(owner, name, _leave(owner, name, entry))


def _enter(owner: Any, name: str, original: Any, entry: _Entry) -> None:
    stack = _stacks.setdefault((id(owner), name), _Stack(owner, original))
    stack.entries.append(entry)


def _leave(owner: Any, name: str, entry: _Entry) -> Any:
    """Remove the entry. Returns the value that counts from now on."""
    stack = _stacks[id(owner), name]
    stack.entries[:] = [other for other in stack.entries if other is not entry]
    if not stack.entries:
        del _stacks[id(owner), name]
    return stack.value
