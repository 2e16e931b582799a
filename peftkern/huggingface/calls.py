# SPDX-License-Identifier: Apache-2.0
"""The calls of patched models that are running in the current thread.

The record has three uses. It reveals a call that bypassed the hooks of its base model. It tells hooks which module
runs, which may be a replica of the patched one. And the hook before a call can leave a note for the hook after it,
without passing an argument that the model would have to accept.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["running", "without_checkpointing"]


@dataclass
class _Call:
    """A running call.

    Attributes:
        of: the patch or model that was called.
        module: the module that runs, ``of`` itself or a replica.
        frame: the frame of ``Module.__call__``. If Ctrl-C ends the call, torch runs no further hooks; the frame is no
            longer on the stack then.
        note: left by the hook before the call.
    """

    of: Any
    module: Any
    frame: Any
    note: Any = None


class _Running(threading.local):
    """The running calls, innermost last.

    torch.compile traces one call at a time and cannot trace thread-local state, so a note is then an attribute of the
    patch.
    """

    calls: tuple[_Call, ...] = ()

    def enter(self, of: Any, module: Any) -> None:
        """Record the start of a call."""
        if not torch.compiler.is_compiling():
            self._forget_interrupted()
            frame = sys._getframe(2)  # the caller of the hook, which also calls the forward
            self.calls = (*self.calls, _Call(of, module, frame))

    def leave_note(self, of: Any, note: Any) -> None:
        """Leave a note for the end of the running call."""
        if torch.compiler.is_compiling():
            of.compiled_note = note
        elif (call := self._find(of)) is not None:
            call.note = note

    def note(self, of: Any) -> Any:
        """The note on the running call; None if there is none."""
        if torch.compiler.is_compiling():
            return getattr(of, "compiled_note", None)
        call = self._find(of)
        return None if call is None else call.note

    def leave(self, of: Any) -> Any:
        """Record that the innermost call has returned or raised. Returns its note; None if no call was running."""
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
        """The module that runs in the innermost call of ``of``; ``default`` if there is none, or while compiling."""
        call = None if torch.compiler.is_compiling() else self._find(of)
        return default if call is None else call.module

    def has(self, of: Any) -> bool:
        """Whether a call is running; True while compiling, where this is unknown."""
        if torch.compiler.is_compiling():
            return True
        self._forget_interrupted()
        return self._find(of) is not None

    def _forget_interrupted(self) -> None:
        if self.calls:
            alive = stack_of(sys._getframe(1))
            self.calls = tuple(call for call in self.calls if call.frame in alive)

    def _find(self, of: Any) -> _Call | None:
        return next((call for call in reversed(self.calls) if call.of is of), None)


def stack_of(frame: Any) -> set[Any]:
    """A frame and all its callers."""
    frames = set()
    while frame is not None:
        frames.add(frame)
        frame = frame.f_back
    return frames


#: (frame of the forward, modules whose checkpointing it has switched off).
_Pause = tuple[Any, list[Any]]


class _WithoutCheckpointing:
    """Switches activation checkpointing off for forwards without gradients.

    Checkpointing would save nothing there, and would drop the cache.

    The flags belong to the modules, which threads share. They stay off until the last of these forwards has ended.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pauses: list[_Pause] = []

    def begin(self, modules: list[Any]) -> _Pause | None:
        """Begin a pause for those of ``modules`` in training mode; returns its handle, None if nothing is paused."""
        if torch.compiler.is_compiling() or not any(m.gradient_checkpointing and m.training for m in modules):
            shared = any(m is other for m in modules for _, others in self._pauses for other in others)
            if torch.compiler.is_compiling() or not shared:
                return None
        with self._lock:
            paused = [m for _, others in self._pauses for m in others if any(m is mine for mine in modules)]
            paused += [m for m in modules if m.gradient_checkpointing and m.training]
            for module in paused:
                module.gradient_checkpointing = False
            pause = (sys._getframe(2), paused)
            self._pauses.append(pause)
        return pause

    def end(self, pause: _Pause) -> None:
        """End a pause."""
        with self._lock:
            self._pauses = [other for other in self._pauses if other is not pause]
            still = {id(module) for _, modules in self._pauses for module in modules}
            for module in pause[1]:
                module.gradient_checkpointing = id(module) not in still

    def restore_interrupted(self) -> None:
        """End the pauses of forwards that Ctrl-C has interrupted."""
        if torch.compiler.is_compiling() or not self._pauses:
            return
        alive: set[Any] = set().union(*map(stack_of, sys._current_frames().values()))
        for pause in [pause for pause in self._pauses if pause[0] not in alive]:
            self.end(pause)


#: One per process, because models may share modules and thus the flags.
without_checkpointing = _WithoutCheckpointing()

#: One per process instead of one per model, so that models can be copied while they run.
running = _Running()
