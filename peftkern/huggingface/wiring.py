# SPDX-License-Identifier: Apache-2.0
"""The base classes of patches, and the changes that a patch makes to a model and undoes."""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel

from ..model_info import PATCH

__all__ = ["PATCH", "Patch", "Source", "Wiring", "changing"]

#: The thread that changes an object, by the id of the object.
_changing: dict[int, int] = {}
_changed = threading.Condition()


@contextlib.contextmanager
def changing(model: nn.Module) -> Iterator[None]:
    """Within the block, no other thread changes ``model``, a model that contains it, or one that it contains.

    Everything that changes a model (patch, unpatch, the switch to another prefix) does so in such a block. Each
    change therefore sees a model that is either patched or not, and the second of two threads that patch one model
    is told that it is patched. Blocks of one thread may be nested.
    """
    thread, parts = threading.get_ident(), _parts_of(model)
    with _changed:
        while any(_changing.get(id(part), thread) != thread for part in parts):
            _changed.wait()
            parts = _parts_of(model)
        mine = [part for part in parts if id(part) not in _changing]
        _changing.update((id(part), thread) for part in mine)
    try:
        yield
    finally:
        with _changed:
            for part in mine:
                del _changing[id(part)]
            _changed.notify_all()


def _parts_of(model: nn.Module) -> list[Any]:
    """The modules of a model and the configs of those that have one, which another thread may be changing."""
    found: dict[int, Any] = {}
    waiting: list[Any] = [model]
    while waiting:
        module = waiting.pop()
        if module is not None and id(module) not in found:
            found[id(module)] = module
            waiting += list(module._modules.values())  # at once, unlike model.modules()
    configs = [x.config for x in found.values() if isinstance(x, PreTrainedModel)]
    return list((found | {id(config): config for config in configs}).values())


class Wiring:
    """Changes to a model, each recorded with its inverse. :meth:`undo` undoes them in reverse order.

    An attribute is restored only if it still has the value that was set here. If other code has replaced the value in
    the meantime, it is left alone.
    """

    def __init__(self) -> None:
        self._undos: list[Callable[[], Any]] = []

    def set_attribute(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of an instance."""
        previous = (owner.__dict__[name],) if name in owner.__dict__ else ()
        owner.__dict__[name] = value
        self._undos.append(partial(_restore_attribute, owner, name, value, previous))

    def add_hooks(self, *handles: Any) -> None:
        """Record handles of hooks, which :meth:`undo` removes."""
        self._undos += [handle.remove for handle in handles]

    def add_submodule(self, owner: nn.Module, name: str, module: nn.Module) -> None:
        """Make ``module`` a submodule of ``owner``."""
        owner.add_module(name, module)
        self._undos.append(partial(_remove_submodule, owner, name))

    def freeze(self, parameters: Iterable[nn.Parameter]) -> None:
        """Clear ``requires_grad`` of parameters."""
        frozen = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(False)
        self._undos.append(partial(_set_requires_grad, frozen))

    def on_undo(self, function: Callable[[], Any]) -> None:
        """Have :meth:`undo` call ``function``."""
        self._undos.append(function)

    def undo(self) -> None:
        """Undo all changes."""
        while self._undos:
            self._undos.pop()()


class Patch(ABC):
    """One patched model: what :func:`peftkern.unpatch` undoes and :func:`peftkern.explain` describes.

    Attributes:
        model: the module that the user passed to :func:`peftkern.patch`.
        base: the Hugging Face model in it.
        wiring: the changes made so far.
        compiled_note: the note on the running call while torch.compile traces (:mod:`.calls`).
    """

    def __init__(self, model: nn.Module, base: PreTrainedModel) -> None:
        self.model = model
        self.base = base
        self.wiring = Wiring()
        self.compiled_note: Any = None

    @abstractmethod
    def install(self) -> None:
        """Change the model."""

    @abstractmethod
    def explain(self) -> str:
        """One line: how batches run, and why they do not run faster."""

    def mark(self, *models: nn.Module) -> None:
        """Make the patch an attribute of ``models``, by which it is found again, and refuse continuous batching."""
        for owner in {id(model): model for model in models}.values():
            self.wiring.set_attribute(owner, PATCH, self)
        self.wiring.set_attribute(self.base, "init_continuous_batching", refuse_continuous_batching)

    def remove(self) -> None:
        """Undo :meth:`install`."""
        self.wiring.undo()


class Source(ABC):
    """Provides the prefix or prompt of a patch.

    Attributes:
        is_given: whether the caller of the base model provides it with each call, as PEFT does. Otherwise every call
            that does not continue a sequence gets it.
        needs_cache: whether it only fits models that take a key-value cache.
        fills_every_layer: whether the stock model gets a prefix in all layers of its cache, instead of those that
            self-attention reads.
    """

    is_given: bool
    needs_cache = True
    fills_every_layer: bool = False

    @abstractmethod
    def wire(self, patch: Patch) -> None:
        """Install what the source needs in the model."""


def refuse_continuous_batching(*args: Any, **kwargs: Any) -> NoReturn:
    """Replaces the method by which ``generate_batch`` and the managers of continuous batching begin.

    Their paged cache contains no prefix, and PEFT's own code would not notice that it is missing.
    """
    raise ValueError(
        "generate_batch: expected a model without a patch, because the paged cache of continuous batching has no "
        "prefix or prompt, got a patched one; call generate, or unpatch the model"
    )


def _restore_attribute(owner: Any, name: str, value: Any, previous: tuple[Any, ...]) -> None:
    # Every access creates a new bound method, so methods are compared by value.
    if name in owner.__dict__ and owner.__dict__[name] == value:
        del owner.__dict__[name]
        if previous:
            owner.__dict__[name] = previous[0]


def _remove_submodule(owner: nn.Module, name: str) -> None:
    owner._modules.pop(name, None)


def _set_requires_grad(parameters: list[torch.nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.requires_grad_(True)
