# SPDX-License-Identifier: Apache-2.0
"""``peftkern.explain``: why each backend can or cannot run a call, or how a patched model runs its batches."""

from __future__ import annotations

import inspect
from typing import Any, overload

import torch
from torch import Tensor

from . import functional
from .arguments import AttentionArgs, Call, attention_call
from .backends import registry
from .backends.registry import Explanation
from .validation import autocast_attention, check_attention, check_dropout_seed, check_return_lse, check_tensors

__all__ = ["explain"]


@overload
def explain(model: torch.nn.Module, /) -> str: ...
@overload
def explain(*tensors: Tensor | Call, **options: Any) -> Explanation: ...
def explain(*tensors: Any, **options: Any) -> Explanation | str:
    """Explain which backend runs a call and why the others cannot: ``explain(q, k, v, prefix_k, prefix_v)``.

    Args:
        tensors: the positional arguments of :func:`peftkern.prefix_attention`, or one
            :class:`~peftkern.arguments.Call`, or a patched model.
        options: the keyword arguments of :func:`peftkern.prefix_attention`.

    Returns:
        An :class:`~peftkern.backends.registry.Explanation`, which prints as a table of backends. For a patched model,
        a line that says how its batches run, and if they do not run fast, why.

    Raises:
        ValueError: if the arguments are invalid or the model is not patched.

    >>> import torch, peftkern
    >>> q, prefix = torch.randn(1, 2, 3, 8, dtype=torch.float64), torch.randn(2, 4, 8, dtype=torch.float64)
    >>> peftkern.explain(q, q, q, prefix, prefix).chosen
    'reference'
    """
    if len(tensors) == 1 and isinstance(tensors[0], torch.nn.Module):
        from .huggingface.patch import explain as explain_patch

        _check_options(options, "a model")
        return explain_patch(tensors[0])
    if len(tensors) == 1 and isinstance(tensors[0], Call):
        _check_options(options, "a Call", "backend")
        return registry.explain(tensors[0], options.get("backend", "auto"))
    try:
        given = inspect.signature(functional.prefix_attention).bind(*tensors, **options)
    except TypeError as error:
        raise ValueError(f"explain: expected the arguments of prefix_attention, {error}") from None
    given.apply_defaults()
    inputs = AttentionArgs(**{name: given.arguments[name] for name in AttentionArgs._fields} | {"dropout_seed": None})
    check_tensors(inputs)
    check_dropout_seed(given.arguments["dropout_seed"])
    check_return_lse(given.arguments["return_lse"])
    inputs = autocast_attention(inputs)
    check_attention(inputs)
    call = attention_call(inputs, functional.needs_backward(inputs))
    return registry.explain(call, given.arguments["backend"])


def _check_options(options: dict[str, Any], what: str, *allowed: str) -> None:
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise ValueError(f"explain: expected {' or '.join(allowed) or 'no options'} with {what}, got {unknown}")
