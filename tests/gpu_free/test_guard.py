# SPDX-License-Identifier: Apache-2.0
"""The guard and the bound find planted faults, in small kernels and in the project's own."""

from __future__ import annotations

import re

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from peftkern.testing.bounds import check_backend
from peftkern.testing.cases import Shape, feature, tensors

from . import stand_ins
from .guard import guard
from .triton_faults import (
    FAULTS,
    FAULTS_BESIDE_OTHERS,
    FAULTS_OF_PACKED,
    Fault,
    function_of,
    functions,
    marked_lines,
    plant,
    planted_in,
)

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


def test_every_marked_line_has_a_fault():
    marked = [name for _, source in functions() for name in marked_lines(source)]
    assert len(marked) == len(set(marked)), "an id marks several lines"
    assert set(marked) == {fault.id for fault in (*FAULTS, *FAULTS_BESIDE_OTHERS, *FAULTS_OF_PACKED)}


def test_a_fault_without_its_line_is_named():
    with pytest.raises(AssertionError, match="0 lines of the kernels are marked '# FAULT: nowhere'"):
        function_of(Fault("nowhere", "a", "b", "plain"))
    source = "x = a  # FAULT: one, two\n# FAULT: three\ny = a + a\n"
    assert planted_in(source, Fault("two", "a", "b", "plain")) == source.replace("x = a", "x = b")
    assert marked_lines(source) == {"one": 0, "two": 0, "three": 2}
    with pytest.raises(AssertionError, match="'# FAULT: three' holds 'a' 2 times, not once: y = a"):
        planted_in(source, Fault("three", "a", "b", "plain"))
    with pytest.raises(AssertionError, match="two lines are marked '# FAULT: one'"):
        marked_lines(source + source)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_slip_in_a_kernel_is_caught(fault, monkeypatch):
    """A value out of bounds, an address out of bounds, or a double store: any of them will do."""
    plant(monkeypatch, fault)
    shape, options = feature(fault.case, Shape(B=2, Hq=2, Hkv=1, S=33, P=19, D=20))
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
@pytest.mark.parametrize("fault", FAULTS_BESIDE_OTHERS, ids=str)
def test_a_slip_beside_another_librarys_kernel_is_caught(fault, monkeypatch):
    # torch's CPU kernel has an lse whose rows lie apart
    stand_ins.install(monkeypatch, "cpu flash" if fault.case == "lse_by_strides" else "efficient")
    shape, options = _case("plain" if fault.case == "lse_by_strides" else fault.case)
    plant(monkeypatch, fault)
    with guard(), pytest.raises((AssertionError, InterpreterError), match=re.compile("error|bounds|store|rows|nan")):
        check_backend(fault.backend, tensors(shape, torch.float32), options)
