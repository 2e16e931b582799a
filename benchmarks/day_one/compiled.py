# SPDX-License-Identifier: Apache-2.0
"""Calls inside of torch's machinery: opcheck, torch.compile, CUDA graphs; an item per plan."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import peftkern
from peftkern import backends, ops
from peftkern.arguments import AttentionArgs, attention_call
from peftkern.tools.bench.shapes import Shape
from peftkern.validation import validate_attention

from . import plans
from .context import Context, Finding, Items, LeftOut


def _names(context: Context, dtype: torch.dtype) -> list[str]:
    return plans.names(plans.plain_call(context.device, dtype))


def _one_per_backend(names: list[str]) -> list[str]:
    """The first plan of each backend. To the compiler, plans differ in their names only."""
    return list({name.split("/")[0]: name for name in reversed(names)}.values())[::-1]


def inputs_of(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, prefix_k, prefix_v for sizes (B, Hq, Hkv, S, T, D, P); q, k and v are [B, S, H, D] in memory."""
    batch, heads, kv_heads, queries, keys, dim, prefix = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    qkv = [draw(batch, n, h, dim).transpose(1, 2) for n, h in ((queries, heads), (keys, kv_heads), (keys, kv_heads))]
    return [*qkv, draw(kv_heads, prefix, dim), draw(kv_heads, prefix, dim)]


def opcheck(context: Context) -> Items:
    """`torch.library.opcheck` of the ops, with a plan of each backend."""
    names = _one_per_backend(_names(context, torch.float16))
    return {name: functools.partial(_opcheck, context, name) for name in names}


def _opcheck(context: Context, name: str) -> Finding:
    inputs = inputs_of((2, 4, 2, 17, 17, 64, 7), context.device, torch.float16)
    given: dict[str, Any] = dict.fromkeys(AttentionArgs._fields)
    given |= dict(zip(AttentionArgs._fields, inputs, strict=False))
    args = AttentionArgs(**given | {"causal": True, "prefix_in_window": True, "dropout_p": 0.0})
    args = validate_attention(args, None)
    plan = backends.resolve(attention_call(args, needs_grad=True), name)
    torch.library.opcheck(ops.prefix_attention, (*args, plan))
    out, lse = ops.prefix_attention(*args, plan)
    needs = [x is not None for x in args.differentiable]
    torch.library.opcheck(ops.prefix_attention_backward, (out, None, out, lse, *args, needs, plan))
    return Finding("forward and backward")


def compiled(context: Context) -> Items:
    """One graph for static and for dynamic sizes, compared with eager calls, with a plan of each backend."""
    names = ["auto", *([] if context.dry_run else _one_per_backend(_names(context, torch.bfloat16)))]
    return {name: functools.partial(_compiled, context, name) for name in names}


def _compiled(context: Context, name: str) -> Finding:
    compiler = "aot_eager" if context.dry_run else "inductor"
    torch._dynamo.reset()

    def attention(*inputs: Tensor) -> Tensor:
        return peftkern.prefix_attention(*inputs, backend=name) * 2

    graph = torch.compile(attention, fullgraph=True, backend=compiler, dynamic=None)
    for length in (32, 48, 80):
        inputs = inputs_of((2, 4, 2, length, length, 64, 7), context.device, torch.bfloat16)
        leaves = [x.requires_grad_() for x in inputs]
        for got, true in zip(_gradients(graph, leaves), _gradients(attention, leaves), strict=True):
            torch.testing.assert_close(got, true, rtol=5e-2, atol=5e-2)
    return Finding(f"one graph, forward and backward, {compiler}")


def _gradients(attention: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    out = attention(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out))]


def cuda_graph(context: Context) -> Items:
    """Capture a CUDA graph, replay it on other values, and compare it with eager calls."""
    items: Items = {}
    for title, shape in (
        ("training", Shape(B=2, Hq=8, Hkv=2, S=128, D=64, P=32)),
        ("decoding", Shape(B=4, Hq=8, Hkv=2, S=1, D=64, P=512, cached=2047)),
    ):
        for name in plans.names(replace(plans.shape_call(context.device, shape), needs_grad=False)):
            items[f"{name}, {title}"] = functools.partial(_cuda_graph, context, name, shape)
    return items


def _cuda_graph(context: Context, name: str, shape: Shape) -> Finding:
    if context.dry_run:
        raise LeftOut("a CPU has no CUDA graphs")
    sizes = (shape.B, shape.Hq, shape.Hkv, shape.S, shape.T, shape.D, shape.P)
    inputs = inputs_of(sizes, "cuda", torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(3):
            peftkern.prefix_attention(*inputs, backend=name)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = peftkern.prefix_attention(*inputs, backend=name)
    for x in inputs:
        x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(out, peftkern.prefix_attention(*inputs, backend=name), rtol=0, atol=0)
    return Finding("captured and replayed")
