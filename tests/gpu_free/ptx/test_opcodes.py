# SPDX-License-Identifier: Apache-2.0
"""Each class of instructions against numpy, or against what the PTX ISA says written down once more."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from .parse import canonical
from .snippets import as_type, evaluate, run

RNG = np.random.default_rng(0)
EDGES = [0, 1, 2, 3, 31, 32, 33, 127, 128, 255, 2**15 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1]


def integers(dtype) -> np.ndarray:
    """Edges and random bits."""
    width = np.dtype(dtype).itemsize * 8
    edges = np.array(EDGES, np.uint64) % (1 << width if width < 64 else 2**64 - 1)
    random = RNG.integers(0, 2**64, 16, np.uint64, endpoint=False)
    values = RNG.permutation(np.concatenate([edges, random]))
    return values.astype(f"u{width // 8}").view(dtype)


def floats(dtype=np.float32) -> np.ndarray:
    specials = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 0.5, 1e-5, 65504.0, 3.0, -2.5]
    return RNG.permutation(np.array([*specials, *RNG.standard_normal(20) * 4])).astype(dtype)


def shifted(a, n, left: bool):
    width = a.dtype.itemsize * 8
    within = (n % width).astype(a.dtype)
    result = np.left_shift(a, within) if left else np.right_shift(a, within)
    beyond = np.where(a < 0, -1, 0).astype(a.dtype) if not left else np.zeros_like(a)
    return np.where(n >= width, beyond, result)


TYPES = {"s16": np.int16, "u16": np.uint16, "s32": np.int32, "u32": np.uint32, "s64": np.int64, "u64": np.uint64}
BINARY = {
    "add": np.add, "sub": np.subtract, "mul.lo": np.multiply, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", BINARY)
def test_integer_arithmetic(name, kind):
    a, b = integers(TYPES[kind]), integers(TYPES[kind])
    opcode = f"{name}.{'b' + kind[1:] if name in ('and', 'or', 'xor') else kind}"
    (got,) = evaluate(f"{opcode} %d0, %s0, %s1;", a, b)
    np.testing.assert_array_equal(as_type(got, TYPES[kind]), BINARY[name](a, b))


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("name", ["div", "rem"])
def test_division_truncates_toward_zero(name, kind):
    a, b = integers(TYPES[kind]), integers(TYPES[kind])
    b[b == 0] = 7
    quotient = [abs(int(x)) // abs(int(y)) * (1 if (x < 0) == (y < 0) else -1) for x, y in zip(a, b, strict=True)]
    true = quotient if name == "div" else [int(x) - q * int(y) for x, y, q in zip(a, b, quotient, strict=True)]
    (got,) = evaluate(f"{name}.{kind} %d0, %s0, %s1;", a, b)
    width = TYPES[kind]().itemsize * 8
    np.testing.assert_array_equal(as_type(got, f"u{width // 8}"), [x % 2**width for x in true])


@pytest.mark.parametrize("kind", ["s32", "u32"])
def test_wide_and_high_products(kind):
    a, b, wide = integers(TYPES[kind]), integers(TYPES[kind]), TYPES[kind[0] + "64"]
    c = integers(wide)
    product = a.astype(wide) * b.astype(wide)
    got = evaluate(
        f"mul.wide.{kind} %d0, %s0, %s1; mul.hi.{kind} %d1, %s0, %s1; mad.wide.{kind} %d2, %s0, %s1, %s2;"
        f"mad.lo.{kind} %d3, %s0, %s1, %s0;", a, b, c, results=4,
    )  # fmt: skip
    np.testing.assert_array_equal(as_type(got[0], wide), product)
    np.testing.assert_array_equal(as_type(got[1], TYPES[kind]), (product >> 32).astype(TYPES[kind]))
    np.testing.assert_array_equal(as_type(got[2], wide), product + c)
    np.testing.assert_array_equal(as_type(got[3], TYPES[kind]), a * b + a)


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_shifts_by_the_width_and_more(kind):
    a, n = integers(TYPES[kind]), RNG.integers(0, 80, 32).astype(np.uint32)
    left, right = evaluate(f"shl.b{kind[1:]} %d0, %s0, %s1; shr.{kind} %d1, %s0, %s1;", a, n, results=2)
    np.testing.assert_array_equal(as_type(left, TYPES[kind]), shifted(a, n, left=True))
    np.testing.assert_array_equal(as_type(right, TYPES[kind]), shifted(a, n, left=False))


def test_bit_fields():
    a, b = integers(np.uint32), integers(np.uint32)
    position, length = RNG.integers(0, 40, 32).astype(np.uint32), RNG.integers(0, 40, 32).astype(np.uint32)
    unsigned, signed, inserted = evaluate(
        "bfe.u32 %d0, %s0, %s2, %s3; bfe.s32 %d1, %s0, %s2, %s3; bfi.b32 %d2, %s0, %s1, %s2, %s3;",
        a, b, position, length, results=3,
    )  # fmt: skip
    for lane in range(32):
        x, y, p, n = int(a[lane]), int(b[lane]), int(position[lane]), int(length[lane])
        field = (x >> p) % 2**n if p < 32 else 0
        assert int(unsigned[lane]) == field % 2**32
        sign = x >> min(p + n - 1, 31) & 1 if n else 0
        present = max(0, min(n, 32 - p))
        assert int(signed[lane]) % 2**32 == (field + (sign << 32) - (sign << present)) % 2**32
        mask = (2**n - 1) << p
        assert int(inserted[lane]) == ((y & ~mask) | (x << p & mask)) % 2**32


def test_prmt_and_lop3():
    a, b, c = integers(np.uint32), integers(np.uint32), integers(np.uint32)
    permuted, logic = evaluate("prmt.b32 %d0, %s0, %s1, %s2; lop3.b32 %d1, %s0, %s1, %s2, 0xE8;", a, b, c, results=2)
    for lane in range(32):
        source = [*int(a[lane]).to_bytes(4, "little"), *int(b[lane]).to_bytes(4, "little")]
        nibbles = [int(c[lane]) >> 4 * i & 15 for i in range(4)]
        expected = [(255 if source[n & 7] & 128 else 0) if n & 8 else source[n & 7] for n in nibbles]
        assert [*int(permuted[lane]).to_bytes(4, "little")] == expected
    np.testing.assert_array_equal(as_type(logic, np.uint32), (a & b) | (b & c) | (a & c))  # 0xE8 is the majority


@pytest.mark.parametrize("kind", TYPES)
def test_integer_comparisons_and_selection(kind):
    a, b = integers(TYPES[kind]), integers(TYPES[kind])
    b[::3] = a[::3]
    names = {"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}
    text = "".join(f"setp.{n}.{kind} %p, %s0, %s1; selp.b64 %d{i}, %s0, %s1, %p;" for i, n in enumerate(names))
    for got, chosen in zip(evaluate(text, a, b, results=6), names.values(), strict=True):
        np.testing.assert_array_equal(as_type(got, TYPES[kind]), np.where(chosen, a, b))


FLOAT_BINARY = {
    "add.f32": np.add, "sub.f32": np.subtract, "mul.f32": np.multiply, "div.full.f32": np.divide,
    "min.f32": np.fmin, "max.f32": np.fmax, "max.NaN.f32": np.maximum, "min.NaN.f32": np.minimum,
}  # fmt: skip


@pytest.mark.parametrize("name", FLOAT_BINARY)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_float_arithmetic(name):
    a, b = floats(), floats()
    (got,) = evaluate(f"{name} %d0, %s0, %s1;", a, b)
    np.testing.assert_array_equal(as_type(got, np.float32), FLOAT_BINARY[name](a, b))


def test_fma_rounds_once():
    a = np.float32(1) + np.float32(2.0**-12) * np.arange(32, dtype=np.float32)
    c = -(a * a)
    (got,) = evaluate("fma.rn.f32 %d0, %s0, %s0, %s1;", a, c)
    np.testing.assert_array_equal(as_type(got, np.float32), (a.astype(float) ** 2 + c).astype(np.float32))
    assert np.any(as_type(got, np.float32) != 0)


def test_ftz_flushes_subnormals():
    tiny = np.full(32, 1e-40, np.float32)
    kept, flushed, exponential = evaluate(
        "add.f32 %d0, %s0, %s0; add.ftz.f32 %d1, %s0, %s0; ex2.approx.ftz.f32 %d2, %s1;", tiny,
        np.full(32, -140, np.float32), results=3,
    )  # fmt: skip
    assert np.all(as_type(kept, np.float32) > 0)
    assert np.all(as_type(flushed, np.float32) == 0)
    assert np.all(as_type(exponential, np.float32) == 0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_float_functions():
    a = np.abs(floats())
    functions = {
        "ex2.approx.f32": np.exp2, "lg2.approx.f32": np.log2, "rcp.approx.f32": lambda x: 1 / x,
        "sqrt.rn.f32": np.sqrt, "rsqrt.approx.f32": lambda x: 1 / np.sqrt(x), "neg.f32": np.negative,
        "abs.f32": np.abs,
    }  # fmt: skip
    got = evaluate("".join(f"{n} %d{i}, %s0;" for i, n in enumerate(functions)), a, results=len(functions))
    for result, function in zip(got, functions.values(), strict=True):
        np.testing.assert_allclose(as_type(result, np.float32), function(a), rtol=1e-6)


def test_float_comparisons_with_nan():
    a, b = floats(), floats()
    b[::3] = a[::3]
    unordered = np.isnan(a) | np.isnan(b)
    names = {
        "eq": a == b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b, "ne": (a != b) & ~unordered,
        "neu": a != b, "equ": (a == b) | unordered, "ltu": (a < b) | unordered, "nan": unordered, "num": ~unordered,
    }  # fmt: skip
    text = "".join(f"setp.{n}.f32 %p, %s0, %s1; selp.b32 %d{i}, 1, 0, %p;" for i, n in enumerate(names))
    for got, name in zip(evaluate(text, a, b, results=len(names)), names, strict=True):
        np.testing.assert_array_equal(got.astype(bool), names[name], err_msg=name)


def test_conversions_round_to_nearest_even():
    a = floats()
    ties = (np.arange(8, dtype=np.uint32) * 0x8000 + 0x3F800000).view(np.float32)  # halfway between bf16 numbers
    a[:8] = ties
    b = floats()
    t = torch.from_numpy(a.copy())
    bf16, f16, tf32, pair, half_pair = evaluate(
        "cvt.rn.bf16.f32 %d0, %s0; cvt.rn.f16.f32 %d1, %s0; cvt.rna.tf32.f32 %d2, %s0;"
        "cvt.rn.bf16x2.f32 %d3, %s0, %s1; cvt.rn.f16x2.f32 %d4, %s0, %s1;", a, b, results=5,
    )  # fmt: skip
    expected = t.bfloat16().view(torch.int16).numpy().view(np.uint16)
    number = ~np.isnan(a)
    np.testing.assert_array_equal(bf16[number], expected[number])
    assert np.all(bf16[~number] == 0x7FFF)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(as_type(f16, np.float16), a.astype(np.float16))
        low = b.astype(np.float16)
    finite = np.isfinite(a)
    exact = a[finite].astype(float)
    step = 2.0 ** (np.floor(np.log2(np.where(exact == 0, 1, np.abs(exact)))) - 10)
    away = np.sign(exact) * np.floor(np.abs(exact) / step + 0.5) * step
    np.testing.assert_array_equal(as_type(tf32, np.float32)[finite], away.astype(np.float32))
    np.testing.assert_array_equal(pair >> np.uint64(16), bf16)
    np.testing.assert_array_equal(half_pair >> np.uint64(16), f16)
    np.testing.assert_array_equal((half_pair & np.uint64(0xFFFF)).astype(np.uint16).view(np.float16), low)


def test_conversions_of_integers_and_halves():
    a, h = integers(np.int32), floats(np.float16)
    wide, small, number, half = evaluate(
        "cvt.s64.s32 %d0, %s0; cvt.u16.u32 %d1, %s0; cvt.rn.f32.s32 %d2, %s0; cvt.f32.f16 %d3, %s1;", a, h, results=4
    )
    np.testing.assert_array_equal(as_type(wide, np.int64), a)
    np.testing.assert_array_equal(small, a.view(np.uint32) & 0xFFFF)
    np.testing.assert_array_equal(as_type(number, np.float32), a.astype(np.float32))
    np.testing.assert_array_equal(as_type(half, np.float32), h.astype(np.float32))
    x = np.array([0.5, -1.5, 2.5e9, -2.5e9, np.nan, 7.99, -7.99, 1e20] * 4, np.float32)
    integer, floor = evaluate("cvt.rzi.s32.f32 %d0, %s0; cvt.rmi.f32.f32 %d1, %s0;", x, results=2)
    np.testing.assert_array_equal(as_type(integer, np.int32)[:8], [0, -1, 2**31 - 1, -(2**31), 0, 7, -7, 2**31 - 1])
    np.testing.assert_array_equal(as_type(floor, np.float32), np.floor(x))


def test_moves_pack_and_unpack():
    a, b = integers(np.uint16), integers(np.uint16)
    packed, low, high, whole = evaluate(
        "mov.b32 %d0, {%s0, %s1}; mov.b32 {%d1, %d2}, %d0; mov.b64 %d3, {%d0, %d0};", a, b, results=4
    )
    np.testing.assert_array_equal(packed, a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(16))
    np.testing.assert_array_equal(low, a)
    np.testing.assert_array_equal(high, b)
    np.testing.assert_array_equal(whole, packed | packed << np.uint64(32))


def test_predicated_and_diverged_lanes():
    """Lanes loop as often as their number says; they meet again behind the loop."""
    (got,) = evaluate("""
        mov.u32 %n, 0;
        L: add.u32 %d0, %d0, %n;
        add.u32 %n, %n, 1;
        setp.le.u32 %p, %n, %tid;
        @%p bra L;
        @!%p add.u32 %d0, %d0, 1000;
        bar.sync 0;""")
    np.testing.assert_array_equal(got, [lane * (lane + 1) // 2 + 1000 for lane in range(32)])


def _shuffled(mode, a, b, c):
    """PTX ISA 9.7.9.6, its pseudocode."""
    result, valid = [], []
    for lane in range(32):
        bval, cval, segment = b & 31, c & 31, c >> 8 & 31
        last, first = (lane & segment) | (cval & ~segment), lane & segment
        j = {"up": lane - bval, "down": lane + bval, "bfly": lane ^ bval, "idx": first | (bval & ~segment)}[mode]
        inside = j >= last if mode == "up" else j <= last
        result.append(a[j if inside else lane])
        valid.append(inside)
    return result, valid


@pytest.mark.parametrize(("mode", "b", "c"), [("up", 3, 0), ("down", 5, 31), ("bfly", 16, 31), ("bfly", 1, 31),
                                              ("idx", 9, 31), ("idx", 2, 0x1C03), ("down", 1, 0x181F)])  # fmt: skip
def test_shuffles(mode, b, c):
    a = integers(np.uint32)
    value, valid = evaluate(f"shfl.sync.{mode}.b32 %d0|%p, %s0, {b}, {c}, -1; selp.b32 %d1, 1, 0, %p;", a, results=2)
    expected, inside = _shuffled(mode, a, b, c)
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(valid.astype(bool), inside)


def test_votes_and_reductions_of_a_warp():
    a = integers(np.int32)
    results = evaluate(
        "redux.sync.min.s32 %d0, %s0, -1; redux.sync.max.u32 %d1, %s0, -1; redux.sync.add.s32 %d2, %s0, -1;"
        "setp.lt.s32 %p, %s0, 0; vote.sync.ballot.b32 %d3, %p, -1; elect.sync _|%q, -1; selp.b32 %d4, 1, 0, %q;",
        a, results=5,
    )  # fmt: skip
    least, greatest, total, ballot, elected = results
    assert np.all(as_type(least, np.int32) == a.min())
    assert np.all(greatest == a.view(np.uint32).max())
    assert np.all(as_type(total, np.int32) == a.sum(dtype=np.int32))
    assert np.all(ballot == sum(1 << i for i in range(32) if a[i] < 0))
    assert elected.sum() == 1


def test_cp_async_fills_the_rest_with_zeros():
    source, out = np.arange(128, dtype=np.uint32), np.full((32, 4), 7, np.uint32)
    run(
        """
        mad.wide.u32 %g, %tid, 16, %x0;
        shl.b32 %a, %tid, 4;
        and.b32 %n, %tid, 4;
        cp.async.cg.shared.global [ %a + 0 ], [ %g + 0 ], 0x10, %n;
        cp.async.commit_group;
        cp.async.wait_group 0;
        ld.shared.v4.b32 {%r0, %r1, %r2, %r3}, [%a];
        mad.wide.u32 %g, %tid, 16, %x1;
        st.global.v4.b32 [%g], {%r0, %r1, %r2, %r3};""",
        source,
        out,
        shared=512,
    )
    expected = np.zeros((32, 4), np.uint32)
    expected[:, 0] = np.where(np.arange(32) & 4, np.arange(32) * 4, 0)
    np.testing.assert_array_equal(out, expected)


def test_atomic_operations():
    total, old = np.zeros(2, np.float32), np.zeros(32, np.uint32)
    run(
        """
        red.global.add.f32 [%x0], 0f3F800000;
        mad.wide.u32 %g, %tid, 4, %x1;
        atom.global.gpu.acq_rel.add.u32 %o, [%x0+4], 1;
        st.global.b32 [%g], %o;""",
        total,
        old,
    )
    assert total[0] == 32
    assert sorted(old) == list(range(32))


@pytest.mark.parametrize(
    ("opcode", "name"),
    [
        ("ld.global.L1::evict_first.v4.b32", "ld.global.b32"), ("ld.global.s8", "ld.global.s8"),
        ("ld.global.u16", "ld.global.b16"), ("st.shared.v2.f32", "st.shared.b32"), ("fma.rn.f32", "fma.f32"),
        ("fma.rz.f32", "fma.rz.f32"), ("cvt.rn.f16.f32", "cvt.rn.f16.f32"),
        ("cp.async.cg.shared.global.L2::128B", "cp.async.cg.shared.global"), ("barrier.cta.sync", "barrier"),
        ("fence.proxy.async.shared::cta", "fence.proxy.async.shared"),
    ],
)  # fmt: skip
def test_canonical_names_keep_what_has_meaning(opcode, name):
    assert canonical(opcode) == name


def test_what_is_not_known_is_named():
    with pytest.raises(NotImplementedError, match=r"opcode fma\.rz\.f32 \(PTX line 15\)"):
        evaluate("fma.rz.f32 %d0, %s0, %s0, %s0;", floats())
    with pytest.raises(NotImplementedError, match=r"PTX line 15: mov\.u32 .*: special register %smid"):
        evaluate("mov.u32 %d0, %smid.x;", floats())
