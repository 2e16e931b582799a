# SPDX-License-Identifier: Apache-2.0
"""Every check fires on a kernel with that one fault, names where, and stays quiet where the fault is mended."""

from __future__ import annotations

import re

import numpy as np
import pytest

from .machine import Violation
from .snippets import run

OUT = np.zeros(256, np.uint32)
# each warp stores its thread numbers, then reads those of the next warp
EXCHANGE = """
    shl.b32 %a, %tid, 2;
    st.shared.b32 [%a], %tid;
    {barrier}
    add.u32 %b, %a, 128;
    and.b32 %b, %b, 255;
    ld.shared.b32 %v, [%b];
    mad.wide.u32 %g, %tid, 4, %x0;
    st.global.b32 [%g], %v;"""
COPY = """
    shl.b32 %a, %tid, 4;
    mad.wide.u32 %g, %tid, 16, %x0;
    cp.async.cg.shared.global [%a], [%g], 16;
    cp.async.commit_group;
    {wait}
    ld.shared.b32 %v, [%a];"""


def test_a_missing_barrier_is_a_race_whatever_the_order():
    run(EXCHANGE.format(barrier="bar.sync 0;"), OUT, warps=2, shared=256)
    np.testing.assert_array_equal(OUT[:64], np.roll(np.arange(64), -32))
    found = set()
    for seed in range(8):
        with pytest.raises(Violation, match=r"shared memory at 0x\w+.*block 0,0,0 warp \d line \d+\]: ") as caught:
            run(EXCHANGE.format(barrier=""), OUT, warps=2, shared=256, seed=seed)
        found.add(re.search(r"race|uninitialised", str(caught.value))[0])
    assert "uninitialised" in found, "the first warp reads what the second has not written yet"


def test_a_second_write_without_a_barrier_is_a_race():
    overwrite = EXCHANGE.format(barrier="bar.sync 0;") + "{last} st.shared.b32 [%a], %v;"
    run(overwrite.replace("{last}", "bar.sync 0;"), OUT, warps=2, shared=256)
    with pytest.raises(Violation, match=r"(write after a read|read after a write) by warp [01] without a barrier"):
        run(overwrite.replace("{last}", ""), OUT, warps=2, shared=256)


def test_warps_may_store_the_same_value_but_not_different_ones():
    run("st.shared.b32 [0], 7;", OUT, warps=2, shared=16)
    with pytest.raises(Violation, match="write after a write by warp"):
        run("st.shared.b32 [0], %tid;", OUT, warps=2, shared=16)


def test_named_barriers_order_those_who_meet_there():
    """Four warps in pairs, each pair at a barrier of its own; reading across the pairs is a race."""
    own_pair = EXCHANGE.format(
        barrier="setp.lt.u32 %p, %tid, 64; @%p bra L; bar.sync 2, 64; bra M;\nL: bar.sync 1, 64;\nM:"
    )
    run(own_pair.replace("add.u32 %b, %a, 128;\n    and.b32 %b, %b, 255;", "xor.b32 %b, %a, 128;"), OUT, warps=4,
        shared=512)  # fmt: skip
    np.testing.assert_array_equal(OUT[:128], np.arange(128) ^ 32)
    with pytest.raises(Violation, match=r"race|uninitialised"):
        run(own_pair.replace("255", "511"), OUT, warps=4, shared=512)


def test_copies_must_be_waited_for():
    source = np.arange(128, dtype=np.uint32)
    run(COPY.format(wait="cp.async.wait_group 0;"), source, shared=512)
    for wait in ("", "cp.async.wait_group 1;"):
        with pytest.raises(Violation, match="asynchronous copy, not waited for"):
            run(COPY.format(wait=wait), source, shared=512)


def test_a_copy_in_flight_may_not_be_overwritten():
    with pytest.raises(Violation, match="write to shared memory at 0x0 that an asynchronous copy"):
        run(COPY.format(wait="st.shared.b32 [%a], %tid;"), np.arange(128, dtype=np.uint32), shared=512)


def test_a_wait_is_the_issuing_warps_own():
    """The other warp needs a barrier after the wait."""
    source, read_other = np.arange(256, dtype=np.uint32), "xor.b32 %a, %a, 512;"
    run(COPY.format(wait=f"cp.async.wait_group 0; bar.sync 0; {read_other}"), source, warps=2, shared=1024)
    with pytest.raises(Violation, match=r"race|not waited|uninitialised"):
        run(COPY.format(wait=f"bar.sync 0; cp.async.wait_group 0; {read_other}"), source, warps=2, shared=1024)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.shared.b32 %v, [64];", "read of uninitialised shared memory at 0x40"),
        ("st.shared.b32 [122], %tid;", "misaligned shared memory write of 4 bytes at 0x7a"),
        ("st.shared.b32 [128], %tid;", "shared memory write out of bounds: 4 bytes at 0x80 of 0x80"),
        (
            "ld.global.b32 %v, [%x0+1024];",
            r"global load out of bounds .* 1024 bytes from the start of a0 \(1024 bytes\)",
        ),
        ("ld.global.b32 %v, [%x0+-4];", "global load out of bounds .* -4 bytes from the start of a0"),
        ("st.global.v2.b32 [%x0+1020], {%tid, %tid};", "misaligned global store of 8 bytes"),
        ("ld.global.b64 %v, [%x0+1020];", "misaligned global load of 8 bytes"),
        ("setp.eq.u32 %p, %tid, 0; @%p bra L; shfl.sync.bfly.b32 %v, %tid, 1, 31, -1; L:", "shfl.sync names lanes"),
        ("setp.eq.u32 %p, %tid, 0; @%p bra L; bar.sync 0; L:", "divergent barrier: lanes 0xfffffffe"),
        ("setp.lt.u32 %p, %tid, 32; @%p bra L; bar.sync 0; L:", "divergent barrier: some warps wait"),
        (
            "setp.lt.u32 %p, %tid, 32; @%p bra L; bar.sync 0; bra M;\nL: bar.sync 0;\nM:",
            r"divergent barrier 0: warp \d waits at line 11",
        ),
    ],
)
def test_faults_are_named(body, message):
    with pytest.raises(Violation, match=message):
        run(body, OUT, warps=2, shared=128)


def test_read_only_buffers():
    body = "mad.wide.u32 %g, %tid, 4, %x0; ld.global.b32 %v, [%g]; st.global.b32 [%g], %v;"
    run(body, OUT)
    with pytest.raises(Violation, match="store to read-only a0"):
        run(body, OUT, read_only=(0,))


def test_blocks_may_not_touch_what_another_stores():
    own = "mov.u32 %b, %ctaid.x; mad.wide.u32 %g, %b, 4, %x0; st.global.b32 [%g], %b;"
    run(own, OUT, grid=(3,))
    with pytest.raises(Violation, match=r"race in global memory .* a0: stores by blocks 0 and 1 \[block 1,0,0"):
        run("st.global.b32 [%x0], %tid;", OUT, grid=(3,))
    with pytest.raises(Violation, match="load after a store by block 0"):
        run(own + "ld.global.b32 %v, [%x0];", OUT, grid=(3,))
    with pytest.raises(Violation, match="store after a load by another block"):
        run("ld.global.b32 %v, [%x0+4];" + own, OUT, grid=(3,))


def test_counts_are_exact():
    counts = run(
        "mad.wide.u32 %g, %tid, 16, %x0; ld.global.v4.b32 {%a, %b, %c, %d}, [%g]; shl.b32 %s, %tid, 2;"
        "st.shared.b32 [%s], %a; ld.shared.b32 %a, [%s]; mad.wide.u32 %h, %tid, 4, %x1; st.global.b32 [%h], %a;",
        np.zeros(256, np.uint32), np.zeros(64, np.uint32), warps=2, shared=256,
    )  # fmt: skip
    assert counts.loaded == {"a0": 1024, "a1": 0}
    assert counts.stored == {"a0": 0, "a1": 256}
    assert (counts.shared_read, counts.shared_written) == (256, 256)
    assert counts.instructions == 2 * (1 + 2 + 7 + 1)  # %tid, two parameters, the body, ret
