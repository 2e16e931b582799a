# SPDX-License-Identifier: Apache-2.0
"""What torch launches beside torch's attention kernel and our prefix kernels: nothing forward, little backward.

Each launch costs some microseconds per layer and direction. Torch's operators are counted by a dispatch mode, except
those of the stand-ins and of the interpreted kernels, and except operators that only make views or allocate.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from peftkern.arguments import AttentionArgs, constant
from peftkern.backends import torch_attention
from peftkern.backends.registry import plan_named
from peftkern.backends.triton import attention, backend, launch, prefix_kernels
from peftkern.testing.cases import Shape, feature, tensors
from peftkern.validation import normalize_attention

from . import stand_ins

pytestmark = pytest.mark.interpreter

#: Operators that launch nothing.
_FREE = (
    "empty", "new_empty", "view", "transpose", "slice", "select", "as_strided", "unsqueeze", "squeeze", "detach",
    "expand", "alias", "permute", "unbind", "_unsafe_view", "unflatten", "prefix_attention", "is_same_size",
)  # fmt: skip


DEFAULTS = {"causal": True, "prefix_in_window": True, "dropout_p": 0.0}


class _Launches(TorchDispatchMode):
    """Names the operators that would launch a kernel on a GPU."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if not name.startswith(_FREE):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def _uncounted(function):
    @functools.wraps(function)
    def run(*args, **kwargs):
        with _disable_current_modes():
            return function(*args, **kwargs)

    return run


def _install(monkeypatch, row: str) -> None:
    """The row alone on its stand-in, whose operators and those of the interpreter are not counted."""
    stand_ins.install(monkeypatch, row)
    ops = {name: _uncounted(op) for name, op in vars(stand_ins.OPS).items()}
    monkeypatch.setattr(torch_attention, "_aten", type(stand_ins.OPS)(**ops))
    for module in (launch, attention, backend, prefix_kernels):
        if hasattr(module, "launch_kernel"):
            monkeypatch.setattr(module, "launch_kernel", _uncounted(launch.launch_kernel))


def _count(plan: str, shape: Shape, options: dict) -> tuple[list[str], list[str]]:
    """The operators of a layer behind another one, forward and backward, with an fp32 prefix as PEFT keeps it."""
    inputs = tensors(shape, torch.float16, torch.float32)
    options = {name: constant(x) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    given = AttentionArgs(**dict.fromkeys(AttentionArgs._fields) | inputs | DEFAULTS | options)
    args = normalize_attention(given, None)
    dout = torch.ones(shape.B, shape.S, shape.Hq, shape.D, dtype=torch.float16).transpose(1, 2)
    needs = [x is not None for x in args.differentiable]

    def run() -> tuple[list[str], list[str]]:
        with _Launches() as forward:
            out, lse = plan_named(plan).prefix_attention(args)
        with _Launches() as backward:
            plan_named(plan).prefix_attention_backward(dout, None, out, lse, args, needs)
        return forward.names, backward.names

    run()  # tensors that follow from the index tensors are computed once
    return run()


@pytest.mark.parametrize(
    ("backend_name", "row", "name"),
    [
        *(("merge", "flash", name) for name in ("plain", "packed", "packed_prompt")),
        *(("concat", "flash", name) for name in ("plain", "packed", "packed_prompt")),
        ("merge", "cudnn", "plain"),
    ],
)
def test_torch_launches_beside_the_kernels(backend_name, row, name, monkeypatch):
    """Forward none, backward at most one, per layer."""
    _install(monkeypatch, row)
    shape, options = feature(name, Shape(B=2, Hq=4, Hkv=2, S=16, P=8, D=16))
    forward, backward = _count(f"{backend_name}/{row}/triton", shape, options)
    assert not forward
    assert len(backward) <= 1, backward
