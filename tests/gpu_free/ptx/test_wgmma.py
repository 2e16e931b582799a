# SPDX-License-Identifier: Apache-2.0
"""wgmma.mma_async: operands in every layout of shared memory and in registers, and what must be fenced.

The images of shared memory are built from PTX ISA 9.7.15.5.1 (canonical layouts) as strides and an exclusive or of
rows, not from descriptors and address bits as in core/wgmma.h.
"""

from __future__ import annotations

import numpy as np
import pytest

from .machine import Violation
from .snippets import run

RNG = np.random.default_rng(0)
K, N = 16, 32
SWIZZLES = {"none": (0, 16), "128": (1, 128), "64": (2, 64), "32": (3, 32)}  # name -> (code, bytes of a row)


def _image(matrix: np.ndarray, swizzle: str, k_contiguous: bool) -> tuple[np.ndarray, int]:
    """(bytes of a [rows, 16] fp16 matrix, its descriptor without the start address).

    Pieces of 8 numbers form rows of ``width`` bytes, 8 rows per atom. The index of a piece within its row, its
    column, is xored with the number of the 128 bytes that the row lies in.
    """
    code, width = SWIZZLES[swizzle]
    columns = width // 16
    pieces = {}  # (row of the atom, piece) -> 8 numbers, with the atom's base
    rows = matrix.shape[0]
    if k_contiguous:  # a row of M or N has two pieces; without swizzle they lie in atoms of their own
        leading, stride = (128 * (rows // 8), 128) if columns == 1 else (16, 8 * width)
        for r in range(rows):
            for p in range(2):
                base = r // 8 * stride + (p * leading if columns == 1 else 0)
                pieces[base, r % 8, 0 if columns == 1 else p] = matrix[r, 8 * p : 8 * p + 8]
    else:  # a row of k has rows / 8 pieces
        leading, stride = (128 * (rows // 8), 128) if columns == 1 else (16 * width, 8 * width)
        for k in range(K):
            for p in range(rows // 8):
                if columns == 1:
                    base, column = k // 8 * leading + p * stride, 0
                else:
                    base, column = k // 8 * stride + p // columns * leading, p % columns
                pieces[base, k % 8, column] = matrix[8 * p : 8 * p + 8, k]
    image = np.zeros(max(base for base, *_ in pieces) // 2 + 4 * width + 1024, np.float16)
    for (base, row, column), numbers in pieces.items():
        at = (base + row * width) // 2 + (column ^ (row * columns // 8 if columns < 8 else row) % columns) * 8
        image[at : at + 8] = numbers
    return image, leading >> 4 << 16 | stride >> 4 << 32 | code << 62


def _multiply(
    a_layout, b_layout, *, before="wgmma.fence.sync.aligned;", after=None, proxy="fence.proxy.async;", scale_d=0
):
    """(kernel's result [64, N], A B) for A [64, 16] and B [16, N] laid out as told; None: A in registers."""
    a, b = RNG.standard_normal((64, K)).astype(np.float16), RNG.standard_normal((N, K)).astype(np.float16)
    a_image, a_descriptor = _image(a, *(a_layout or ("none", True)))
    b_image, b_descriptor = _image(b, *b_layout)
    a_size = -(-a_image.nbytes // 1024) * 1024
    image = np.zeros((a_size + b_image.nbytes + 16384) // 2, np.float16)
    image[: a_image.size] = a_image
    image[a_size // 2 : a_size // 2 + b_image.size] = b_image
    b_descriptor |= a_size >> 4
    out = np.zeros((64, N), np.float32)
    d = ", ".join(f"%d{i}" for i in range(N // 2))
    after = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;" if after is None else after
    if a_layout:
        operand, transposes = "%desc_a", f"{int(not a_layout[1])}, {int(not b_layout[1])}"
    else:
        operand, transposes = "{%a0, %a1, %a2, %a3}", f"{int(not b_layout[1])}"
    stores = "".join(
        f"add.u32 %col, %t2, {8 * (r // 4) + r % 2}; mad.lo.u32 %i, %row{r // 2 % 2}, {N}, %col;"
        f"mad.wide.u32 %g, %i, 4, %x1; st.global.b32 [%g], %d{r};" for r in range(N // 2)
    )  # fmt: skip
    copies = image.nbytes // (128 * 16)
    run(
        f"""
        mov.u32 %n, 0;
        FILL:
        mad.lo.u32 %i, %n, 128, %tid;
        shl.b32 %i, %i, 4;
        cvt.u64.u32 %j, %i;
        add.u64 %g, %x0, %j;
        ld.global.v4.b32 {{%v0, %v1, %v2, %v3}}, [%g];
        st.shared.v4.b32 [%i], {{%v0, %v1, %v2, %v3}};
        add.u32 %n, %n, 1;
        setp.lt.u32 %p, %n, {copies};
        @%p bra FILL;
        {proxy}
        bar.sync 0;
        shr.u32 %warp, %tid, 5; and.b32 %lane, %tid, 31; shr.u32 %g4, %lane, 2; and.b32 %t2, %lane, 3;
        shl.b32 %t2, %t2, 1;
        shl.b32 %row0, %warp, 4; add.u32 %row0, %row0, %g4; add.u32 %row1, %row0, 8;
        {_fragments(a_size)}
        mov.b64 %desc_a, {a_descriptor};
        mov.b64 %desc_b, {b_descriptor};
        {"".join(f"mov.b32 %d{i}, 0f3F800000;" for i in range(N // 2))}
        {before}
        wgmma.mma_async.sync.aligned.m64n{N}k16.f32.f16.f16 {{{d}}}, {operand}, %desc_b,
            {scale_d}, 1, 1, {transposes};
        {after}
        {stores}""",
        image[: copies * 1024],
        out,
        warps=4,
        shared=copies * 2048,
    )
    return out, a.astype(np.float64) @ b.astype(np.float64).T + scale_d


def _fragments(a_size: int) -> str:
    """A's registers, from its image without swizzle: row r, piece p at r / 8 * 128 + p * 1024 + r % 8 * 16."""
    text = ""
    for register in range(4):
        row, piece = f"%row{register % 2}", register // 2
        text += (
            f"shl.b32 %at, {row}, 4; add.u32 %at, %at, {1024 * piece}; mad.lo.u32 %at, %t2, 2, %at;"
            f"ld.shared.b32 %a{register}, [%at];"
        )
    return text


LAYOUTS = [(swizzle, contiguous) for swizzle in SWIZZLES for contiguous in (True, False)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_from_shared_memory(layout):
    got, true = _multiply(layout, ("128", True))
    np.testing.assert_allclose(got, true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_b_from_shared_memory(layout):
    got, true = _multiply(("128", True), layout, scale_d=1)
    np.testing.assert_allclose(got, true, rtol=1e-5, atol=1e-5)


def test_a_from_registers():
    got, true = _multiply(None, ("128", False))
    np.testing.assert_allclose(got, true, rtol=1e-5, atol=1e-5)


def test_a_copy_between_fence_and_wgmma_is_no_change():
    """LLVM's copies of registers; PTX's registers are virtual."""
    moved = "mov.b32 %c, %d0; wgmma.fence.sync.aligned; mov.b32 %d0, %c;"
    _multiply(("128", True), ("128", True), before="add.f32 %d0, %d0, %d0; " + moved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"before": ""}, "register that was written without a wgmma.fence"),
        ({"before": "wgmma.fence.sync.aligned; add.f32 %d0, %d0, %d0;"}, "without a wgmma.fence"),
        ({"after": ""}, "read of an accumulator of a wgmma that is not waited for"),
        ({"after": "wgmma.wait_group.sync.aligned 0;"}, "accumulator of a wgmma that is not waited for"),
        ({"after": "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 1;"}, "not waited for"),
        ({"after": "mov.b32 %d3, 0;"}, "write to a register of a wgmma"),
        ({"proxy": ""}, "no fence.proxy.async between the write by warp"),
        ({"after": "st.shared.b32 [10240], %tid;"}, "write after a read by wgmma of warp"),
    ],
    ids=str,
)
def test_missing_fences_and_waits_are_named(change, message):
    with pytest.raises(Violation, match=message):
        _multiply(("128", True), ("128", True), **change)


def test_a_fence_by_the_reader_after_the_barrier_will_do():
    _multiply(("128", True), ("128", True), proxy="", before="fence.proxy.async; wgmma.fence.sync.aligned;")
