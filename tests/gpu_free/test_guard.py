# SPDX-License-Identifier: Apache-2.0
"""The guard and the bound find planted faults, in small kernels and in the project's own."""

from __future__ import annotations

import re

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from peftkern.backends.triton import backward, blocks, forward

from ..bounds import check_backend
from ..cases import Shape, feature, tensors
from .guard import guard

pytestmark = pytest.mark.interpreter


@triton.jit
def _copy_kernel(source, target, size, STEP: tl.constexpr, MASKED: tl.constexpr):
    offsets = tl.program_id(0) * STEP + tl.arange(0, 16)
    values = tl.load(source + offsets, mask=(offsets < size) | (MASKED == 0), other=0.0)
    tl.store(target + offsets, values, mask=offsets < size)


@triton.jit
def _bf16_kernel(a, b, total, product):
    index = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    x, y = tl.load(a + index), tl.load(b + index)
    tl.store(total + index, x + y)
    tl.store(product + index, tl.dot(x, y))


def test_a_read_past_the_end_is_named():
    source = torch.zeros(100)[:20]
    with guard(), pytest.raises(InterpreterError, match=r"load out of bounds in program .*source .80 bytes"):
        _copy_kernel[(2,)](source, torch.empty(20), 20, STEP=16, MASKED=False)


def test_two_programs_storing_to_one_address_are_named():
    with guard(), pytest.raises(InterpreterError, match=r"programs \(0, 0, 0\) and \(1, 0, 0\) store to one address"):
        _copy_kernel[(2,)](torch.zeros(20), torch.empty(20), 20, STEP=8, MASKED=True)


def test_bytes_are_counted():
    with guard() as watch:
        _copy_kernel[(2,)](torch.zeros(20), torch.empty(20), 20, STEP=16, MASKED=True)
    assert watch.loads == watch.stores == {"_copy_kernel": 80}


def test_bf16_is_computed_as_a_gpu_does():
    a, b = torch.randn(2, 16, 16).bfloat16()
    total, product = torch.empty(16, 16, dtype=torch.bfloat16), torch.empty(16, 16)
    with guard():
        _bf16_kernel[(1,)](a, b, total, product)
    assert torch.equal(total, a + b)
    torch.testing.assert_close(product, a.float() @ b.float(), rtol=1e-6, atol=1e-6)


# (module, function, text, what a slip would make of it, feature that shows it)
FAULTS = [
    (blocks, "key_range", "last_row + offset + 1)", "last_row + offset)", "plain"),
    (blocks, "key_range", "first_row + offset + 1)", "first_row + offset + BLOCK_N)", "plain"),
    (blocks, "seq_scores", "(distance >= 0)", "(distance > 0)", "plain"),
    (blocks, "seq_scores", "distance < opts.window", "distance <= opts.window", "window_after_prefix"),
    (blocks, "prefix_scores", "length + positions - slots <", "positions - slots <", "window"),
    (blocks, "prefix_scores", "(slots < length) & sees", "slots < length + 1", "plain"),
    (blocks, "tile_mask", "< length", "<= length", "plain"),
    (blocks, "row_range", "first_key - offset)", "last_key - offset + BLOCK_M)", "plain"),
    (blocks, "find_sequence", "<= index", "< index", "packed"),
    (blocks, "dropout_keep", "tl.interleave(w1, w3)", "tl.interleave(w3, w1)", "dropout"),
    (forward, "_softmax_step", "acc * decay[:, None]", "acc", "plain"),
    (forward, "attend", "denom * decay + ", "denom + ", "sinks"),
    (backward, "_dkv_step", "shift[None, :]", "0.0 * shift[None, :]", "plain"),
    (backward, "_sum_partials_kernel", "range(num_splits)", "range(1, num_splits)", "plain"),
    (backward, "_prefix_attention_bwd_prefix_kernel", "minimum(num_units,", "minimum(num_units - 1,", "plain"),
]


@pytest.mark.parametrize(("module", "name", "text", "slip", "feature_name"), FAULTS, ids=lambda x: str(x)[:24])
def test_a_slip_in_a_kernel_is_caught(module, name, text, slip, feature_name, monkeypatch):
    """Values out of bound, an address out of bounds, or a double store: any of them will do."""
    function = getattr(module, name)
    rewritten = function.rewriter
    source = rewritten._prepare_source(_lines(function))
    assert text in source, f"{name} has no {text!r}"
    monkeypatch.setattr(rewritten, "_prepare_source", lambda lines: source.replace(text, slip, 1))
    monkeypatch.setattr(function, "rewritten_fn", {})
    shape, options = feature(feature_name, Shape(B=2, Hq=2, Hkv=1, S=33, P=19, D=20))
    with guard(), pytest.raises((AssertionError, InterpreterError), match=re.compile("error|bounds|store|rows")):
        check_backend("triton", tensors(shape, torch.float32), options)


def _lines(function) -> list[str]:
    import inspect

    lines = inspect.getsourcelines(function.fn)[0]
    function.rewriter.def_lineno = function.rewriter._find_def(lines)
    return lines
