# SPDX-License-Identifier: Apache-2.0
"""Ops bypass torch's dispatcher only where nobody would notice: all who observe or transform a call still get it."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from peftkern import backends, dispatcher, functional, ops, prefix_attention
from peftkern.arguments import HINTS, AttentionArgs
from peftkern.testing.cases import Shape, tensors

NAMES = ["peftkern.prefix_attention.default", "peftkern.prefix_attention_backward.default"]


@pytest.fixture
def inputs():
    return {name: x.contiguous().requires_grad_() for name, x in tensors(Shape(), torch.float32).items()}


def _detached(inputs):
    return {name: x.detach() for name, x in inputs.items()}


def _train(inputs):
    return torch.autograd.grad(prefix_attention(**inputs).sum(), list(inputs.values()))


@pytest.fixture
def direct(monkeypatch):
    """Whether each op so far was called directly."""
    calls, is_needed = [], dispatcher.is_needed
    monkeypatch.setattr(dispatcher, "is_needed", lambda x: calls.append(not is_needed(x)) or not calls[-1])
    return calls


def test_a_plain_call_is_direct(inputs, direct):
    _train(inputs)
    prefix_attention(**_detached(inputs))
    with torch.no_grad():
        prefix_attention(**{name: torch.nn.Parameter(x) for name, x in _detached(inputs).items()})
    with torch.inference_mode():
        prefix_attention(**{name: x.clone() for name, x in inputs.items()})
    with torch.autocast("cpu", torch.bfloat16):
        _train(inputs)
    assert direct == [True] * 7


@pytest.mark.parametrize("kind", ["dispatch", "function"])
def test_modes_see_the_ops(kind, inputs):
    seen = []

    class DispatchMode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    class FunctionMode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    for _ in range(2):  # the second call finds its plan in the cache
        seen.clear()
        with DispatchMode() if kind == "dispatch" else FunctionMode():
            _train(inputs)
        assert [name for name in seen if name in NAMES] == (NAMES if kind == "dispatch" else NAMES[:1])
    assert not any("new_empty" in name for name in seen), "what a kernel allocates is not the observer's business"


@pytest.mark.parametrize("profiler", [torch.profiler.profile, torch.autograd.profiler.profile])
def test_profilers_see_the_ops(profiler, inputs):
    with profiler() as profile:
        _train(inputs)
    seen = {event.key for event in profile.key_averages()}
    assert seen >= {"peftkern::prefix_attention", "peftkern::prefix_attention_backward"}


def test_tracers_see_the_ops(inputs):
    plain = tuple(_detached(inputs).values())
    assert "peftkern.prefix_attention" in str(make_fx(lambda *x: prefix_attention(*x))(*plain).graph)
    traced = torch.jit.trace(lambda *x: prefix_attention(*x), plain, check_trace=False)
    assert "peftkern::prefix_attention" in str(traced.graph)


def test_transforms_are_applied(inputs):
    plain = _detached(inputs)
    stacked = torch.stack([plain["q"], 2 * plain["q"]])
    batched = torch.vmap(lambda q: prefix_attention(**plain | {"q": q}))(stacked)
    torch.testing.assert_close(batched[1], prefix_attention(**plain | {"q": 2 * plain["q"]}))
    functional = torch.func.functionalize(lambda q: prefix_attention(**plain | {"q": q}))(plain["q"])
    assert torch.equal(functional, prefix_attention(**plain))
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda q: prefix_attention(**plain | {"q": q}).sum())(plain["q"])


class _Tagged(torch.Tensor):
    """A subclass whose operators return it."""


@pytest.mark.parametrize(
    "special",
    [
        lambda x: (-x)._neg_view(),
        lambda x: x.as_subclass(_Tagged),
        torch._to_functional_tensor,
        lambda x: x.to("meta"),
    ],
    ids=["lazy negation", "subclass", "functional", "meta"],
)
def test_special_tensors_go_through_the_dispatcher(special, inputs, direct):
    plain = _detached(inputs)
    want = prefix_attention(**plain)
    for name in ("q", "prefix_v"):
        given = {n: special(x) if n == name or special(x).is_meta else x for n, x in plain.items()}
        out = prefix_attention(**given)
        if torch._is_functional_tensor(out):
            out = torch._from_functional_tensor(out)
        assert out.is_meta or torch.equal(out.as_subclass(torch.Tensor), want)
        assert type(out) is type(special(want))
    assert direct == [True, False, False]


def test_special_gradients_go_through_the_dispatcher(inputs, direct):
    dout = torch.randn(2, 4, 7, 8)
    out = prefix_attention(**inputs)
    want = torch.autograd.grad(out, list(inputs.values()), dout, retain_graph=True)
    got = torch.autograd.grad(out, list(inputs.values()), (-dout)._neg_view())
    assert all(map(torch.equal, got, want))
    assert direct == [True, True, False]


def test_fake_tensors_stay_fake(inputs):
    plain = _detached(inputs)
    prefix_attention(**plain)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(x) for name, x in plain.items()}
        out = prefix_attention(**fake)
    assert isinstance(out, torch._subclasses.FakeTensor)
    assert out.stride() == prefix_attention(**plain).stride()
    assert isinstance(prefix_attention(**fake), torch._subclasses.FakeTensor), "outside of the mode"


def test_checkpointing_recomputes_the_op(inputs):
    want = _train(inputs)
    out = torch.utils.checkpoint.checkpoint(lambda: prefix_attention(**inputs), use_reentrant=False)
    got = torch.autograd.grad(out.sum(), list(inputs.values()))
    assert all(map(torch.equal, got, want))


def test_saved_tensors_may_come_back_with_other_strides(inputs):
    """As :class:`torch.autograd.graph.save_on_cpu` makes them."""
    dout = torch.randn(2, 4, 7, 8)
    inputs = {n: x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for n, x in inputs.items()}
    want = torch.autograd.grad(prefix_attention(**inputs), list(inputs.values()), dout)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: x.clone(memory_format=torch.contiguous_format), lambda x: x
    ):
        out = prefix_attention(**inputs)
    got = torch.autograd.grad(out, list(inputs.values()), dout)
    assert all(map(torch.equal, got, want))


def test_a_call_depends_on_strides_and_threads(inputs):
    """Equal sizes, and a plan that was bound to another layout."""
    plain = _detached(inputs)
    want = prefix_attention(**plain)
    for name, x in plain.items():
        strided = torch.cat([x, x], -1)[..., : x.shape[-1]]
        assert torch.equal(prefix_attention(**plain | {name: strided}), want)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert torch.equal(prefix_attention(**plain), want)
    torch.set_num_threads(threads)


def _padded(x):
    """A copy with gaps between the rows."""
    return torch.cat([x, x], -1)[..., : x.shape[-1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_backward_depends_on_strides_and_needs(inputs, dtype):
    """A backward prepared for another one of equal sizes would read and write elsewhere."""
    options = {
        "bias": torch.randn(2, 1, 7, 7), "prefix_bias": torch.randn(4, 5), "key_mask": torch.rand(2, 7) < 0.7,
    }  # fmt: skip
    inputs = {n: x.detach().to(dtype).requires_grad_() for n, x in inputs.items()}
    leaves = inputs | {n: x.requires_grad_() for n, x in options.items() if n != "key_mask"}
    names = [name for name in AttentionArgs._fields if name not in HINTS]
    given = AttentionArgs(
        **dict.fromkeys(names) | {"causal": True, "prefix_in_window": True, "dropout_p": 0.0} | leaves | options
    )
    args, plan, _ = functional.prepare(given, None, "cpu")
    out, lse = ops.attention(args, plan)
    call = {
        "dout": torch.randn(2, 7, 4, 8, dtype=dtype).transpose(1, 2),
        "dlse": torch.randn(lse.shape),
        "out": out,
        "lse": lse,
    }
    everything = [True] * 5 + [False, True, True, False]

    def check(call, args, needs):
        got, want = (
            p.prefix_attention_backward(*call.values(), args, needs)
            for p in (plan, backends.registry.plan_named("cpu"))
        )
        for a, b, need in zip(got, want, needs, strict=True):
            assert (a.numel() > 0) == (b.numel() > 0) == need
            assert not need or ((a.stride(), a.dtype) == (b.stride(), b.dtype) and torch.equal(a, b))

    for _ in range(2):  # the second one finds all prepared
        check(call, args, everything)
    for name, x in call.items():
        check(call | {name: _padded(x)}, args, everything)
        check(call, args, everything)
    check(call | {"dlse": None}, args, everything)
    for name in ("q", "k", "v", "prefix_k", "prefix_v", "bias", "prefix_bias", "key_mask"):
        check(call, args, everything)
        check(call, args._replace(**{name: _padded(getattr(args, name))}), everything)
    for i, _ in enumerate(everything):
        check(call, args, [need and i != j for j, need in enumerate(everything)])
    only_prefix = [3 <= i <= 4 for i in range(9)]  # reads out
    check(call, args, only_prefix)
    check(call | {"out": _padded(out)}, args, only_prefix)


def test_without_torch_s_private_names_every_call_is_dispatched():
    script = """
        import torch
        del torch._C._dispatch_tls_local_include_set
        import peftkern
        from peftkern import dispatcher
        q, prefix = torch.randn(1, 2, 3, 8), torch.randn(2, 4, 8)
        assert dispatcher.is_needed((q,))
        assert peftkern.prefix_attention(q, q, q, prefix, prefix).isfinite().all()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)


@pytest.mark.parametrize("backend", backends.available_backends())
def test_both_ways_return_the_same(backend, inputs, monkeypatch):
    direct = _train(inputs)
    monkeypatch.setattr(dispatcher, "is_needed", lambda _: True)
    dispatched = _train(inputs)
    assert all(map(torch.equal, direct, dispatched))
    assert [g.stride() for g in direct] == [g.stride() for g in dispatched]


def test_outputs_of_the_op_are_distinct(inputs):
    args = (*_detached(inputs).values(), *[None] * 10, 0.25, True, None, True, 0.0, 0.0, None, None, None)
    out, lse = ops.prefix_attention(*args, "cpu")
    gradients = ops.prefix_attention_backward(out, None, out, lse, *args, [True, *[False] * 8], "cpu")
    assert len({id(g) for g in gradients}) == len(gradients)
