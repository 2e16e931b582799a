# SPDX-License-Identifier: Apache-2.0
"""The registered ops as the compiler sees them: schemas, fakes, one graph, no recompilation."""

from __future__ import annotations

import inspect
import subprocess
import sys
import textwrap

import pytest
import torch
import torch._dynamo

import peftkern
from peftkern import backends, ops, validation
from peftkern.arguments import AttentionArgs, AttentionGradients
from peftkern.testing.cases import FEATURES, Shape, feature, tensors

from .cover import product

NUM_GRADIENTS = len(AttentionGradients._fields)


def _args(name):
    shape, options = feature(name, Shape())
    given = inspect.signature(peftkern.prefix_attention).bind(**tensors(shape, torch.float32), **options)
    given.apply_defaults()
    inputs = AttentionArgs(**{name: given.arguments[name] for name in AttentionArgs._fields})
    return validation.validate_attention(inputs._replace(dropout_seed=None), inputs.dropout_seed)


def test_schema_and_arguments_have_one_order():
    for op, before in ((ops.prefix_attention, 0), (ops.prefix_attention_backward, 4)):
        names = [argument.name for argument in op._schema.arguments][before:]
        assert names[: len(AttentionArgs._fields)] == list(AttentionArgs._fields)
    returns = [r.name for r in ops.prefix_attention_backward._schema.returns]
    assert returns == list(AttentionGradients._fields)
    assert [f"d{name}" for name in AttentionArgs._fields[:NUM_GRADIENTS]] == returns


@pytest.mark.parametrize(
    ("name", "backend", "op"),
    product(FEATURES, backends.available_backends(), ("forward", "backward", "backward of the prefix")),
)
def test_opcheck_attention(name, backend, op):
    """Inputs are cut out of larger, permuted tensors: the fake's strides must be the kernel's."""
    args = _args(name)
    if op == "forward":
        torch.library.opcheck(ops.prefix_attention, (*args, backend))
        return
    out, lse = ops.prefix_attention(*args, backend)
    needs = [x is not None and (op == "backward" or i in (3, 4)) for i, x in enumerate(args[:NUM_GRADIENTS])]
    backward = (torch.randn_like(out), None, out, lse, *args, needs, backend)
    torch.library.opcheck(ops.prefix_attention_backward, backward)


@pytest.mark.parametrize("backend", backends.available_backends())
@pytest.mark.parametrize("bank", [False, True], ids=["shared", "bank"])
def test_opcheck_embedding(backend, bank):
    ids, weight = torch.randint(0, 9, (2, 5)), torch.randn(8, 9).t()
    prompt = torch.randn(3, 4, 8) if bank else torch.randn(4, 8)
    args = (ids, weight.contiguous(), prompt, torch.tensor([2, 0]) if bank else None)
    torch.library.opcheck(ops.soft_prompt_embedding, (*args, backend))
    dout = torch.randn(2, 9, 8)
    for needs in ([True, True], [False, True]):
        torch.library.opcheck(ops.soft_prompt_embedding_backward, (dout, *args, needs, backend))


@pytest.mark.parametrize(
    ("backend", "name"),
    product(backends.available_backends(), [n for n in FEATURES if n != "dropout"], strength=1),
)
def test_compiles_to_one_graph(name, backend):
    shape, options = feature(name, Shape())
    inputs = {n: x.requires_grad_() for n, x in tensors(shape, torch.float32).items()}

    def attention(**leaves):
        return peftkern.prefix_attention(**leaves, **options, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    dout = torch.randn(shape.B, shape.Hq, shape.S, shape.value_dim)
    got, want = (torch.autograd.grad(f(**inputs), list(inputs.values()), dout) for f in (compiled, attention))
    for n, a, b in zip(inputs, got, want, strict=True):
        assert torch.equal(a, b), f"d{n} differs when compiled"


def test_compiles_once_for_every_length():
    torch._dynamo.reset()
    compiled = torch.compile(peftkern.prefix_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for S, P in ((7, 5), (9, 5), (33, 6), (12, 8)):
            inputs = {n: x.contiguous() for n, x in tensors(Shape(S=S, P=P), torch.float32).items()}
            torch.testing.assert_close(compiled(**inputs), peftkern.prefix_attention(**inputs))


def test_compiled_dropout_draws_anew_each_call():
    torch._dynamo.reset()
    inputs = tensors(Shape(), torch.float32)
    compiled = torch.compile(
        lambda: peftkern.prefix_attention(**inputs, dropout_p=0.5), fullgraph=True, backend="aot_eager"
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert not torch.equal(compiled(), compiled())


def test_the_first_call_ever_may_be_compiled():
    """Tracing must not depend on anything that an eager call has set up before."""
    script = """
        import torch, peftkern
        q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
        prefix = torch.randn(2, 2, 5, 8, requires_grad=True)
        compiled = torch.compile(peftkern.prefix_attention, fullgraph=True, backend="aot_eager")
        compiled(q, k, v, *prefix).sum().backward()
        assert prefix.grad.isfinite().all()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)
