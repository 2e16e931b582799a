# SPDX-License-Identifier: Apache-2.0
"""The guard and the bound find planted faults, in small kernels and in the project's own."""

from __future__ import annotations

import re

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from peftkern.backends.triton.kernels import backward, blocks, concat, forward, prefix_backward, prefix_forward
from peftkern.testing.bounds import check_backend
from peftkern.testing.cases import Shape, feature, tensors

from . import stand_ins
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
    (blocks, "seq_scores", "rows >= lower", "rows > lower", "plain"),
    (blocks, "keys_seen", "(offset + 1)", "offset", "plain"),
    (blocks, "keys_seen", "+ 1 - opts.window", "- opts.window", "window_after_prefix"),
    (blocks, "rows_that_see", "(opts.window - offset)", "opts.window + 1", "window_after_prefix"),
    (blocks, "prefix_scores", "length + positions - slots <", "positions - slots <", "window"),
    (blocks, "prefix_scores", "slots < length\n", "slots < length + 1\n", "plain"),
    (blocks, "tile_mask", "< length", "<= length", "plain"),
    (blocks, "row_range", "first_key - offset)", "last_key - offset + BLOCK_M)", "plain"),
    (blocks, "find_sequence", "<= index", "< index", "packed"),
    (blocks, "dropout_keep", "tl.interleave(w1, w3)", "tl.interleave(w3, w1)", "dropout"),
    (forward, "softmax_step", "acc * decay[:, None]", "acc", "plain"),
    (forward, "softmax_step", "scores * unit", "scores", "plain"),
    (forward, "attend", "denom * decay + ", "denom + ", "sinks"),
    (backward, "_dkv_step", "shift[None, :]", "0.0 * shift[None, :]", "plain"),
    (backward, "_sum_partials_kernel", "range(num_splits)", "range(1, num_splits)", "plain"),
    (backward, "_prefix_attention_bwd_prefix_kernel", "minimum(num_units,", "minimum(num_units - 1,", "plain"),
]

_FORWARD, _BACKWARD = "_prefix_merge_fwd_kernel", "_prefix_merge_bwd_kernel"
# the same for the kernels that stand beside another library's, with the backend that runs them
FAULTS_OF_PARTS = [
    (prefix_forward, "locate_tile", "% sizes.group", "% (sizes.group + 1)", "plain", "merge"),
    (prefix_forward, "locate_tile", "index % row_blocks", "index % (row_blocks + 1)", "plain", "merge"),
    (prefix_forward, "load_rows", "rows * x.stride_m", "rows", "lse_by_strides", "merge"),
    (prefix_forward, "load_rows", "x.stride_h", "x.stride_b", "plain", "merge"),
    (prefix_forward, _FORWARD, "row_blocks * sizes.group * sizes.batch, workers",
     "row_blocks * sizes.group * sizes.batch - 1, workers", "plain", "merge"),
    (prefix_forward, _FORWARD, "range(worker, row_blocks", "range(0, row_blocks", "plain", "merge"),
    (prefix_forward, _FORWARD, "sizes.prefix_len, head, opts, sizes, True",
     "sizes.prefix_len, head, opts, sizes, False", "plain", "merge"),
    (prefix_forward, _FORWARD, "denom = denom * decay + weight", "denom = denom + weight", "plain", "merge"),
    (prefix_forward, _FORWARD, "part.to(tl.float32) * weight[:, None]", "part.to(tl.float32)", "plain", "merge"),
    (prefix_forward, _FORWARD, "-float(\"inf\")) * part_lse_scale", "-float(\"inf\")) * LN2", "plain", "merge"),
    (prefix_forward, _FORWARD, "denom = denom * decay + tl.exp2(sink - pivot)", "denom = denom * decay", "sinks",
     "merge"),
    (prefix_forward, _FORWARD, "mask=inside)\n", "mask=inside & (rows > 0))\n", "plain", "merge"),
    (prefix_forward, _FORWARD, "tl.where(weight[:, None] > 0.0, part", "tl.where(weight[:, None] > -1.0, part",
     "nothing_visible", "merge"),
    (prefix_backward, _BACKWARD, "tl.minimum(tiles,", "tl.minimum(tiles - 1,", "plain", "merge"),
    (prefix_backward, _BACKWARD, "split * tiles_per_split, tl", "split * tiles_per_split + 1, tl", "plain",
     "merge"),
    (prefix_backward, _BACKWARD, "(dp + shift[:, None])", "dp", "plain", "merge"),
    (prefix_backward, _BACKWARD, "total += load_tile(part_ptr", "load_tile(part_ptr", "plain", "merge"),
    (prefix_backward, _BACKWARD, "dk * scale", "dk", "plain", "merge"),
    (prefix_backward, _BACKWARD, "dq_ptr, dq.stride_n", "dq_ptr, q.stride_n", "plain", "merge"),
    (backward, "_prefix_attention_bwd_dq_kernel", "acc += load_tile(part_ptr", "load_tile(part_ptr", "bank",
     "merge"),
    (concat, "_slot_half", "first - sizes.prefix_len + tl", "first - sizes.prefix_len + 1 + tl", "plain", "concat"),
    (concat, "_slot_half", "rows < sizes.kv_len", "rows < sizes.kv_len + 1", "plain", "concat"),
    (concat, "_slot_half", "tl.where(prefix < 0, 0, sizes.prefix_len)", "sizes.prefix_len - 1", "plain", "concat"),
    (concat, "_slot_bwd_kernel", "range(sizes.batch)", "range(1, sizes.batch)", "plain", "concat"),
    (concat, "_slot_bwd_kernel", "== prefix:", "<= prefix:", "bank", "concat"),
    (concat, "_slot_bwd_kernel", "tl.cast(prefix, tl.int64) * num_kv_heads + kv_head",
     "tl.cast(prefix, tl.int64) * num_kv_heads", "heads", "concat"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "name", "text", "slip", "feature_name"), FAULTS, ids=lambda x: str(x)[:24])
def test_a_slip_in_a_kernel_is_caught(module, name, text, slip, feature_name, monkeypatch):
    """Values out of bound, an address out of bounds, or a double store: any of them will do."""
    _plant(monkeypatch, getattr(module, name), text, slip)
    shape, options = feature(feature_name, Shape(B=2, Hq=2, Hkv=1, S=33, P=19, D=20))
    with guard(), pytest.raises((AssertionError, InterpreterError), match=re.compile("error|bounds|store|rows")):
        check_backend("triton", tensors(shape, torch.float32), options)


def _case(name: str) -> tuple[Shape, dict]:
    shape = Shape(B=2, Hq=2, Hkv=1, S=33, P=19, D=20)
    if name == "heads":
        return Shape(B=2, Hq=2, Hkv=2, S=33, P=19, D=20), {}
    if name == "nothing_visible":
        return shape, {"key_mask": torch.arange(shape.S)[None].expand(2, -1) > shape.S // 2}
    return feature(name, shape)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("module", "name", "text", "slip", "case", "backend"), FAULTS_OF_PARTS, ids=lambda x: str(x)[:24]
)
def test_a_slip_beside_another_librarys_kernel_is_caught(module, name, text, slip, case, backend, monkeypatch):
    # torch's CPU kernel has an lse whose rows lie apart
    stand_ins.install(monkeypatch, "cpu flash" if case == "lse_by_strides" else "efficient")
    shape, options = _case("plain" if case == "lse_by_strides" else case)
    _plant(monkeypatch, getattr(module, name), text, slip)
    with guard(), pytest.raises((AssertionError, InterpreterError), match=re.compile("error|bounds|store|rows|nan")):
        check_backend(backend, tensors(shape, torch.float32), options)


def _plant(monkeypatch, function, text: str, slip: str) -> None:
    """Replace the first ``text`` in a kernel's source."""
    rewritten = function.rewriter
    source = rewritten._prepare_source(_lines(function))
    assert text in source, f"{function.fn.__name__} has no {text!r}"
    monkeypatch.setattr(rewritten, "_prepare_source", lambda lines: source.replace(text, slip, 1))
    monkeypatch.setattr(function, "rewritten_fn", {})


def _lines(function) -> list[str]:
    import inspect

    lines = inspect.getsourcelines(function.fn)[0]
    function.rewriter.def_lineno = function.rewriter._find_def(lines)
    return lines
