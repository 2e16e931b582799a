# SPDX-License-Identifier: Apache-2.0
"""Which models are running in this thread.

A call that went around the hooks of its base model is noticed in this way. Hooks find the module that runs, which
may be a replica of the one that was patched, and the hook before a call can leave a note for the one after it without
an argument that the model would have to accept.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["running"]


@dataclass
class _Call:
    """A call that is running.

    Attributes:
        of: the patch, or the model, that was called.
        module: what runs, ``of`` itself or a replica.
        note: of the hook before the call.
    """

    of: Any
    module: Any
    note: Any = None


class _Running(threading.local):
    """The calls that are running, innermost last.

    torch.compile traces one call at a time, and no thread-local state. A note then is an attribute of the patch.
    """

    calls: tuple[_Call, ...] = ()

    def enter(self, of: Any, module: Any) -> None:
        """A call begins."""
        if not torch.compiler.is_compiling():
            self.calls = (*self.calls, _Call(of, module))

    def leave_note(self, of: Any, note: Any) -> None:
        """For the end of the call that is running."""
        if torch.compiler.is_compiling():
            of.compiled_note = note
        elif (call := self._find(of)) is not None:
            call.note = note

    def leave(self, of: Any) -> Any:
        """The innermost call has ended, or raised. Returns its note; None if it had not begun."""
        if torch.compiler.is_compiling():
            note, of.compiled_note = getattr(of, "compiled_note", None), None
            return note
        call = self._find(of)
        if call is None:
            return None
        last = max(i for i, other in enumerate(self.calls) if other is call)
        self.calls = self.calls[:last]
        return call.note

    def module(self, of: Any, default: Any) -> Any:
        """What runs in the innermost call of ``of``; ``default`` if none is running or it is not known."""
        call = None if torch.compiler.is_compiling() else self._find(of)
        return default if call is None else call.module

    def has(self, of: Any) -> bool:
        """Whether a call is running; True while compiling, where it is not known."""
        return torch.compiler.is_compiling() or self._find(of) is not None

    def _find(self, of: Any) -> _Call | None:
        return next((call for call in reversed(self.calls) if call.of is of), None)


#: Of the process and not of a model, so that models can be copied while they run.
running = _Running()
