# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels against the reference: every feature, combinations, instruction sets, threads, bad values."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from peftkern import backends, functional, native
from peftkern.arguments import AttentionGradients
from peftkern.testing.bounds import check_backend, run
from peftkern.testing.cases import EMPTY, FEATURES, ODD, Shape, combination, feature, tensors

from ..isas import running_on

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)
ISAS = native.cpu.available_isas()


@pytest.fixture
def isa(request):
    """Runs the backend's kernels on one instruction set, and checks that they did."""
    with running_on(request.param) as asked:
        yield request.param
    assert set(asked) == {native.abi.ISAS[request.param]}, "native calls ran on other instruction sets, or none did"


# Several row blocks, tiles with a rest, a head dim that fills no vector, and more rows than one head has.
LARGE = {"S": 100, "P": 70, "D": 20, "Hq": 6, "Hkv": 2}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FEATURES)
def test_each_feature(name, dtype):
    shape, options = feature(name, Shape(**LARGE))
    if shape.T is not None:
        shape, options = Shape(**{**LARGE, "T": 150}), options
    check_backend("cpu", tensors(shape, dtype), options, dlse=True)


@pytest.mark.usefixtures("poisoned", "isa")
@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("seed", range(48))
def test_combinations(isa, seed):
    shape, options = combination(seed)
    dtype = DTYPES[seed % 3]
    prefix_dtype = torch.float32 if seed % 2 else dtype
    check_backend("cpu", tensors(shape, dtype, prefix_dtype, seed), options, dlse=seed % 4 < 2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(48, 250))
def test_more_combinations(seed):
    shape, options = combination(seed)
    check_backend("cpu", tensors(shape, DTYPES[seed % 3], None, seed), options, dlse=True)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("shape", ODD, ids=str)
def test_odd_shapes(isa, shape):
    for dtype in (torch.float32, torch.bfloat16):
        check_backend("cpu", tensors(shape, dtype), {})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_fp32_prefix_beside_half_precision(dtype):
    got = check_backend("cpu", tensors(Shape(**LARGE), dtype, torch.float32), {})
    assert got.gradients["prefix_k"].dtype == torch.float32


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_prefix_gradients_are_right_to_fp32(dtype):
    """They carry neither the rounding of out nor that of the weights: 5e-6 where bf16 has 4e-3."""
    from peftkern import reference

    shape = Shape(B=2, Hq=4, Hkv=2, S=130, P=30, D=64)
    inputs = {n: x.to(torch.float32) if n.startswith("prefix") else x for n, x in tensors(shape, dtype).items()}
    dout = torch.randn(2, 4, 130, 64).to(dtype)
    kernel = functools.partial(functional.prefix_attention, backend="cpu", return_lse=True)
    got = run(kernel, inputs, {}, dout, None)
    true = run(reference.prefix_attention, {n: x.double() for n, x in inputs.items()}, {}, dout.double(), None)
    for name in ("prefix_k", "prefix_v"):
        error = (got.gradients[name] - true.gradients[name]).norm() / true.gradients[name].norm()
        assert error < 5e-6, f"d{name} has relative error {error:.1e}"


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty(shape):
    options = {"causal": shape.kv_len >= shape.S}
    check_backend("cpu", tensors(shape, torch.float32), options, dlse=True)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.3, -1.0, 2.0, 0.0])], ids=["without sinks", "with sinks"])
def test_rows_that_see_nothing(sinks):
    options = {"key_mask": torch.tensor([[False] * 7, [True] * 7]), "sinks": sinks}
    shape = Shape(P=0)
    out, lse = functional.prefix_attention(**tensors(shape, torch.float32), **options, backend="cpu", return_lse=True)
    assert (out[0] == 0).all()
    expected = torch.full((4, 7), -torch.inf) if sinks is None else sinks[:, None].expand(4, 7)
    torch.testing.assert_close(lse[0], expected)
    check_backend("cpu", tensors(shape, torch.float32), options, dlse=sinks is not None)


# Work of several threads and parts: long rows of few heads, many short ones, packed, ragged banks.
THREADED = [
    (Shape(B=1, Hq=3, Hkv=1, S=700, P=40, D=16), {}),
    (Shape(B=6, Hq=2, Hkv=2, S=40, P=9, D=16), {}),
    (Shape(B=1, Hq=2, Hkv=1, S=300, P=50, D=16), {"cu_seqlens": torch.tensor([0, 7, 7, 250, 300])}),
    (
        Shape(B=6, Hq=2, Hkv=1, S=90, P=50, D=16, A=3),
        {"prefix_ids": torch.tensor([2, 0, -1, 2, 0, 0]), "prefix_lens": torch.tensor([50, 3, 17])},
    ),
    (
        Shape(B=3, Hq=4, Hkv=2, S=70, P=9, D=16),
        {"sinks": torch.randn(4), "gate": torch.randn(4), "prefix_bias": torch.randn(4, 9),
         "bias": torch.randn(1, 4, 70, 70), "dropout_p": 0.1, "dropout_seed": 3},
    ),
]  # fmt: skip


def _all_results(shape, options, dtype, threads):
    torch.set_num_threads(threads)
    kernel = functools.partial(functional.prefix_attention, backend="cpu", return_lse=True)
    generator = torch.Generator().manual_seed(1)
    inputs = tensors(shape, dtype, torch.float32)
    dout = torch.randn(inputs["q"].shape, generator=generator).to(dtype)
    got = run(kernel, inputs, options, dout, torch.randn(dout.shape[:3], generator=generator))
    return {"out": got.out, "lse": got.lse, **got.gradients}


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("case", range(len(THREADED)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_do_not_depend_on_threads_or_on_the_run(isa, case, dtype):
    shape, options = THREADED[case]
    first = _all_results(shape, options, dtype, 1)
    for threads in (1, 2, 3, 5):
        again = _all_results(shape, options, dtype, threads)
        for name, value in first.items():
            assert torch.equal(value, again[name]), f"{name} differs with {threads} threads"


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("threads", [1, 2])
def test_torch_beside_the_kernels_is_not_disturbed(isa, threads):
    """AMX tiles are configured per thread: by torch's libraries for theirs, by these kernels for their own."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(2)
    q, k, v = torch.randn(3, 2, 4, 300, 64, generator=generator).bfloat16()
    sizes = ((128, 256, 64), (77, 130, 33), (5, 96, 160), (1, 1000, 50))
    factors = [
        (torch.randn(m, n, generator=generator).bfloat16(), torch.randn(n, r, generator=generator).bfloat16())
        for m, n, r in sizes
    ]

    def theirs():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        attended = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True)
        return [a @ b for a, b in factors] + [attended, *torch.autograd.grad(attended, leaves, torch.ones_like(q))]

    def ours():
        return _all_results(Shape(B=2, Hq=4, Hkv=2, S=150, P=40, D=64), {}, torch.bfloat16, threads)

    their_first, our_first = theirs(), ours()
    for _ in range(3):
        for value, expected in zip(theirs(), their_first, strict=True):
            assert torch.equal(value, expected)
        for name, value in ours().items():
            assert torch.equal(value, our_first[name]), name


@pytest.mark.parametrize("case", range(len(THREADED)))
def test_split_work_is_right(case):
    shape, options = THREADED[case]
    torch.set_num_threads(2)
    check_backend("cpu", tensors(shape, torch.float32), options)


@pytest.mark.parametrize(
    "bias_shape", [s for s in itertools.product((1, 2), (1, 4), (1, 70), (1, 70)) if s != (1, 1, 1, 1)], ids=str
)
def test_the_gradient_of_a_bias_is_summed_over_what_it_was_broadcast_over(bias_shape):
    torch.set_num_threads(2)
    shape = Shape(B=2, Hq=4, Hkv=2, S=70, P=5, D=8)
    check_backend("cpu", tensors(shape, torch.float32), {"bias": torch.randn(bias_shape)})


def test_a_hiding_bias():
    bias = torch.zeros(1, 1, 7, 7).masked_fill(torch.rand(7, 7) < 0.5, -torch.inf)
    inputs = tensors(Shape(P=2), torch.float32)
    out = functional.prefix_attention(**inputs, bias=bias, backend="cpu")
    torch.testing.assert_close(out, functional.prefix_attention(**inputs, bias=bias, backend="reference"))


ONE_OF = [names for n in (1, 2, 5) for names in itertools.combinations(("q", "k", "v", "prefix_k", "prefix_v"), n)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("names", ONE_OF, ids="+".join)
@pytest.mark.parametrize("options", [{}, {"gate": torch.tensor([0.5, -0.3, 1.0, 0.1])}], ids=["joint", "gate"])
def test_only_what_is_needed(names, options):
    inputs = tensors(Shape(S=70, P=50), torch.float32)
    leaves = {n: x.detach().requires_grad_(n in names) for n, x in inputs.items()}
    dout = torch.randn(inputs["q"].shape)
    expected, got = (
        torch.autograd.grad(
            functional.prefix_attention(**leaves, **options, backend=backend), [leaves[n] for n in names], dout
        )
        for backend in ("reference", "cpu")
    )
    for name, e, g in zip(names, expected, got, strict=True):
        torch.testing.assert_close(g, e, atol=2e-5, rtol=1e-4, msg=lambda m, name=name: f"d{name}: {m}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["q", "k", "v", "prefix_k", "prefix_v"])
def test_nan_propagates_to_the_rows_that_see_it(name, dtype):
    inputs = {n: x.clone() for n, x in tensors(Shape(S=70, P=50), dtype).items()}
    inputs[name][..., 30, 0] = float("nan")
    out = functional.prefix_attention(**inputs, backend="cpu")
    expected = functional.prefix_attention(**inputs, backend="reference")
    first = 0 if name.startswith("prefix") else 30
    last = 31 if name == "q" else 70
    assert out[:, :, first:last].isnan().any(-1).all(), "NaN was lost"
    if name in ("q", "k"):
        assert torch.equal(out.isnan(), expected.isnan())
    leaves = {n: x.requires_grad_() for n, x in inputs.items()}
    functional.prefix_attention(**leaves, backend="cpu").sum().backward()


@pytest.mark.parametrize("factor", [1e4, 1e-30, -1e4])
def test_extreme_logits(factor):
    inputs = tensors(Shape(S=70, P=50), torch.float32, seed=1)
    check_backend("cpu", inputs, {"scale": factor})


def test_denormals():
    inputs = {n: x * 1e-39 for n, x in tensors(Shape(), torch.float32).items()}
    out = functional.prefix_attention(**inputs, backend="cpu")
    torch.testing.assert_close(out, functional.prefix_attention(**inputs, backend="reference"), atol=1e-44, rtol=1e-3)


def test_infinite_scores():
    inputs = {n: x.clone() for n, x in tensors(Shape(), torch.float32).items()}
    inputs["k"][0, 0, 2] = -torch.inf
    inputs["q"].abs_()
    out = functional.prefix_attention(**inputs, backend="cpu")
    torch.testing.assert_close(out, functional.prefix_attention(**inputs, backend="reference"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bank", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_embedding(dtype, bank, threads):
    torch.set_num_threads(threads)
    weight = torch.randn(11, 24).to(dtype)[:, :19]
    prompt = torch.randn(2, 3, 19) if bank else torch.randn(3, 19)
    options = {"prompt_ids": torch.tensor([1, 1, 0])} if bank else {}
    ids = torch.randint(11, (3, 10), dtype=torch.int32)[:, ::2]
    results = []
    for backend in ("cpu", "reference"):
        leaves = [weight.detach().requires_grad_(), prompt.detach().requires_grad_()]
        out = functional.soft_prompt_embedding(ids, *leaves, **options, backend=backend)
        results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out) * 0.37)])
    for name, got, expected in zip(("out", "dweight", "dprompt"), *results, strict=True):
        torch.testing.assert_close(got, expected, msg=lambda m, name=name: f"{name}: {m}")


def test_why_not_names_the_reason():
    def reasons(**changes):
        fp32, shape = torch.float32, (1, 2, 3, 64)
        fields = {"device": torch.device("cpu"), "dtype": fp32, "prefix_dtype": fp32, "q_shape": shape} | changes
        call = backends.Call("prefix_attention", kv_shape=shape, prefix_shape=shape[1:], **fields)
        return backends.explain(call).reasons["cpu"]

    assert reasons() == []
    assert "fp32, fp16 or bf16" in reasons(dtype=torch.float64)[0]
    assert "CPU tensors only" in reasons(device=torch.device("cuda"))[0]
    assert "above 256" in reasons(q_shape=(1, 2, 3, 512))[0]


def test_nothing_but_inputs_out_and_lse_is_saved():
    inputs = {n: x.requires_grad_() for n, x in tensors(Shape(S=64), torch.bfloat16).items()}
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out, lse = functional.prefix_attention(**inputs, backend="cpu", return_lse=True)
    pointers = {x.data_ptr() for x in (*inputs.values(), out, lse)}
    assert {x.data_ptr() for x in saved} <= pointers
    assert len(AttentionGradients._fields) == 9


# Few rows against many keys take a way of their own: chunks of keys, rows of all samples together.
DECODE = [
    (Shape(B=5, Hq=4, Hkv=2, S=1, P=1100, D=24, T=1050), {}),
    (Shape(B=3, Hq=4, Hkv=1, S=3, P=40, D=16, T=50), {"sinks": torch.randn(4), "softcap": 3.0}),
    (Shape(B=4, Hq=2, Hkv=2, S=1, P=60, D=16, T=70, A=3), {"prefix_ids": torch.tensor([2, -1, 0, 2]),
     "prefix_lens": torch.tensor([60, 5, 49]), "window": 75}),
    (Shape(B=2, Hq=2, Hkv=1, S=2, P=60, D=16, T=70), {"window": 65}),
    (Shape(B=20, Hq=8, Hkv=1, S=1, P=9, D=16, T=3), {"key_mask": torch.rand(20, 3) < 0.5,
     "prefix_bias": torch.randn(8, 9), "bias": torch.randn(20, 1, 1, 3)}),
]  # fmt: skip


@pytest.mark.usefixtures("poisoned", "isa")
@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("case", range(len(DECODE)))
def test_decode(isa, case):
    shape, options = DECODE[case]
    for dtype in (torch.float32, torch.bfloat16):
        check_backend("cpu", tensors(shape, dtype, torch.float32), options, backward=False)


@pytest.mark.parametrize("case", range(len(DECODE)))
def test_decode_does_not_depend_on_threads(case):
    shape, options = DECODE[case]
    outs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        outs.append(functional.prefix_attention(**tensors(shape, torch.bfloat16), **options, backend="cpu"))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])
