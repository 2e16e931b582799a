# SPDX-License-Identifier: Apache-2.0
"""Checks of the registered ops' arguments, which anyone may pass through ``torch.ops.peftkern``.

A kernel computes addresses from sizes, strides and dtypes, so wrong ones make it read and write outside of the
tensors. The checks depend only on these and on the numbers. Each combination is therefore checked once, and calls
like one seen before cost a lookup.

The values that addresses depend on (offsets, indices and lengths) are checked by :mod:`.ops`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import AttentionArgs, AttentionGradients, TensorInfo, attention_call, embedding_call, lse_dtype
from .backends import registry
from .validation import (
    argument_error,
    check_attention,
    check_device,
    check_dtype,
    check_embedding_tensors,
    check_shape,
)

__all__ = ["ForwardResults", "check_attention_op", "check_embedding_op"]

_NUM_TENSORS = AttentionArgs._fields.index("scale")
_NUM_GRADIENTS = len(AttentionGradients._fields)


class ForwardResults(NamedTuple):
    """The arguments that the attention's backward has besides those of the forward."""

    dout: Tensor
    dlse: Tensor | None
    out: Tensor
    lse: Tensor


def check_attention_op(
    args: AttentionArgs, plan: str | None, results: ForwardResults | None = None, needs: Sequence[bool] | None = None
) -> None:
    """Raise unless the arguments of ``prefix_attention``, or with ``results`` those of its backward, are valid.

    Without a ``plan``, only the tensors and numbers are checked.

    Raises:
        ValueError: naming the argument, what was expected and what was passed.
        BackendUnavailable: if the plan is for other calls.
    """
    tensors = args.tensors if results is None else args.tensors + results
    if plan is None:
        _check_attention.__wrapped__(_described(tensors), args[_NUM_TENSORS:], plan, needs)
    else:
        flags = None if needs is None else tuple(needs)
        _check_attention(_described(tensors), args[_NUM_TENSORS:], plan, flags)


def check_embedding_op(
    input_ids: Tensor,
    weight: Tensor,
    prompt: Tensor,
    prompt_ids: Tensor | None,
    plan: str | None,
    dout: Tensor | None = None,
    needs: Sequence[bool] = (),
) -> None:
    """Raise unless the arguments of ``soft_prompt_embedding``, or with ``dout`` those of its backward, are valid.

    Without a ``plan``, only the tensors and numbers are checked.

    Raises:
        ValueError: naming the argument, what was expected and what was passed.
        BackendUnavailable: if the plan is for other calls.
    """
    tensors = _described((input_ids, weight, prompt, prompt_ids, dout))
    if plan is None:
        _check_embedding.__wrapped__(tensors, plan, needs)
    else:
        _check_embedding(tensors, plan, tuple(needs))


def _described(tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """What the checks read of each tensor: five items, or None. Flat, since that is hashed fastest."""
    items: list[Any] = []
    for x in tensors:
        if x is None:
            items.append(None)
        else:
            items += (x.shape, x.stride(), x.dtype, x.device, x.layout)
    return tuple(items)


def _infos(names: Sequence[str], described: tuple[Any, ...]) -> list[Any]:
    """The :class:`.TensorInfo` of each tensor that :func:`_described` describes, or None.

    Raises:
        ValueError: for a tensor that is not dense, which has no strides.
    """
    infos: list[Any] = []
    items = iter(described)
    for name, shape in zip(names, items, strict=False):
        if shape is None:
            infos.append(None)
            continue
        *info, layout = next(items), next(items), next(items), next(items)
        if layout is not torch.strided:
            raise argument_error(name, "a dense tensor", layout)
        infos.append(TensorInfo(shape, *info))
    return infos


@registry.forgettable
@functools.lru_cache(maxsize=4096)
def _check_attention(
    described: tuple[Any, ...], numbers: tuple[Any, ...], plan: str | None, needs: tuple[bool, ...] | None
) -> None:
    infos = _infos((*AttentionArgs._fields[:_NUM_TENSORS], *ForwardResults._fields), described)
    args: Any = AttentionArgs(*infos[:_NUM_TENSORS], *numbers)
    # The op has a number where the function has None.
    check_attention(args if args.softcap else args._replace(softcap=None))
    _check_normal(args)
    if needs is not None:
        _check_results(args, ForwardResults(*infos[_NUM_TENSORS:]), needs)
    if plan is not None:
        registry.check_plan(plan, attention_call(args, needs is not None))


def _check_normal(args: Any) -> None:
    """Raise ValueError unless the arguments are as :func:`.validation.normalize_attention` returns them."""
    for name, x in zip(AttentionArgs._fields, args[:5], strict=False):
        _check_unit_stride(name, x)
    fp = lse_dtype(args.q.dtype)
    for name in ("sinks", "prefix_bias", "gate"):
        if (x := getattr(args, name)) is not None:
            check_dtype(name, x, fp)
    if args.bias is not None:
        check_dtype("bias", args.bias, args.q.dtype, fp)
    seed = args.dropout_seed
    if (seed is not None) != (args.dropout_p > 0.0):
        expected = "a 0-dim int64 tensor" if seed is None else "None"
        got = None if seed is None else "a tensor"
        raise argument_error("dropout_seed", f"{expected}, since dropout_p is {args.dropout_p}", got)
    if seed is not None:
        check_dtype("dropout_seed", seed, torch.int64)
        check_shape("dropout_seed", seed)
        check_device("dropout_seed", seed, "q", args.q.device)


def _check_results(args: Any, results: Any, needs: tuple[bool, ...]) -> None:
    batch, num_heads, q_len, _ = args.q.shape
    fp, rows = lse_dtype(args.q.dtype), (batch, num_heads, q_len)
    for name in ("dout", "out"):
        x = getattr(results, name)
        check_shape(name, x, *rows, args.v.shape[3])
        check_dtype(name, x, args.q.dtype)
        _check_unit_stride(name, x)
    for name in ("dlse", "lse"):
        x = getattr(results, name)
        if x is not None:
            check_shape(name, x, *rows)
            check_dtype(name, x, fp)
    for name, x in zip(ForwardResults._fields, results, strict=True):
        check_device(name, x, "q", args.q.device)
    _check_needs(needs, _NUM_GRADIENTS)


@registry.forgettable
@functools.lru_cache(maxsize=4096)
def _check_embedding(described: tuple[Any, ...], plan: str | None, needs: tuple[bool, ...]) -> None:
    input_ids, weight, prompt, prompt_ids, dout = _infos(
        ("input_ids", "weight", "prompt", "prompt_ids", "dout"), described
    )
    check_embedding_tensors(input_ids, weight, prompt, prompt_ids)
    if dout is not None:
        check_shape("dout", dout, input_ids.shape[0], prompt.shape[-2] + input_ids.shape[1], weight.shape[1])
        check_dtype("dout", dout, weight.dtype)
        _check_unit_stride("dout", dout)
        check_device("dout", dout, "weight", weight.device)
        _check_needs(needs, 2)
    if plan is not None:
        registry.check_plan(plan, embedding_call(input_ids, weight, prompt, prompt_ids, dout is not None))


def _check_unit_stride(name: str, x: Any) -> None:
    if x.strides[-1] != 1 and x.shape[-1] > 1 and 0 not in x.shape:
        raise argument_error(name, "a tensor with stride 1 along its last dim", f"strides {list(x.strides)}")


def _check_needs(needs: tuple[bool, ...], expected: int) -> None:
    if len(needs) != expected:
        raise argument_error("needs", f"{expected} flags", len(needs))
