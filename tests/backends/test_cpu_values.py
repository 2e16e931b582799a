# SPDX-License-Identifier: Apache-2.0
"""Extreme values on every instruction set: large and infinite scores, saturated softcaps, denormals, NaN, no keys."""

from __future__ import annotations

import functools

import pytest
import torch

from peftkern import functional, native, reference
from peftkern.testing.bounds import check_backend, run
from peftkern.testing.cases import FEATURES, Shape, feature, tensors
from peftkern.testing.eager import eager_attention

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)
SHAPE = Shape(S=70, P=50, D=32)

pytestmark = pytest.mark.usefixtures("isa", "poisoned")


@pytest.fixture(autouse=True, params=native.cpu.available_isas())
def isa(monkeypatch, request):
    """Runs the backend's kernels on one instruction set."""
    for name in ("prefix_attention", "prefix_attention_backward"):
        monkeypatch.setattr(native.cpu, name, functools.partial(getattr(native.cpu, name), isa=request.param))
    return request.param


def _halves(shape: Shape, dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    """Multiples of 1/2: sums of their products have few bits, so scores are exact before softcap and softmax."""
    return {n: (x * 2).round() / 2 for n, x in tensors(shape, dtype, seed=seed).items()}


def _results(backend: str, inputs: dict[str, torch.Tensor], options: dict) -> dict[str, torch.Tensor]:
    """out, lse and the gradients of out's sum."""
    kernel = functools.partial(functional.prefix_attention, backend=backend, return_lse=True)
    dout = torch.ones(*inputs["q"].shape[:3], inputs["v"].shape[3], dtype=inputs["q"].dtype)
    got = run(kernel, inputs, options, dout, None)
    return {"out": got.out, "lse": got.lse, **{f"d{n}": x for n, x in got.gradients.items()}}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [{"softcap": 30.0, "scale": 16.0}, {"softcap": 50.0, "scale": 512.0}, {"softcap": 1.0, "scale": 1024.0},
     {"softcap": 30.0, "scale": 512.0, "sinks": torch.tensor([0.0, 30.0, -30.0, 300.0])},
     {"softcap": 1e4, "scale": 0.25}, {"softcap": 1e-3, "scale": 0.25}],
    ids=str,
)  # fmt: skip
def test_softcap(options, dtype):
    """From unsaturated to logits of 1e4 under a cap of 1. Gradients too: tanh's slope is 0 there and not nearly 0."""
    for seed in range(2):
        check_backend("cpu", _halves(SHAPE, dtype, seed), options, dlse=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{"scale": 1024.0}, {"scale": -1024.0}, {"scale": 2.0**-100},
     {"scale": 1024.0, "sinks": torch.tensor([0.0, 1e4, -1e4, 3e5])},
     {"scale": 512.0, "gate": torch.tensor([0.5, -20.0, 1e4, 0.0])}, {"scale": 1024.0, "window": 60}],
    ids=str,
)  # fmt: skip
def test_logits_of_1e4(options, dtype):
    check_backend("cpu", _halves(SHAPE, dtype), options, dlse=True)


@pytest.mark.parametrize("options", [{"scale": 1024.0}, {"scale": 1024.0, "softcap": 50.0}], ids=str)
def test_logits_beyond_fp16(options):
    """Where eager fp16 overflows, the bound has nothing to compare with: the reference computes in fp32."""
    inputs = _halves(SHAPE, torch.float16)
    got, expected = (_results(backend, inputs, options) for backend in ("cpu", "reference"))
    for name, value in expected.items():
        tolerance = 2 * torch.finfo(value.dtype).eps if value.dtype in HALF else 1e-5
        largest = value.abs().max().item()
        torch.testing.assert_close(
            got[name], value, atol=tolerance * largest, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_bias_of_1e4():
    """One fp32 rounding of such a score, 1e-3, is one of its weight: the limit that any order of adding has."""
    bias = (torch.randn(1, 4, 70, 70) * 1e4).round()
    inputs = _halves(SHAPE, torch.float32)
    out, lse = functional.prefix_attention(**inputs, bias=bias, backend="cpu", return_lse=True)
    doubles = {n: x.double() for n, x in inputs.items()}
    true, true_lse = reference.prefix_attention(**doubles, bias=bias.double())
    eps = torch.finfo(torch.float32).eps * bias.abs().max().item()
    torch.testing.assert_close(out.double(), true, atol=eps * inputs["v"].abs().max().item(), rtol=0)
    torch.testing.assert_close(lse.double(), true_lse, atol=eps, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [1.0, -1.0])
@pytest.mark.parametrize("name", ["k", "prefix_k", "bias"])
def test_infinite_scores(name, factor, dtype):
    """+inf is NaN for whoever sees it, as in the reference; -inf hides. In gradients as in outputs.

    The reference multiplies dense matrices, where a hidden key's weight of 0 times an infinite key is NaN. A row that
    does not see the key may have its value instead.
    """
    inputs, options = {n: x.clone() for n, x in tensors(SHAPE, dtype).items()}, {}
    if name == "bias":
        options["bias"] = torch.zeros(1, 1, 1, 70)
        options["bias"][..., 30] = factor * torch.inf
    else:
        inputs["q"].abs_()
        inputs[name][..., 30, :] = factor * torch.inf
    first = 0 if name == "prefix_k" else 30  # row that sees it
    got, expected = (_results(backend, inputs, options) for backend in ("cpu", "reference"))
    for name, value in expected.items():
        nan, rows = value.isnan(), slice(first if name == "dq" else 0, None)
        assert torch.equal(got[name][:, :, rows].isnan(), nan[:, :, rows]), (
            f"{name}: NaN elsewhere than the reference"
        )
        tolerance = 8 * torch.finfo(value.dtype).eps if value.dtype in HALF else 1e-3
        torch.testing.assert_close(
            got[name][~nan], value[~nan], atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["q", "k", "v", "prefix_k", "prefix_v"])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"gate": torch.ones(4)}], ids=["plain", "softcap", "gate"])
def test_nan_reaches_every_row_that_sees_it(options, name, dtype):
    """In out, and in the gradient of whatever that row has touched. Rows that do not see it may have values."""
    inputs = {n: x.clone() for n, x in tensors(SHAPE, dtype).items()}
    inputs[name][..., 30, 0] = torch.nan
    got = _results("cpu", inputs, options)
    first, last = 0 if name.startswith("prefix") else 30, 31 if name == "q" else 70
    assert got["out"][:, :, first:last].isnan().any(-1).all(), "out: NaN was lost"
    assert got["dq"][:, :, first:last].isnan().any(-1).all(), "dq: NaN was lost"
    # the gradient of the keys of every part whose softmax has met it; a gate gives the prefix a softmax of its own
    in_prefix, in_sequence = name.startswith("prefix"), name in ("k", "v")
    if not in_prefix or "gate" not in options:
        assert got["dk"][:, :, : first + 1].isnan().any(-1).all(), "dk: NaN was lost"
    if not in_sequence or "gate" not in options:
        assert got["dprefix_k"].isnan().any(), "dprefix_k: NaN was lost"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_denormals(dtype):
    """Values that are denormal stay so, but for the bf16 instructions, which take them for 0: 1.2e-38 at most."""
    smallest = torch.finfo(dtype).tiny
    inputs = tensors(SHAPE, dtype)
    inputs = {n: (x.double() * smallest / 8).to(dtype) if "v" in n else x for n, x in inputs.items()}
    assert (inputs["v"].abs() < smallest).all()
    got, expected = (_results(backend, inputs, {}) for backend in ("cpu", "reference"))
    for name in ("out", "lse", "dv", "dprefix_v"):
        value = expected[name]
        tolerance = 2 * torch.finfo(value.dtype).eps if value.dtype in HALF else 1e-5
        atol = tolerance * value.abs().max().item() + (smallest if dtype == torch.bfloat16 else 0.0)
        torch.testing.assert_close(got[name], value, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FEATURES)
def test_rows_that_see_nothing(name, dtype):
    """Under every feature: 0, and 0 in every gradient. A sink remains, and is then lse itself."""
    shape, options = feature(name, Shape(S=70, P=0, D=8))
    if shape.T is not None:
        shape = Shape(**{**vars(shape), "T": 90})
    options["key_mask"] = torch.zeros(shape.B, shape.kv_len, dtype=torch.bool)
    if "prefix_starts" in options:  # prefixes in k and v are not masked
        options["prefix_lens"].zero_()
    got = _results("cpu", tensors(shape, dtype), options)
    assert (got["out"] == 0).all()
    sinks = options.get("sinks", torch.full((shape.Hq,), -torch.inf))
    torch.testing.assert_close(got["lse"], sinks[:, None].expand_as(got["lse"]))
    for argument, value in got.items():
        assert not argument.startswith("d") or (value == 0).all(), f"{argument} is not zero"


# (B, Hq, Hkv, S, P, D): a short and a long prefix, grouped heads, more than one part, odd sizes
GRADIENT_SHAPES = [
    Shape(B=4, Hq=4, Hkv=4, S=256, P=32, D=64),
    Shape(B=2, Hq=9, Hkv=3, S=333, P=20, D=64),
    Shape(B=16, Hq=9, Hkv=3, S=31, P=20, D=64),
    Shape(B=1, Hq=8, Hkv=2, S=128, P=300, D=128),
    Shape(B=3, Hq=2, Hkv=1, S=63, P=7, D=80),
]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", GRADIENT_SHAPES, ids=str)
def test_prefix_gradients_are_within_5e_5_of_fp64(shape, dtype):
    """The inputs are what half precision made of them; from there on nothing is lost but fp32's rounding.

    Inputs, the prefix and dout are rounded to ``dtype``, then both sides see the same values. The error is that of
    the whole gradient, and that of the worst element relative to the largest one.
    """
    inputs = {n: x.float() if n.startswith("prefix") else x for n, x in tensors(shape, dtype).items()}
    dout = torch.randn(inputs["q"].shape).to(dtype)
    kernel = functools.partial(functional.prefix_attention, backend="cpu", return_lse=True)
    got = run(kernel, inputs, {}, dout, None)
    true = run(reference.prefix_attention, {n: x.double() for n, x in inputs.items()}, {}, dout.double(), None)
    for name in ("prefix_k", "prefix_v"):
        assert got.gradients[name].dtype == torch.float32
        error, value = got.gradients[name] - true.gradients[name], true.gradients[name]
        for norm in (2.0, torch.inf):
            relative = torch.linalg.vector_norm(error, norm) / torch.linalg.vector_norm(value, norm)
            assert relative < 5e-5, f"d{name}: {relative:.1e} in norm {norm}"


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_prefix_gradients_alone(dtype):
    """Where nobody needs dq, dk, dv (a model's first layer), the sequence's keys are not looked at again.

    delta = dout . out then comes from the out that was saved, which has ``dtype``'s rounding: dprefix_k is not right
    to 5e-5, but still several times closer than eager's.
    """
    shape = GRADIENT_SHAPES[0]
    inputs = {n: x.float() if n.startswith("prefix") else x for n, x in tensors(shape, dtype).items()}
    dout, names = torch.randn(inputs["q"].shape).to(dtype), ("prefix_k", "prefix_v")

    def gradients(attention, inputs):
        leaves = {n: x.detach().requires_grad_(n in names) for n, x in inputs.items()}
        out, _ = attention(**leaves)
        return torch.autograd.grad(out, [leaves[n] for n in names], dout.to(out.dtype))

    kernel = functools.partial(functional.prefix_attention, backend="cpu", return_lse=True)
    true = gradients(reference.prefix_attention, {n: x.double() for n, x in inputs.items()})
    eager = gradients(eager_attention, {n: x.to(dtype) for n, x in inputs.items()})
    (k_error, v_error), (k_eager, _) = (
        [((x - y).norm() / y.norm()).item() for x, y in zip(result, true, strict=True)]
        for result in (gradients(kernel, inputs), eager)
    )
    assert v_error < 5e-5
    assert k_error < k_eager / 4
