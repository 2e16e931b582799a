# SPDX-License-Identifier: Apache-2.0
"""Which patched models are running in this thread.

A call that went around the hooks of its base model is noticed in this way, and the hook before a call can leave a note
for the one after it without an argument that the model would have to accept.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

__all__ = ["running"]


class _Running(threading.local):
    """The calls of base models that are running, as (patch, note), innermost last.

    torch.compile traces one call at a time and no thread-local state; the note then is an attribute of the patch.
    """

    calls: tuple[tuple[Any, Any], ...] = ()

    def enter(self, patch: Any, note: Any) -> None:
        """A call begins; ``note`` is for :meth:`leave`."""
        if torch.compiler.is_compiling():
            patch.compiled_note = note
        else:
            self.calls = (*self.calls, (patch, note))

    def leave(self, patch: Any) -> Any:
        """The innermost call of ``patch`` has ended, or raised. Returns its note; None if it had not begun."""
        if torch.compiler.is_compiling():
            note, patch.compiled_note = patch.compiled_note, None
            return note
        for i in reversed(range(len(self.calls))):
            if self.calls[i][0] is patch:
                note, self.calls = self.calls[i][1], self.calls[:i]
                return note
        return None

    def has(self, patch: Any) -> bool:
        """Whether a call is running; True while compiling, where it is not known."""
        return torch.compiler.is_compiling() or any(running is patch for running, _ in self.calls)


#: Of the process and not of a model, so that models can be copied while they run.
running = _Running()
