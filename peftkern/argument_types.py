# SPDX-License-Identifier: Apache-2.0
"""One rule for arguments of a wrong type: an error that names the argument, what was expected and what was passed.

:func:`checks_arguments` reads the annotations of a function once and checks each call's arguments against them before
the function runs. Values and the items of sequences are checked by the function itself, except for values that no
argument of the type can have: more than 64 bits for an int, a device that torch does not know.

Functions that are called for each layer (:func:`peftkern.prefix_attention`) check their arguments themselves.
"""

from __future__ import annotations

import functools
import inspect
import numbers
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar, Union

import torch
from torch import Tensor, nn

__all__ = [
    "EMBEDDING", "MODEL", "MODEL_OR_CONFIG", "NAMES", "PEFT_MODEL", "TOKENIZER", "Kind",
    "checks_arguments", "shown",
]  # fmt: skip

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Kind(NamedTuple):
    """What an argument may be.

    Attributes:
        fits: whether a value is of this kind.
        expected: the kind in an error message.
    """

    fits: Callable[[Any], bool]
    expected: str


def _is_int(x: Any) -> bool:
    if isinstance(x, torch.SymInt):
        return True
    return isinstance(x, numbers.Integral) and not isinstance(x, bool) and -(2**63) <= int(x) < 2**63


def _is_number(x: Any) -> bool:
    if isinstance(x, torch.SymInt | torch.SymFloat):
        return True
    return isinstance(x, numbers.Real) and not isinstance(x, bool)


def _is_device(x: Any) -> bool:
    try:
        torch.device(x)
    except (RuntimeError, TypeError, ValueError):
        return False
    return not isinstance(x, bool)


_KINDS: dict[Any, Kind] = {
    type(None): Kind(lambda x: x is None, "None"),
    bool: Kind(lambda x: isinstance(x, bool), "True or False"),
    int: Kind(_is_int, "an int of at most 64 bits"),
    float: Kind(_is_number, "a number"),
    str: Kind(lambda x: isinstance(x, str), "a string"),
    Tensor: Kind(lambda x: isinstance(x, Tensor), "a tensor"),
    torch.dtype: Kind(lambda x: isinstance(x, torch.dtype), "a torch.dtype"),
    torch.device: Kind(_is_device, "a device"),
    os.PathLike: Kind(lambda x: isinstance(x, os.PathLike), "a path"),
}

#: For arguments that are annotated as ``Any``, because the package does not import what they are.
MODEL = Kind(lambda x: isinstance(x, nn.Module), "a Hugging Face model")
PEFT_MODEL = Kind(lambda x: isinstance(x, nn.Module) and hasattr(x, "peft_config"), "a PeftModel")
TOKENIZER = Kind(lambda x: x is None or callable(x), "a tokenizer, or None for the ids of tokens")


def _has_config(x: Any) -> bool:
    return x is None or hasattr(getattr(x, "config", x), "get_text_config")


def _embeds(x: Any) -> bool:
    return x.dim() == 2 if isinstance(x, Tensor) else _has_config(x) or hasattr(x, "get_input_embeddings")


NAMES = Kind(lambda x: isinstance(x, Sequence | Mapping), "names, or a mapping")
MODEL_OR_CONFIG = Kind(_has_config, "a Hugging Face model or config, or None")
EMBEDDING = Kind(_embeds, "a Hugging Face model or config, a weight [V, E] or None")


def checks_arguments(**kinds: Kind | None) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Decorate a function, so that arguments of another type than annotated raise ValueError.

    Args:
        kinds: of arguments whose annotation is too general; None for those that the function checks itself.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        rules: dict[str, Kind | None] = {}
        names = list(inspect.signature(function).parameters)

        @functools.wraps(function)
        def with_checks(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            if not torch.compiler.is_compiling():
                if not rules:  # not before the first call, when all names in the annotations exist
                    rules.update(_rules(function, kinds))
                for name, x in (*zip(names, args, strict=False), *kwargs.items()):
                    kind = rules.get(name)
                    if kind is not None and not kind.fits(x):
                        raise ValueError(f"{name}: expected {kind.expected}, got {shown(x)}")
            return function(*args, **kwargs)

        return with_checks

    return decorate


def shown(x: object) -> str:
    """A value in an error message: numbers and strings as they are, of other objects the type."""
    if x is None or isinstance(x, bool | int | float | str):
        text = repr(x)
        return text if len(text) <= 80 else f"{text[:77]}..."
    return type(x).__name__


def _rules(function: Callable[..., Any], kinds: Mapping[str, Kind | None]) -> dict[str, Kind | None]:
    """The kinds of a function's arguments by name; None for one that may be anything."""
    rules: dict[str, Kind | None] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        annotation = Any if parameter.annotation is parameter.empty else parameter.annotation
        if isinstance(annotation, str):
            try:
                annotation = eval(annotation, getattr(inspect.unwrap(function), "__globals__", {}))
            except NameError:  # imported for type checkers only
                annotation = Any
        rules[name] = kinds[name] if name in kinds else _kind_of(annotation)
    return rules


def _kind_of(annotation: Any) -> Kind | None:
    """The kind of an annotation; None if it allows anything."""
    if annotation in _KINDS:
        return _KINDS[annotation]
    if isinstance(annotation, TypeVar):
        return _kind_of(annotation.__bound__)
    origin, items = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return Kind(lambda x: any(x == item and type(x) is type(item) for item in items), _either(map(repr, items)))
    if origin in (Union, types.UnionType):
        return _union(items)
    if origin is os.PathLike:
        return _KINDS[os.PathLike]
    if annotation is Sequence or origin is Sequence:
        return Kind(lambda x: isinstance(x, Sequence | torch.Size) and not isinstance(x, str | bytes), "a sequence")
    if annotation is Mapping or origin is Mapping:
        return Kind(lambda x: isinstance(x, Mapping), "a mapping")
    if origin is not None:
        annotation = origin
    if not isinstance(annotation, type) or annotation in (Any, object):
        return None
    name = annotation.__name__
    return Kind(lambda x: isinstance(x, annotation), f"{'an' if name[0] in 'AEIOU' else 'a'} {name}")


def _union(items: Sequence[Any]) -> Kind | None:
    found = [_kind_of(item) for item in items]
    kinds = [kind for kind in found if kind is not None]
    if len(kinds) < len(found):
        return None
    if torch.device in items:  # by its name too, if torch knows it
        kinds = [kind for kind, item in zip(kinds, items, strict=True) if item is not str]
    return Kind(lambda x: any(kind.fits(x) for kind in kinds), _either(kind.expected for kind in kinds))


def _either(names: Any) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else str(last)
