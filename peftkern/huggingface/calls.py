# SPDX-License-Identifier: Apache-2.0
"""Which models are running in this thread.

A call that went around the hooks of its base model is noticed in this way. Hooks find the module that runs, which
may be a replica of the one that was patched, and the hook before a call can leave a note for the one after it without
an argument that the model would have to accept.
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
    """A call that is running.

    Attributes:
        of: the patch, or the model, that was called.
        module: what runs, ``of`` itself or a replica.
        frame: of ``Module.__call__``. It has left the stack when Ctrl-C has ended the call, after which torch runs no
            hooks.
        note: of the hook before the call.
    """

    of: Any
    module: Any
    frame: Any
    note: Any = None


class _Running(threading.local):
    """The calls that are running, innermost last.

    torch.compile traces one call at a time, and no thread-local state. A note then is an attribute of the patch.
    """

    calls: tuple[_Call, ...] = ()

    def enter(self, of: Any, module: Any) -> None:
        """A call begins."""
        if not torch.compiler.is_compiling():
            self._forget_interrupted()
            frame = sys._getframe(2)  # that of this hook's caller, which also calls the forward
            self.calls = (*self.calls, _Call(of, module, frame))

    def leave_note(self, of: Any, note: Any) -> None:
        """For the end of the call that is running."""
        if torch.compiler.is_compiling():
            of.compiled_note = note
        elif (call := self._find(of)) is not None:
            call.note = note

    def note(self, of: Any) -> Any:
        """The note on the call that is running; None if there is none."""
        if torch.compiler.is_compiling():
            return getattr(of, "compiled_note", None)
        call = self._find(of)
        return None if call is None else call.note

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
    """A frame and its callers."""
    frames = set()
    while frame is not None:
        frames.add(frame)
        frame = frame.f_back
    return frames


#: The frame of the forward, and the modules that it has switched.
_Pause = tuple[Any, list[Any]]


class _WithoutCheckpointing:
    """Switches activation checkpointing off for forwards without gradients, where it would only drop the cache.

    The flags are the modules' own and threads share them, so they stay off until the last of these forwards has
    ended.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pauses: list[_Pause] = []

    def begin(self, modules: list[Any]) -> _Pause | None:
        """Begin a pause for those of ``modules`` that are in training mode; None if there is nothing to pause."""
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
        """End the pauses of forwards that Ctrl-C has ended."""
        if torch.compiler.is_compiling() or not self._pauses:
            return
        alive: set[Any] = set().union(*map(stack_of, sys._current_frames().values()))
        for pause in [pause for pause in self._pauses if pause[0] not in alive]:
            self.end(pause)


#: Of the process, as the flags may be shared by models.
without_checkpointing = _WithoutCheckpointing()

#: Of the process and not of a model, so that models can be copied while they run.
running = _Running()
