# SPDX-License-Identifier: Apache-2.0
"""``merge`` and ``concat``: the Triton part in the guarded interpreter, torch's part by its CPU op.

The other rows of ``torch_attention.KERNELS`` run their own code too, on stand-ins for the ops that only a GPU has
(stand_ins.py), and call the real ops on tensors without data, which checks arguments and shapes.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings

import pytest
import torch

import peftkern
from peftkern import ops
from peftkern.arguments import allocate_gradients, allocate_outputs
from peftkern.backends import dense_mask, registry, torch_attention
from peftkern.backends.triton import TritonPrefixKernels, launch
from peftkern.testing.bounds import ROUNDINGS, check_backend, ratios
from peftkern.testing.cases import FEATURES, Shape, combination, feature, tensors

from ..cover import product
from . import stand_ins
from .guard import guard

pytestmark = pytest.mark.interpreter
SHAPE = Shape(B=2, Hq=4, Hkv=2, S=33, P=19, D=20)  # two blocks of rows, of which the second is ragged
BOTH = ["merge", "concat"]
HALVES = [torch.bfloat16, torch.float16]

#: Packed sequences with prefixes of their own, which torch's flash attention has, as it takes offsets of queries and
#: keys.
PACKED = {name for name in FEATURES if name.startswith("packed_")} - {"packed_window"}
#: What each backend refuses: features, by torch's kernel where a mask cannot be had.
REFUSED = {"merge": {"softcap", "dropout"}, "concat": {"softcap", "dropout", "gate", *PACKED}}
UNMASKED = {
    "merge": {"key_mask", "bias", "bias_row"},
    "concat": {
        "key_mask", "bias", "bias_row", "prefix_bias", "bank", "ragged_bank", "several_prefixes",
        "window_after_prefix",
    },
}  # fmt: skip


#: Features in which the rows' own code differs.
OF_A_ROW = {
    "plain", "narrow_values", "wide_values", "non_causal", "kv_cache", "key_mask", "window", "window_after_prefix",
    "packed", "packed_bank", "packed_prompt", "packed_shared", "bank", "ragged_bank",
}  # fmt: skip


def _feature(name: str, shape: Shape = SHAPE):
    """``kv_cache`` with 15 cached keys."""
    return feature(name, shape) if name != "kv_cache" else (dataclasses.replace(shape, T=shape.S + 15), {})


def _check(backend: str, shape: Shape, options: dict, dtype: torch.dtype, prefix_dtype=None, **kwargs):
    with guard() as watch:
        results = check_backend(backend, tensors(shape, dtype, prefix_dtype), options, **kwargs)
    return results, watch


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("backend", "dtype", "name"),
    [
        # the tests of the rows have those features of a row in all pairs
        *product(BOTH, HALVES, [n for n in FEATURES if n in OF_A_ROW], strength=1),
        *product(BOTH, HALVES, [n for n in FEATURES if n not in OF_A_ROW]),
    ],
    ids=str,
)
def test_every_feature_on_torchs_cpu_kernel(backend, dtype, name):
    """With the fp32 prefix that PEFT keeps beside half-precision activations. Two blocks of rows: on every row."""
    shape, options = _feature(name, dataclasses.replace(SHAPE, S=17))
    if name in REFUSED[backend]:
        with pytest.raises(peftkern.BackendUnavailable, match=f"{backend}: .*: use backend='"):
            _check(backend, shape, options, dtype)
    else:
        _check(backend, shape, options, dtype, torch.float32)


def _refused(backend: str, row: str) -> set[str]:
    """The features that the backend refuses on this row."""
    return REFUSED[backend] - PACKED | UNMASKED[backend] if row == "flash" else REFUSED[backend]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("backend", "row", "name"),
    product(
        BOTH, ["flash", "cudnn", "efficient"], FEATURES,
        among=lambda backend, row, name: name in OF_A_ROW and name not in _refused(backend, row),
    ),
)  # fmt: skip
def test_every_feature_on_every_row(backend, row, name, monkeypatch):
    stand_ins.install(monkeypatch, row)
    shape, options = _feature(name, dataclasses.replace(SHAPE, Hq=2, Hkv=1, S=35))
    dtype = {"efficient": torch.float32, "cudnn": torch.bfloat16}.get(row, torch.float16)
    if name in _refused(backend, row):
        with pytest.raises(peftkern.BackendUnavailable, match=f"{backend}: .*: use backend='"):
            _check(backend, shape, options, dtype)
    else:
        _check(backend, shape, options, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BOTH)
def test_right_results_have_room(backend, dtype):
    """Not only within the bound, but within two thirds of it, on torch's CPU kernel."""
    kernel = functools.partial(peftkern.prefix_attention, backend=backend, return_lse=True)
    with guard():
        _, errors = ratios(kernel, tensors(SHAPE, dtype, torch.float32), {}, roundings=ROUNDINGS[backend])
    for one in errors.values():
        assert one.worst <= 2 / 3, one.message


ODD = [
    Shape(S=1, P=130, D=40, T=70), Shape(S=63, P=7, D=64, B=1, Hq=1, Hkv=1),
    Shape(S=17, P=130, D=80, B=1, Hq=2, Hkv=1), Shape(S=17, P=1, D=16), Shape(S=63, P=0, D=40, B=1, Hq=1, Hkv=1),
    Shape(S=5, P=3, D=1), Shape(S=5, P=128, D=129, B=1), Shape(S=0, T=9), Shape(S=3, T=0), Shape(B=0),
    Shape(S=0, P=0), Shape(S=2, T=0, P=0),
    pytest.param(Shape(S=333, P=7, D=8, B=1, Hq=2, Hkv=1), marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", ODD, ids=str)
@pytest.mark.parametrize("backend", BOTH)
def test_odd_shapes(backend, shape, monkeypatch):
    """In fp32 on an exact stand-in: torch's CPU kernel, with its fast exp, is less exact than eager."""
    stand_ins.install(monkeypatch, "efficient")
    _check(backend, shape, {"causal": shape.kv_len >= shape.S}, torch.float32)


MORE_SEEDS = [pytest.param(s, marks=pytest.mark.slow) for s in range(6, 40)]


@pytest.mark.parametrize("seed", [*range(6), *MORE_SEEDS])
def test_random_combinations(seed, monkeypatch):
    """Some with a gradient of lse, which the fused kernels compute."""
    shape, options = combination(seed)
    for name in ("softcap", "dropout_p", "dropout_seed"):
        options.pop(name, None)
    stand_ins.install(monkeypatch, "efficient")
    _check("merge", shape, options, (torch.float32, torch.bfloat16)[seed % 2], dlse=seed % 4 == 0)


SHARED = sorted({*OF_A_ROW, "sinks", "bias_row"} - PACKED)
#: One for each part that the backends do not share: masks, windows, banks, the gradients of options.
APART = {"plain", "key_mask", "window_after_prefix", "ragged_bank", "sinks"}


@pytest.mark.parametrize("name", [n if n in APART else pytest.param(n, marks=pytest.mark.slow) for n in SHARED])
def test_the_three_backends_agree(name):
    """Each is within the bound with each feature, too, in the tests of each."""
    shape, options = _feature(name, Shape(B=2, Hq=4, Hkv=2, S=17, P=9, D=16))
    results = []
    for backend in ("triton", *BOTH):
        inputs = {n: x.requires_grad_() for n, x in tensors(shape, torch.float32).items()}
        out, lse = peftkern.prefix_attention(**inputs, **options, backend=backend, return_lse=True)
        results.append([out, lse, *torch.autograd.grad(out.square().sum(), tuple(inputs.values()))])
    for others in results[1:]:
        for got, expected in zip(others, results[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("row", ["flash", "cudnn", "efficient"])
@pytest.mark.parametrize("sizes", [{}, {"T": 48}, {"D": 64}], ids=str)
def test_the_real_ops_take_what_their_rows_pass(row, sizes):
    """On tensors without data: arguments and shapes are those of torch's own shape functions."""
    shape = dataclasses.replace(SHAPE, **sizes)
    dtype = torch.float32 if row == "efficient" else torch.bfloat16
    q, k, v = (x.to("meta") for x in list(tensors(shape, dtype).values())[:3])
    entry = stand_ins.ROWS[row]
    problems = [torch_attention.KernelInputs(q, k, v, 0.3, True, None, None, None, None)]
    if entry.masks:
        visible = torch.ones(shape.B, 1, shape.S, shape.kv_len, dtype=torch.bool, device="meta")
        mask, empty = dense_mask.additive_mask(visible, None, q, shape.kv_len)
        problems.append(problems[0]._replace(causal=False, mask=mask, empty=empty))
    if "window" in entry.native:
        problems.append(problems[0]._replace(window=4))
        ends = torch.zeros(3, dtype=torch.int64, device="meta")
        problems.append(torch_attention.KernelInputs(q[:1], k[:1], v[:1], 0.3, True, None, ends, None, None))
    for problem in problems:
        out, lse = torch_attention.attention(entry, problem)
        assert out.shape == problem.q.shape
        assert lse.shape == problem.q.shape[:3]
        assert lse.dtype == torch.float32
        rows = torch.empty(lse.shape, device="meta")
        gradients = torch_attention.attention_backward(entry, torch.empty_like(out), out, rows, problem)
        assert [x.shape for x in gradients] == [x.shape for x in problem[:3]]


PROMPT_FIRST = [([7, 33], 7), ([7, 0, 40, 2], 7), ([0, 33, 9], 0), ([33, 9, 0], 42), ([65, 1], 65)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("row", "prompt_first", "prefix_len"), product(["flash", "efficient"], PROMPT_FIRST, [19, 130]), ids=str
)
def test_rows_behind_a_prompt_share_it(row, prompt_first, prefix_len, monkeypatch):
    """In place (flash) and not: one pass over the rows that see a short prefix, and nothing for the others."""
    lengths, start = prompt_first
    stand_ins.install(monkeypatch, row)
    dtype = torch.float32 if row == "efficient" else torch.float16
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    ids = torch.where(starts[:-1] < start, -1, 0)
    shape = Shape(B=1, Hq=4, Hkv=2, S=sum(lengths), P=prefix_len, D=20, A=1)
    options = {"cu_seqlens": starts, "prefix_ids": ids, "prefix_start": start}
    _, watch = _check("merge", shape, options, dtype, torch.float32)
    names = [name for name in watch.stores if "sum_partials" not in name]
    short, seen = prefix_len <= 128, start < shape.S
    assert ("_prefix_merge_bwd_kernel" in names) == short
    assert ("_prefix_merge_fwd_kernel" in names) == seen
    assert short or "_prefix_attention_bwd_dq_kernel" in names


def test_rows_that_see_nothing_are_zero_whatever_torchs_kernel_leaves(monkeypatch):
    """The stand-in leaves NaN in them."""
    stand_ins.install(monkeypatch, "efficient")
    shape = Shape(S=5, P=0)
    inputs = {n: x.requires_grad_() for n, x in tensors(shape, torch.float32).items()}
    mask = torch.zeros(shape.B, shape.S, dtype=torch.bool)
    for backend in BOTH:
        with guard():
            out, lse = peftkern.prefix_attention(**inputs, key_mask=mask, backend=backend, return_lse=True)
            gradients = torch.autograd.grad(out.sum(), tuple(inputs.values()))
        assert out.abs().max() == 0
        assert lse.max() == -torch.inf
        assert all(x.abs().sum() == 0 for x in gradients if x.numel())


def test_a_long_prefix_hides_a_fully_masked_sequence(monkeypatch):
    """Where the sequence gives nothing, out is attention over the prefix alone."""
    stand_ins.install(monkeypatch, "efficient")
    inputs = tensors(Shape(S=5, P=130), torch.float32)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    got = peftkern.prefix_attention(**inputs, key_mask=mask, backend="merge")
    inputs["k"], inputs["v"] = inputs["k"][:, :, :0], inputs["v"][:, :, :0]
    expected = peftkern.prefix_attention(**inputs, causal=False, backend="reference")
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_gradients_nobody_needs_are_not_computed(monkeypatch):
    row = stand_ins.install(monkeypatch, "cpu flash")

    def fail(*_):
        raise AssertionError("torch's backward ran")

    monkeypatch.setattr(torch_attention, "KERNELS", [dataclasses.replace(row, backward=fail)])
    inputs = tensors(Shape(S=3, P=2), torch.float32)
    inputs["prefix_k"].requires_grad_()
    with guard() as watch:
        peftkern.prefix_attention(**inputs, backend="merge").sum().backward()
    assert {k for k in watch.stores if "bwd" in k} == {"_prefix_merge_bwd_kernel"}
    assert inputs["prefix_k"].grad.abs().sum() > 0


@pytest.mark.parametrize("needed", ["q", "k", "prefix_k", "prefix_v"])
@pytest.mark.parametrize("backend", BOTH)
def test_one_gradient_alone_is_the_one_among_all(backend, needed):
    inputs = tensors(Shape(S=5, P=3), torch.float32)

    def gradient(*names: str):
        leaves = {n: x.clone().requires_grad_(n in names) for n, x in inputs.items()}
        with guard():
            peftkern.prefix_attention(**leaves, backend=backend).square().sum().backward()
        return leaves[needed].grad

    torch.testing.assert_close(gradient(needed), gradient(*inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BOTH)
def test_runs_are_bitwise_equal_and_splits_do_not_lose_rows(backend, monkeypatch):
    """The number of programs depends on the device; each gives the sum over all rows."""
    shape = Shape(B=2, Hq=4, Hkv=2, S=65, P=9, D=16)
    inputs = {n: x.requires_grad_() for n, x in tensors(shape, torch.float32).items()}

    def results():
        out = peftkern.prefix_attention(**inputs, backend=backend)
        return [out, *torch.autograd.grad(out.square().sum(), tuple(inputs.values()))]

    first, second = results(), results()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for processors in (1, 1000):
        monkeypatch.setattr(launch, "processors", lambda device, n=processors: n)
        for a, b in zip(first, results(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def _large(monkeypatch):
    """Arguments with so many rows that the prefix, which each program reads once, counts little."""
    shape = Shape(B=6, Hq=8, Hkv=1, S=256, P=128, D=16)
    inputs = tensors(shape, torch.float32)
    args = ops.AttentionArgs(**inputs, **dict.fromkeys(ops.AttentionArgs._fields[5:15]), scale=0.25, causal=True,
                             window=None, prefix_in_window=True, softcap=0.0, dropout_p=0.0)  # fmt: skip
    q, prefix = 4 * shape.B * shape.Hq * shape.S * shape.D, 2 * 4 * shape.Hkv * shape.P * shape.D
    return args, q, q // shape.D, prefix


def test_bytes_of_the_merge_and_that_it_is_in_place(monkeypatch):
    """At most 5 % beyond q and out read, out written, lse read and written, the prefix read."""
    args, q, lse, prefix = _large(monkeypatch)
    part, part_lse = allocate_outputs(args)
    part.normal_()
    part_lse.normal_()
    with guard() as watch:
        out, merged = TritonPrefixKernels().merge_prefix(args, part, part_lse)
    assert out is part
    assert merged is part_lse
    moved, least = watch.loads.total() + watch.stores.total(), 3 * q + 2 * lse + prefix
    assert least <= moved <= 1.05 * least, f"{moved / least:.3f} times the least"


def test_bytes_of_the_backward(monkeypatch):
    """At most 5 % beyond q, out, dout and dq read, dq written, lse and the prefix read, its gradients written."""
    args, q, lse, prefix = _large(monkeypatch)
    out, statistics = allocate_outputs(args)
    out.normal_()
    statistics.fill_(5.0)
    gradients = allocate_gradients(args, [True] * 3 + [True] * 2 + [False] * 4)
    gradients.dq.normal_()
    dout = torch.randn_like(out)
    with guard() as watch:
        TritonPrefixKernels().merge_prefix_backward(dout, out, statistics, args, gradients.dq, gradients)
    moved = sum(n["_prefix_merge_bwd_kernel"] for n in (watch.loads, watch.stores))
    least = 5 * q + lse + 2 * prefix
    assert least <= moved <= 1.05 * least, f"{moved / least:.3f} times the least"


@pytest.mark.parametrize(
    "name", ["plain", *(pytest.param(n, marks=pytest.mark.slow) for n in ("key_mask", "window", "kv_cache", "bank"))]
)
@pytest.mark.parametrize("backend", BOTH)
def test_the_op_returns_what_the_compiler_expects(backend, name):
    """Whatever layout torch's kernel has: opcheck compares strides, compilation relies on them."""
    shape, options = feature(name, Shape())
    inputs = {n: x.requires_grad_() for n, x in tensors(shape, torch.float32).items()}

    def attention(**leaves):
        return peftkern.prefix_attention(**leaves, **options, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    dout = torch.randn(shape.B, shape.Hq, shape.S, shape.D)
    got, want = (torch.autograd.grad(f(**inputs), list(inputs.values()), dout) for f in (compiled, attention))
    for a, b in zip(got, want, strict=True):  # torch's CPU kernel rounds as the alignment of its inputs falls
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_lse_is_that_of_the_joint_softmax(monkeypatch):
    inputs = tensors(Shape(S=9, P=4), torch.float32)
    _, expected = peftkern.prefix_attention(**inputs, backend="reference", return_lse=True)
    stand_ins.install(monkeypatch, "cpu flash")
    for backend in BOTH:
        _, lse = peftkern.prefix_attention(**inputs, backend=backend, return_lse=True)
        torch.testing.assert_close(lse, expected, rtol=1e-5, atol=1e-5)


def test_refusals_name_the_ops_and_the_way_out(monkeypatch):
    stand_ins.install(monkeypatch, "flash")
    inputs = tensors(Shape(), torch.float16)
    text = str(peftkern.explain(**inputs, key_mask=torch.ones(2, 7, dtype=torch.bool), backend="merge"))
    assert "merge: no attention kernel supports this call (flash: no key_mask): use backend='triton'" in text
    text = str(peftkern.explain(**inputs, softcap=1.0))
    assert "concat: no attention kernel supports this call (flash: no softcap): use backend='triton'" in text
    monkeypatch.setattr(torch_attention, "KERNELS", [])
    assert "torch has no attention kernel for device type 'cpu'" in str(peftkern.explain(**inputs))


#: A prefix of two blocks of keys, over which torch's kernel runs as well.
LONG = "merge/{0}/{0}+triton"


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", ["plain", "packed", "window_after_prefix", "kv_cache", "non_causal", "wide_values"])
@pytest.mark.parametrize("row", ["flash", "cpu flash"])
def test_torchs_kernel_on_a_long_prefix(row, name, monkeypatch):
    stand_ins.install(monkeypatch, row)
    shape, options = _feature(name, dataclasses.replace(SHAPE, Hq=4, Hkv=2, S=21, P=40))
    if row == "cpu flash" and name == "kv_cache":
        options = {"causal": False}
    for dtype in (torch.float16, torch.bfloat16):
        _check(LONG.format(row), shape, options, dtype, torch.float32)


def test_what_a_long_prefix_cannot_have_is_refused(monkeypatch):
    stand_ins.install(monkeypatch, "flash")
    shape, options = _feature("bank")
    with pytest.raises(
        peftkern.BackendUnavailable, match=r"merge/flash/flash\+triton: this plan is not for such a call"
    ):
        peftkern.prefix_attention(**tensors(shape, torch.float16), **options, backend=LONG.format("flash"))


@pytest.mark.parametrize("backend", BOTH)
def test_a_kernel_that_refuses_at_run_time_hands_over_once_and_says_so(backend, monkeypatch):
    """cuDNN raises where it finds no plan for some sizes. The next kernel that can run the call takes over.

    A plain call goes to flash, one with a mask of the same sizes to a kernel that has masks.
    """
    stand_ins.install(monkeypatch, "cudnn")
    calls = []

    def refuse(*_):
        calls.append("cudnn")
        raise RuntimeError("No valid execution plans built.")

    refusing = dataclasses.replace(stand_ins.ROWS["cudnn"], forward=refuse, backward=refuse)
    table = [refusing, stand_ins.ROWS["flash"], stand_ins.ROWS["efficient"]]
    monkeypatch.setattr(torch_attention, "KERNELS", table)
    registry.forget()
    plan, shape = f"{backend}/cudnn/triton", dataclasses.replace(SHAPE, S=9)
    with pytest.warns(UserWarning, match=r"cudnn attention refuses .* flash runs it: No valid execution plans"):
        _check(plan, shape, {}, torch.float16)
    assert calls == ["cudnn"], "the kernel is asked again for a call that it has refused"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        _check(plan, *_feature("key_mask", shape), torch.float16)
        _check(plan, dataclasses.replace(shape, S=10), {}, torch.float16)
    monkeypatch.setattr(torch_attention, "KERNELS", [refusing])
    registry.forget()
    with pytest.raises(RuntimeError, match="No valid execution plans built"):
        _check(plan, dataclasses.replace(shape, S=11), {}, torch.float16)
    registry.forget()
