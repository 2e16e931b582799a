# SPDX-License-Identifier: Apache-2.0
"""The error bound leaves room for correct results in any order of summation, and finds planted faults."""

from __future__ import annotations

import contextlib
import functools
import math

import pytest
import torch
from torch import Tensor

from peftkern import functional, native
from peftkern import reference as specification
from peftkern.backends import plan_named
from peftkern.testing.bounds import ROUNDINGS, check_backend, exact_attention, ratios, run
from peftkern.testing.cases import FEATURES, Shape, feature, tensors
from peftkern.testing.eager import eager_attention
from peftkern.testing.error_analysis import deviations
from peftkern.testing.rounding import DEFAULT_ROUNDINGS

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)
LARGE = {"S": 100, "P": 70, "D": 20, "Hq": 6, "Hkv": 2}
ROOM = 2 / 3  # the part of the bound that correct results may take; they take half
#: The loosest of all backends, except for the prefix's gradients of ``concat``, which are sums of rounded ones.
LOOSEST = ROUNDINGS["merge"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ["reference", *native.cpu.available_isas()])
def test_right_results_have_room(isa, dtype, monkeypatch):
    """Every feature, on the reference and on every instruction set of the CPU backend."""
    if isa != "reference":
        for name in ("prefix_attention", "prefix_attention_backward"):
            monkeypatch.setattr(native.cpu, name, functools.partial(getattr(native.cpu, name), isa=isa))
    backend = "reference" if isa == "reference" else "cpu"
    kernel = functools.partial(functional.prefix_attention, backend=backend, return_lse=True)
    for name in FEATURES:
        shape, options = feature(name, Shape(**LARGE))
        if shape.T is not None:
            shape = Shape(**{**LARGE, "T": 150})
        _, errors = ratios(kernel, tensors(shape, dtype), options, dlse=True, roundings=ROUNDINGS[backend])
        for one in errors.values():
            assert one.worst <= ROOM, f"{name}: {one.message}"


def _sequential(a: Tensor, b: Tensor) -> Tensor:
    total = a.new_zeros(())
    for i in range(a.shape[-1]):
        total = total + a[..., i : i + 1] * b[..., i : i + 1, :]
    return total


def _fused(a: Tensor, b: Tensor) -> Tensor:
    """One term after the other, without rounding the products, which fp64 holds exactly."""
    total = a.new_zeros(())
    for i in range(a.shape[-1]):
        total = (total.double() + a[..., i : i + 1].double() * b[..., i : i + 1, :].double()).float()
    return total


def _pairwise(a: Tensor, b: Tensor) -> Tensor:
    middle = a.shape[-1] // 2
    if middle == 0:
        return a * b
    return _pairwise(a[..., :middle], b[..., :middle, :]) + _pairwise(a[..., middle:], b[..., middle:, :])


ORDERS = {
    "sequential": _sequential,
    "reversed": lambda a, b: _sequential(a.flip(-1), b.flip(-2)),
    "pairwise": _pairwise,
    "fused": _fused,
    "the library's": torch.matmul,
}


class _Product(torch.autograd.Function):
    """A matrix product with a given order of its sums, forward and backward."""

    @staticmethod
    def forward(ctx, a, b, order):
        ctx.save_for_backward(a, b)
        ctx.order = order
        return order(a, b)

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        return ctx.order(grad, b.mT), ctx.order(a.mT, grad), None


def _plain_attention(order, q, k, v, prefix_k, prefix_v, *, scale=None, constant_lse=False):
    """(out, lse) of causal attention [B, Hq, S, D] with a prefix; scores are fp32, out is in q's dtype."""
    group, (batch, _, q_len, head_dim) = q.shape[1] // k.shape[1], q.shape
    keys, values = (
        torch.cat([prefix.expand(batch, -1, -1, -1), x], 2).repeat_interleave(group, 1).float()
        for prefix, x in ((prefix_k.to(k.dtype), k), (prefix_v.to(v.dtype), v))
    )
    scores = _Product.apply(q.float(), keys.mT, order) * (head_dim**-0.5 if scale is None else scale)
    hidden = torch.ones(q_len, keys.shape[2], dtype=torch.bool).triu(keys.shape[2] - q_len + 1)
    scores = scores.masked_fill(hidden, -torch.inf)
    pivot = scores.detach().amax(-1, keepdim=True)
    weights = torch.exp(scores - pivot)
    total = _Product.apply(weights, torch.ones(weights.shape[-1], 1).expand(*weights.shape[:2], -1, -1), order)
    if constant_lse:
        total = total.detach()
    return _Product.apply(weights / total, values, order).to(q.dtype), (total.log() + pivot).squeeze(-1)


@pytest.mark.parametrize("scale", [None, -0.5, 3.0])
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_right_sums_pass_in_any_order(order, scale):
    """The bound is the same for all orders: it depends on the tensors and not on one library's sums."""
    options = {} if scale is None else {"scale": scale}
    attention = functools.partial(_plain_attention, order)
    _, errors = ratios(
        attention, tensors(Shape(S=60, P=30, D=64), torch.float32), options, roundings=ROUNDINGS["cpu"]
    )
    for one in errors.values():
        assert one.worst <= ROOM, one.message


@pytest.mark.parametrize("roundings", [DEFAULT_ROUNDINGS, ROUNDINGS["cpu"]], ids=["the default", "cpu"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", FEATURES)
def test_deviations_are_not_much_larger_than_eagers_errors(name, dtype, roundings):
    """At most twice as large forward, three times backward, and no larger for prefix gradients that stay in fp32."""
    shape, options = feature(name, Shape(S=40, P=20, D=16))
    given = tensors(shape, dtype)
    # with a prefix in fp64, sums over rows are exact; sums in fp32 nearly are
    exact_sums = {n: x.double() if n.startswith("prefix") else x for n, x in given.items()}
    doubles = {n: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in options.items()}
    dout = torch.randn(*given["q"].shape[:3], shape.value_dim).to(dtype)
    true = run(exact_attention, {n: x.double() for n, x in given.items()}, doubles, dout, None)
    eager = run(eager_attention, exact_sums, doubles, dout, None)
    allowed = deviations(given, options, dout, roundings=roundings)
    values = {"out": (eager.out, true.out), "lse": (eager.lse, true.lse)}
    values |= {f"d{n}": (x, true.gradients[n]) for n, x in eager.gradients.items()}
    for quantity, (got, expected) in values.items():
        if not got.numel():  # a bank without prefixes
            continue
        error, deviation = (x.double().square().mean().sqrt() for x in (got - expected, allowed[quantity]))
        factor = 3 if quantity.startswith("d") else 2
        if quantity.startswith("dprefix") and not roundings.prefix_terms:
            factor = 1
        assert deviation <= factor * error, f"{quantity}: {deviation:.1e}, eager's error {error:.1e}"


def _in_bf16(x: Tensor) -> Tensor:
    return x + (x.bfloat16().to(x.dtype) - x).detach()


def _by_sample(combine):
    """The reference, with ``combine`` in place of the sum of the samples' prefix gradients [B, Hkv, P, D]."""

    class Copies(torch.autograd.Function):
        @staticmethod
        def forward(ctx, prefix, batch):
            ctx.dtype = prefix.dtype
            return prefix.float().expand(batch, -1, -1, -1)

        @staticmethod
        def backward(ctx, grad):
            return combine(grad).to(ctx.dtype), None

    def attention(**inputs):
        batch = inputs["q"].shape[0]
        copies = {n: Copies.apply(inputs[n], batch) for n in ("prefix_k", "prefix_v")}
        return specification.prefix_attention(**inputs | copies, prefix_ids=torch.arange(batch))

    return attention


def _accumulated_in_bf16(grad: Tensor) -> Tensor:
    total = torch.zeros_like(grad[0], dtype=torch.bfloat16)
    for x in grad:
        total = (total.float() + x).bfloat16()
    return total.float()


def _with(**changes):
    """The reference with other options, each a function of the inputs."""

    def attention(**inputs):
        return specification.prefix_attention(**inputs | {n: change(inputs) for n, change in changes.items()})

    return attention


def _rounded(name: str):
    """The reference with one result rounded to bf16."""

    def attention(**inputs):
        results = dict(zip(("out", "lse"), specification.prefix_attention(**inputs), strict=True))
        return tuple(_in_bf16(x) if n == name else x for n, x in results.items())

    return attention


def _hiding(key: int):
    return lambda inputs: (torch.arange(inputs["k"].shape[2]) != key).expand(inputs["k"].shape[0], -1)


def _twice(key: int):
    """A bias of ln 2 counts a key twice."""
    return lambda inputs: math.log(2) * (torch.arange(inputs["k"].shape[2]) == key).float()[None, None, None]


def _lost_prefix_key(**inputs):
    shorter = {n: inputs[n][..., :-1, :] for n in ("prefix_k", "prefix_v")}
    return specification.prefix_attention(**inputs | shorter)


SINKS = torch.tensor([0.5, 1.0, -0.5, 0.0])
ROW_SUMS = Shape(B=32, S=8)
#: attention with the fault, options, result that must exceed the bound, dtypes, shape
PLANTED = {
    "a lost key": (_with(key_mask=_hiding(3)), {}, "out", DTYPES, None),
    "a lost key of the prefix": (_lost_prefix_key, {}, "out", DTYPES, None),
    "a key seen twice": (_with(bias=_twice(3)), {}, "out", DTYPES, None),
    "a row that sees its future": (_with(causal=lambda _: False), {}, "out", DTYPES, None),
    "a scale of 1 % more": (_with(scale=lambda i: 1.01 * i["q"].shape[-1] ** -0.5), {}, "out", DTYPES, None),
    "a scale applied twice": (_with(scale=lambda i: 1 / i["q"].shape[-1]), {}, "out", DTYPES, None),
    "a window one longer": (_with(window=lambda _: 10), {"window": 9}, "out", DTYPES, None),
    "a window one shorter": (_with(window=lambda _: 8), {"window": 9}, "out", DTYPES, None),
    "a head's sink missing": (
        _with(sinks=lambda i: i["sinks"].index_fill(0, torch.tensor(1), -torch.inf)), {"sinks": SINKS}, "out", DTYPES,
        None,
    ),
    "out in bf16": (_rounded("out"), {}, "out", (torch.float32, torch.float16), None),
    "lse in bf16": (_rounded("lse"), {}, "lse", DTYPES, None),
    "scores in half precision": (eager_attention, {}, "lse", HALF, None),
    "scores in bf16": (
        _with(q=lambda i: _in_bf16(i["q"]), k=lambda i: _in_bf16(i["k"])), {}, "lse", (torch.float32,), None),
    "no delta": (functools.partial(_plain_attention, torch.matmul, constant_lse=True), {}, "dq", DTYPES, None),
    "a sample's gradient missing": (_by_sample(lambda grad: grad[:-1].sum(0)), {}, "dprefix_v", DTYPES, ROW_SUMS),
    "gradients accumulated in bf16": (_by_sample(_accumulated_in_bf16), {}, "dprefix_v", DTYPES, ROW_SUMS),
}  # fmt: skip
CASES = [pytest.param(n, d, id=f"{n}-{str(d)[6:]}") for n, (_, _, _, dtypes, _) in PLANTED.items() for d in dtypes]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_planted_fault_is_found(name, dtype):
    """Even by the loosest bound of a backend. The same inputs pass without the fault."""
    attention, options, quantity, _, shape = PLANTED[name]
    given = tensors(shape or Shape(S=30, P=6, D=16), dtype, torch.float32)
    _, right = ratios(exact_attention, given, options, roundings=LOOSEST)
    for one in right.values():
        assert one.worst <= ROOM, one.message
    _, errors = ratios(attention, given, options, roundings=LOOSEST)
    assert errors[quantity].worst > 1, f"passes: {errors[quantity].message}"


def _more(field, factor):
    def fault(gradients):
        return gradients._replace(**{field: getattr(gradients, field) * factor})

    return fault


FAULTS = {
    "dq of 3 % more": _more("dq", 1.03),
    "dprefix_v of 1 % more": _more("dprefix_v", 1.01),
    "dk and dv exchanged": lambda g: g._replace(dk=g.dv, dv=g.dk),
    "last prefix row dropped": lambda g: g._replace(dprefix_k=g.dprefix_k.index_fill(1, torch.tensor([4]), 0.0)),
    "one element of dv is NaN": lambda g: g._replace(dv=g.dv.masked_fill(g.dv == g.dv.max(), torch.nan)),
    "one element of dk is that of its neighbour": lambda g: g._replace(
        dk=g.dk.masked_scatter(_first(g.dk), g.dk[0, 0, 0, 1:2])
    ),
}


def _first(x: Tensor) -> Tensor:
    return (torch.arange(x.numel()) == 0).view(x.shape)


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_gradient_is_caught(fault, dtype, monkeypatch):
    reference = plan_named("reference")
    backward = reference.prefix_attention_backward
    monkeypatch.setattr(reference, "prefix_attention_backward", lambda *args: fault(backward(*args)))
    with pytest.raises(AssertionError, match="exceeds"):
        check_backend("reference", tensors(Shape(B=4, S=40), dtype, prefix_dtype=torch.float32), {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_output_is_caught(dtype, monkeypatch):
    reference = plan_named("reference")
    forward = reference.prefix_attention

    def last_query_sees_one_key_less(args):
        out, lse = forward(args)
        short, _ = forward(args._replace(k=args.k[:, :, :-1], v=args.v[:, :, :-1], q=args.q[:, :, :-1]))
        out[:, :, -1] = short[:, :, -1]
        return out, lse

    monkeypatch.setattr(reference, "prefix_attention", last_query_sees_one_key_less)
    with pytest.raises(AssertionError, match="out: error"):
        check_backend("reference", tensors(Shape(), dtype), {}, backward=False)


@pytest.mark.parametrize(("roundings", "caught"), [(1.0, False), (20.0, True)])
def test_where_gradients_cancel_a_rounding_of_delta_passes_and_twenty_do_not(roundings, caught, monkeypatch):
    """Every query sees one key, so the exact dq is 0, and dq shows an error of delta = rowsum(out * dout)."""
    reference = plan_named("reference")
    backward = reference.prefix_attention_backward

    def rounded(dout, dlse, out, lse, args, needs):
        gradients = backward(dout, dlse, out, lse, args, needs)
        delta = torch.finfo(torch.float32).eps * (out * dout).abs().sum(-1, keepdim=True)
        keys = args.k.repeat_interleave(args.q.shape[1] // args.k.shape[1], 1)
        return gradients._replace(dq=gradients.dq - roundings * delta * args.scale * keys)

    monkeypatch.setattr(reference, "prefix_attention_backward", rounded)
    with pytest.raises(AssertionError, match="dq: error") if caught else contextlib.nullcontext():
        check_backend("reference", tensors(Shape(S=1, P=0), torch.float32), {})
