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

import peftkern
from peftkern.arguments import AttentionArgs, constant
from peftkern.backends import dense_mask, torch_attention
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


@pytest.mark.parametrize("backend", ["merge", "concat"])
@pytest.mark.parametrize("prompt", [0, 20], ids=["packed", "prompt"])
def test_variable_length_kernels_launch_few_blocks_that_have_no_rows(backend, prompt, monkeypatch):
    """17 sequences. Without ``max_seqlen`` each of them costs as many blocks as the whole stream has."""
    stand_ins.install(monkeypatch, "flash")
    lengths = [prompt, *[256] * 16] if prompt else [256] * 17
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    inputs = tensors(
        Shape(B=1, Hq=1, Hkv=1, S=int(ends[-1]), P=prompt or 4, D=8, A=1 if prompt else None), torch.half
    )
    options = (
        {"prefix_ids": torch.tensor([-1, *[0] * 16], dtype=torch.int32), "prefix_start": prompt} if prompt else {}
    )
    launched = []
    for hint in ({}, {"max_seqlen": 256}):
        stand_ins.blocks.update(launched=0, needed=0)
        peftkern.prefix_attention(**inputs, cu_seqlens=ends, **options, **hint, backend=backend)
        launched.append(stand_ins.blocks["launched"] / stand_ins.blocks["needed"])
    assert launched[0] > 15
    assert launched[1] <= 1.1


@pytest.mark.parametrize("backend", ["merge", "concat"])
def test_layers_that_pass_the_same_mask_share_its_dense_form(backend, monkeypatch):
    """Two layers, forward and backward, one mask: if the caller marks it as constant."""
    stand_ins.install(monkeypatch, "efficient")
    built, build = [], dense_mask.additive_mask
    monkeypatch.setattr(dense_mask, "additive_mask", lambda *args: built.append(1) or build(*args))
    inputs = {n: x.requires_grad_() for n, x in tensors(Shape(S=5, P=3), torch.float32).items()}
    for mark, count in ((constant, 1), (lambda x: x, 4)):
        mask = mark(torch.ones(2, 5, dtype=torch.bool))
        built.clear()
        for _ in range(2):
            peftkern.prefix_attention(**inputs, key_mask=mask, backend=backend).sum().backward()
        assert len(built) == count
