# SPDX-License-Identifier: Apache-2.0
"""Instructions on matrices against numpy.

g = lane / 4 and t = lane % 4 are the ISA's groupID and threadID_in_group.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from .snippets import as_type, evaluate, run

RNG = np.random.default_rng(0)


def _pairs(matrix16: np.ndarray, index) -> np.ndarray:
    """[32] registers of two halves each, from (lane, i) -> (row, column)."""
    bits = matrix16.view(np.uint16)
    return np.array([
        int(bits[index(lane, 0)]) | int(bits[index(lane, 1)]) << 16 for lane in range(32)
    ], np.uint32)  # fmt: skip


def _bits16(x: np.ndarray, kind: str) -> np.ndarray:
    if kind == "f16":
        return x.astype(np.float16).view(np.uint16)
    return torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16)


def _rounded(x: np.ndarray, kind: str) -> np.ndarray:
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    return torch.from_numpy(x).to(dtype).double().numpy()


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_mma_m16n8k16(kind):
    """PTX ISA 9.7.14.5.8, figures of the fragments."""
    a, b = RNG.standard_normal((16, 16)).astype(np.float32), RNG.standard_normal((16, 8)).astype(np.float32)
    c = RNG.standard_normal((16, 8)).astype(np.float32)
    a_bits, b_bits = _bits16(a, kind), _bits16(b, kind)

    def a_position(lane, i):  # i: element 0 to 7
        row = lane // 4 if i < 2 or 4 <= i < 6 else lane // 4 + 8
        return row, lane % 4 * 2 + (i & 1) + (0 if i < 4 else 8)

    def b_position(lane, i):
        return lane % 4 * 2 + (i & 1) + (0 if i < 2 else 8), lane // 4

    def c_position(lane, i):
        return (lane // 4 if i < 2 else lane // 4 + 8), lane % 4 * 2 + (i & 1)

    registers = [_pairs(a_bits, lambda lane, i, r=r: a_position(lane, 2 * r + i)) for r in range(4)]
    registers += [_pairs(b_bits, lambda lane, i, r=r: b_position(lane, 2 * r + i)) for r in range(2)]
    registers += [np.array([c[c_position(lane, i)] for lane in range(32)]) for i in range(4)]
    got = evaluate(
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{%d0, %d1, %d2, %d3}}, {{%s0, %s1, %s2, %s3}}, "
        "{%s4, %s5}, {%s6, %s7, %s8, %s9};", *registers, results=4,
    )  # fmt: skip
    expected = _rounded(a, kind) @ _rounded(b, kind) + c
    for i in range(4):
        true = [expected[c_position(lane, i)] for lane in range(32)]
        np.testing.assert_allclose(as_type(got[i], np.float32), true, rtol=1e-6)


def test_mma_tf32_m16n8k8():
    a, b = RNG.standard_normal((16, 8)).astype(np.float32), RNG.standard_normal((8, 8)).astype(np.float32)
    a_rows = [lambda lane, i=i: (lane // 4 + 8 * (i in (1, 3)), lane % 4 + 4 * (i >= 2)) for i in range(4)]
    b_rows = [lambda lane, i=i: (lane % 4 + 4 * i, lane // 4) for i in range(2)]
    registers = [np.array([a[row_of(lane)] for lane in range(32)]) for row_of in a_rows]
    registers += [np.array([b[row_of(lane)] for lane in range(32)]) for row_of in b_rows]
    got = evaluate(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%d0, %d1, %d2, %d3}, {%s0, %s1, %s2, %s3}, {%s4, %s5}, "
        "{0f3F800000, 0f3F800000, 0f3F800000, 0f3F800000};", *registers, results=4,
    )  # fmt: skip

    def truncated(x):
        return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32).astype(float)

    expected = truncated(a) @ truncated(b) + 1
    for i in range(4):
        true = [expected[lane // 4 + 8 * (i >= 2), lane % 4 * 2 + (i & 1)] for lane in range(32)]
        np.testing.assert_allclose(as_type(got[i], np.float32), true, rtol=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_and_stmatrix(transposed):
    """Four 8 x 8 matrices from rows at odd offsets; stored with stmatrix they come back."""
    image = RNG.integers(0, 2**16, 512).astype(np.uint16)
    rows = RNG.permutation(64)[:32].astype(np.uint64) * np.uint64(16)  # byte offset of lane's row
    out, back = np.zeros((4, 32), np.uint32), np.zeros(512, np.uint16)
    trans = ".trans" if transposed else ""
    run(
        f"""
        mad.wide.u32 %g, %tid, 32, %x0;
        ld.global.v4.b32 {{%r0, %r1, %r2, %r3}}, [%g];
        ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%g+16];
        shl.b32 %a, %tid, 5;
        mov.u32 %base, smem;
        add.u32 %a, %a, %base;
        st.shared.v4.b32 [%a], {{%r0, %r1, %r2, %r3}};
        st.shared.v4.b32 [%a+16], {{%r4, %r5, %r6, %r7}};
        mad.wide.u32 %g, %tid, 8, %x1;
        ld.global.b64 %row, [%g];
        cvt.u32.u64 %row, %row;
        ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%q0, %q1, %q2, %q3}}, [%row];
        mad.wide.u32 %g, %tid, 4, %x2;
        st.global.b32 [%g], %q0; st.global.b32 [%g+128], %q1;
        st.global.b32 [%g+256], %q2; st.global.b32 [%g+384], %q3;
        stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%row], {{%q0, %q1, %q2, %q3}};
        ld.shared.v4.b32 {{%r0, %r1, %r2, %r3}}, [%a];
        ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%a+16];
        mad.wide.u32 %g, %tid, 32, %x3;
        st.global.v4.b32 [%g], {{%r0, %r1, %r2, %r3}};
        st.global.v4.b32 [%g+16], {{%r4, %r5, %r6, %r7}};""",
        image,
        rows,
        out,
        back,
        shared=1024,
    )
    for j in range(4):
        matrix = np.stack([image[int(rows[8 * j + r]) // 2 :][:8] for r in range(8)])
        matrix = matrix.T if transposed else matrix
        for lane in range(32):
            low, high = matrix[lane // 4, lane % 4 * 2], matrix[lane // 4, lane % 4 * 2 + 1]
            assert out[j, lane] == int(low) | int(high) << 16
    np.testing.assert_array_equal(back, image)
