# SPDX-License-Identifier: Apache-2.0
"""What a patch changes in a model, and how each change is undone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from .attention import Implementation

__all__ = ["Wiring"]


class Wiring:
    """Changes to a model, each recorded with its undo. :meth:`undo` runs them in reverse order.

    An attribute is restored only while it still is what was set here. If somebody has replaced it since, it is
    theirs.
    """

    def __init__(self) -> None:
        self._undos: list[Callable[[], Any]] = []

    def set_attribute(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of an instance."""
        previous = (owner.__dict__[name],) if name in owner.__dict__ else ()
        owner.__dict__[name] = value
        self._undos.append(partial(_restore_attribute, owner, name, value, previous))

    def add_hooks(self, *handles: Any) -> None:
        """Keep the handles of hooks, to remove them."""
        self._undos += [handle.remove for handle in handles]

    def add_submodule(self, owner: nn.Module, name: str, module: nn.Module) -> None:
        """Make ``module`` a submodule of ``owner``."""
        owner.add_module(name, module)
        self._undos.append(partial(_remove_submodule, owner, name))

    def freeze(self, parameters: Iterable[nn.Parameter]) -> None:
        """Switch ``requires_grad`` off."""
        frozen = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(False)
        self._undos.append(partial(_set_requires_grad, frozen))

    def set_implementation(self, configs: Iterable[Any]) -> None:
        """Make peftkern the attention implementation of the configs that do not have it."""
        for config in configs:
            if not isinstance(config._attn_implementation, Implementation):
                config._attn_implementation_internal = Implementation(config._attn_implementation)
                self._undos.append(partial(_restore_implementation, config))

    def on_undo(self, function: Callable[[], Any]) -> None:
        """Call ``function`` when everything is undone."""
        self._undos.append(function)

    def undo(self) -> None:
        """Undo everything."""
        while self._undos:
            self._undos.pop()()


def _restore_attribute(owner: Any, name: str, value: Any, previous: tuple[Any, ...]) -> None:
    # Bound methods are made anew at each access, so they are compared by value.
    if name in owner.__dict__ and owner.__dict__[name] == value:
        del owner.__dict__[name]
        if previous:
            owner.__dict__[name] = previous[0]


def _remove_submodule(owner: nn.Module, name: str) -> None:
    owner._modules.pop(name, None)


def _set_requires_grad(parameters: list[torch.nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.requires_grad_(True)


def _restore_implementation(config: Any) -> None:
    if isinstance(config._attn_implementation, Implementation):
        config._attn_implementation_internal = config._attn_implementation.over
