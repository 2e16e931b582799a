# SPDX-License-Identifier: Apache-2.0
"""Faults planted in the emitted PTX, in a launch's arguments and in Triton's source: the emulator reports them all.

A dropped barrier or wait is reported by a check, or shows as a wrong result, or it orders nothing. Then it can be
dropped together with all others of its kind that order nothing, and no order of the warps has a race.
"""

from __future__ import annotations

import os
import re

import pytest
import torch

from peftkern import functional
from peftkern.testing.bounds import check_backend
from peftkern.testing.cases import Shape, feature, tensors

from ..triton_faults import FAULTS
from . import mutate
from .launch import Violation, emulated
from .mutate import Replay, line_of, planted, spans_of, superfluous, without

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton compiles nothing there")
# the first enters no loop over full blocks, and its only block of rows, as the second's last, has two rows: every
# mask hides something; the second makes several trips through each pipelined loop
SHAPES = [Shape(B=B, Hq=2, Hkv=1, S=S, P=P, D=64) for B, S, P in ((8, 2, 2), (1, 258, 66))]
KERNELS = ("fwd", "prepare", "dq", "dkv", "prefix", "sum_partials")


@pytest.fixture(scope="module")
def replays() -> dict[str, list[Replay]]:
    """Each kernel of a forward and a backward in bf16 for sm_80, at each shape."""
    found: dict[str, list[Replay]] = {}
    for shape in SHAPES:
        inputs = tensors(shape, torch.bfloat16, torch.float32)
        with emulated("sm_80", read_only=list(inputs.values())) as watch:
            leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
            out = functional.prefix_attention(**leaves, backend="triton")
            torch.autograd.grad(out.float().square().sum(), tuple(leaves.values()))
        for kernel in KERNELS:
            found.setdefault(kernel, []).append(Replay(watch.of(f"{kernel}_kernel")[0]))
    return found


@pytest.mark.parametrize("kernel", KERNELS)
def test_dropped_barriers_and_waits(kernel, replays):
    ptx, both = _same_ptx(replays[kernel])
    for pattern, what in ((mutate.BARRIER, "barriers"), (mutate.WAIT, "waits")):
        sites = spans_of(ptx, pattern)
        told = [s for s in sites if any(r.finding(without(ptx, [s])) for r in both)]
        spare = [s for s in sites if s not in told]
        lines = [line_of(ptx, s) for s in spare]
        print(f"{kernel}: {len(told)} of {len(sites)} {what} reported, lines {lines} order nothing")
        assert superfluous(both, spare) == spare, f"one of the {what} at lines {lines} is needed, but not reported"


def test_waits_of_the_pipelines_are_reported(replays):
    """The forward's loops copy blocks ahead, so the emulator must report missing waits and barriers."""
    replay = replays["fwd"][1]
    ptx = replay.launch.ptx
    findings = [replay.finding(without(ptx, [site])) for site in spans_of(ptx, mutate.WAIT)]
    assert any(f and "asynchronous copy, not waited for" in f for f in findings), findings
    findings = [replay.finding(without(ptx, [site])) for site in spans_of(ptx, mutate.BARRIER)]
    assert any(f and "race in shared memory" in f for f in findings), findings


@pytest.mark.parametrize(
    "kernel", [pytest.param(k, marks=pytest.mark.slow if k in ("fwd", "dq") else ()) for k in KERNELS]
)
def test_every_missing_mask_is_reported(kernel, replays):
    """The mask of each load, copy and store. A guard that only avoids storing the same value twice is not a mask."""
    ptx, both = _same_ptx(replays[kernel])
    sites = spans_of(ptx, mutate.GUARD) + spans_of(ptx, mutate.COPY_SIZE)
    assert sites
    for site in sites:
        mutant = without(ptx, [site])
        if not any(r.finding(mutant) for r in both):
            statement = ptx[site[0] : ptx.index(";", site[0])]
            assert "st.global" in statement, f"line {line_of(ptx, site)}: {statement}"
            assert _spares_duplicates(ptx, statement), f"line {line_of(ptx, site)}: {statement}"


def _same_ptx(replays: list[Replay]) -> tuple[str, list[Replay]]:
    """The PTX of the larger shape, and the replays that run it, the small one first: it tells most faults sooner."""
    ptx = replays[-1].launch.ptx
    return ptx, [r for r in replays if r.launch.ptx == ptx]


def _spares_duplicates(ptx: str, statement: str) -> bool:
    """The guard holds a comparison of bits of the thread's number with 0: one of several equal threads stores."""
    guard = re.match(r"@!?(%p\d+)", statement)[1]
    definition = re.search(rf"and\.pred\s+{guard}, (%p\d+), (%p\d+);|setp\.\S+\s+{guard},.*;", ptx)
    parts = [p for p in definition.groups() if p] or [guard]
    return any(re.search(rf"setp\.(eq|ne)\.b32\s+{p}, %r\d+, 0;", ptx) for p in parts)


# what a kernel is given but reads only with other options
IDLE = {"sizes.num_sequences", "sizes.search_steps"}


@pytest.mark.parametrize("sign", [1, -1])
def test_every_wrong_stride_and_size_is_reported(sign):
    """Each integer argument that its kernel reads, off by one, or by 16 if it must stay divisible by 16."""
    shape = Shape(B=3, Hq=4, Hkv=2, S=34, P=19, D=40, A=2)
    inputs = tensors(shape, torch.bfloat16)
    with emulated("sm_80", read_only=list(inputs.values()), processors=8) as watch:
        check_backend("triton", inputs, {"prefix_ids": torch.tensor([1, 0, 1])})
    changed, missed = 0, []
    for kernel in KERNELS:
        replay = Replay(watch.of(f"{kernel}_kernel")[0])
        for index, (name, value) in enumerate(replay.launch.arguments):
            if not isinstance(value, int) or name in IDLE or f"_param_{index}]" not in replay.launch.ptx:
                continue
            arguments = list(replay.launch.arguments)
            arguments[index] = (name, value + sign * (1 if value % 16 else 16))
            changed += 1
            if replay.finding(arguments=arguments) is None:
                missed.append(f"{kernel} {name}")
    assert not missed
    assert changed > 60


FAST = {"key-range-end", "prefix-window", "merge-decay"}


@pytest.mark.parametrize(
    "fault", [pytest.param(f, id=f.id, marks=() if f.id in FAST else pytest.mark.slow) for f in FAULTS]
)
def test_a_slip_in_the_source_is_reported(fault):
    """The faults that the interpreter's guard must catch, in compiled code."""
    shape, options = feature(fault.case, Shape(B=2, Hq=2, Hkv=1, S=65, P=65, D=20))
    with planted(fault), emulated("sm_80"), pytest.raises((AssertionError, Violation)):
        check_backend("triton", tensors(shape, torch.float16), options)  # a tighter bound than bf16's


def test_a_violation_names_the_line_of_triton():
    inputs = tensors(SHAPES[0], torch.bfloat16)

    def drop_guards(kernel, ptx):
        return without(ptx, spans_of(ptx, mutate.GUARD))

    with emulated("sm_80", rewrite=drop_guards), pytest.raises(Violation, match=r"out of bounds.*blocks\.py:\d+\)"):
        functional.prefix_attention(**inputs, backend="triton")
