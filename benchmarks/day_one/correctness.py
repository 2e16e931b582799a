# SPDX-License-Identifier: Apache-2.0
"""Stages that check results: against fp64, under torch.compile, in CUDA graphs, and with planted faults."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

import peftkern
from peftkern import backends, ops, testing
from peftkern.arguments import AttentionArgs, attention_call
from peftkern.validation import validate_attention

from . import runner
from .context import DTYPES, Context, LeftOut, backend_names
from .plan import PLANTED

#: Odd sizes (S, P, D) that every dtype is checked with, and more for bf16.
SIZES = ((63, 17, 64), (1, 1, 64), (17, 0, 64), (333, 130, 128), (64, 7, 40), (96, 32, 80), (5, 3, 128))


def _cases(name_of_dtype: str, dry_run: bool) -> list[tuple[str, testing.Shape, dict[str, Any]]]:
    """(name, shape, options) of the calls to check: all features in bf16, some in the other dtypes."""
    plain = [testing.Shape(B=2, Hq=4, Hkv=2, S=S, P=P, D=D) for S, P, D in SIZES]
    small = testing.Shape(S=9, P=7, D=40)
    if dry_run:
        plain, names = plain[1:2], ["ragged_bank"]
    elif name_of_dtype != "bf16":
        plain, names = plain[:5], ["key_mask", "window", "ragged_bank", "packed", "kv_cache"]
    else:
        names = [name for name in testing.FEATURES if name != "plain"]
    cases: list[tuple[str, testing.Shape, dict[str, Any]]] = [(str(shape), shape, {}) for shape in plain]
    cases += [(name, *testing.feature(name, small)) for name in names]
    if not dry_run:
        cases.append(("KV cache, decoding", testing.Shape(S=1, P=1100, D=64, T=300), {}))
    return cases


def correct(context: Context, backend: str, name_of_dtype: str, part: int, parts: int) -> None:
    """Compare forward and every gradient with fp64, over features and odd shapes, within the tests' bound.

    Each feature is a set of kernels to compile, so ``parts`` processes share the calls.
    """
    todo = _cases(name_of_dtype, context.dry_run)
    todo = todo if context.dry_run else todo[part - 1 :: parts]
    passed, refused, wrong = 0, [], []
    device = "cpu" if backend == "cpu" else context.device
    for name, shape, options in context.in_time(todo):
        tensors = testing.tensors(shape, DTYPES[name_of_dtype], seed=1)
        features = {
            key: x.to(device) if isinstance(x, Tensor) else x for key, x in options.items()
        }  # fmt: skip
        call = peftkern.explain(*(x.to(device).requires_grad_() for x in tensors.values()), **features).call
        plan = backends.get_backend(backend).plan(call)
        if isinstance(plan, backends.Refusal):
            refused.append(f"{name}: {'; '.join(plan.reasons)}")
            continue
        try:
            testing.check_backend(backend, tensors, options, device=device)
            passed += 1
        except Exception as error:
            if context.dry_run and "only 0-dimensional arrays can be converted" in str(error):
                raise LeftOut(f"the interpreter of Triton {version('triton')} needs numpy < 2.4") from error
            wrong.append(f"{name}: {type(error).__name__}: {error}")
            if "CUDA error" in str(error):
                break  # CUDA is unusable in this process
    context.lines += wrong + [f"refused: {line}" for line in refused]
    if wrong:
        raise AssertionError(f"{len(wrong)} of {passed + len(wrong)} calls are wrong, the first: {wrong[0]}")
    if not passed:
        raise LeftOut(refused[0] if refused else "no time")
    context.lines.insert(0, f"{passed} calls right, {len(refused)} refused")


def planted(context: Context) -> None:
    """Plant faults: the bound must find a wrong result, the runner a crash and a hang."""
    plan = backends.plan_named("reference")
    right = plan.prefix_attention

    def wrong(args: Any) -> tuple[Tensor, Tensor]:
        out, lse = right(args)
        return out * 1.01, lse

    plan.prefix_attention = wrong  # type: ignore[method-assign]
    try:
        testing.check_backend("reference", testing.tensors(testing.Shape(), torch.float32), {}, backward=False)
    except AssertionError as error:
        context.lines.append(f"found: {error}")
    else:
        raise AssertionError("a result that is wrong by a hundredth passes the check")
    finally:
        plan.prefix_attention = right  # type: ignore[method-assign]
    inner = context.folder / "planted"
    inner.mkdir(exist_ok=True)
    for name, status in zip(PLANTED, ("crashed", "timed out"), strict=True):
        result = runner.run_stage(name, inner, 1.5, dry_run=False)
        if result["status"] != status:
            raise AssertionError(f"{name} was taken for {result['status']!r}")
        context.lines.append(f"found: {name} {status}")
    context.lines.insert(0, "a wrong result, a crash and a hang are found")


def inputs_of(shape: tuple[int, ...], device: str, dtype: torch.dtype, grad: bool = True) -> list[Tensor]:
    """q, k, v, prefix_k, prefix_v for sizes (B, Hq, Hkv, S, T, D, P); q, k and v are [B, S, H, D] in memory."""
    batch, heads, kv_heads, queries, keys, dim, prefix = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    qkv = [draw(batch, n, h, dim).transpose(1, 2) for n, h in ((queries, heads), (keys, kv_heads), (keys, kv_heads))]
    return [x.requires_grad_(grad) for x in (*qkv, draw(kv_heads, prefix, dim), draw(kv_heads, prefix, dim))]


def opcheck(context: Context) -> None:
    dtype = torch.float16
    names = backend_names(context, dtype)
    for backend in context.in_time(names[:1] if context.dry_run else names):
        inputs = [x.detach() for x in inputs_of((2, 4, 2, 17, 17, 64, 7), context.device, dtype)]
        options: Any = (*[None] * 9, None, True, None, True, None, 0.0)
        args = validate_attention(AttentionArgs(*inputs, *options), None)
        plan = backends.resolve(attention_call(args, needs_grad=True), backend)
        torch.library.opcheck(ops.prefix_attention, (*args, plan))
        out, lse = ops.prefix_attention(*args, plan)
        needs = [x is not None for x in args.differentiable]
        torch.library.opcheck(ops.prefix_attention_backward, (out, None, out, lse, *args, needs, plan))
        context.lines.append(f"{backend}: forward and backward")
    context.lines.insert(0, f"{len(context.lines)} backends")


def _gradients(attention: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    out = attention(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out))]


def compiled(context: Context) -> None:
    """Compile one graph for static and for dynamic sizes, and compare it with eager calls."""
    compiler = "aot_eager" if context.dry_run else "inductor"
    for backend in context.in_time(["auto", *([] if context.dry_run else backend_names(context, torch.bfloat16))]):
        torch._dynamo.reset()

        def attention(*inputs: Tensor, backend: str = backend) -> Tensor:
            return peftkern.prefix_attention(*inputs, backend=backend) * 2

        graph = torch.compile(attention, fullgraph=True, backend=compiler, dynamic=None)
        for length in (32, 48, 80):
            inputs = inputs_of((2, 4, 2, length, length, 64, 7), context.device, torch.bfloat16)
            for got, true in zip(_gradients(graph, inputs), _gradients(attention, inputs), strict=True):
                torch.testing.assert_close(got, true, rtol=5e-2, atol=5e-2)
        context.lines.append(f"{backend}: one graph, forward and backward, {compiler}")
    context.lines.insert(0, f"{len(context.lines)} backends")


def cuda_graph(context: Context) -> None:
    """Capture a CUDA graph, replay it on other values, and compare it with eager calls."""
    if context.dry_run:
        raise LeftOut("a CPU has no CUDA graphs")
    for backend in context.in_time(backend_names(context, torch.bfloat16)):
        for shape in ((2, 8, 2, 128, 128, 64, 32), (4, 8, 2, 1, 2048, 64, 512)):
            inputs = [x.detach() for x in inputs_of(shape, "cuda", torch.bfloat16)]
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream), torch.no_grad():
                for _ in range(3):
                    peftkern.prefix_attention(*inputs, backend=backend)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.no_grad(), torch.cuda.graph(graph):
                    out = peftkern.prefix_attention(*inputs, backend=backend)
            except Exception as error:
                if backend == "reference":  # checks values on the host
                    context.lines.append(f"reference: not captured ({error})"[:200])
                    break
                raise
            for x in inputs:
                x.copy_(torch.randn_like(x))
            graph.replay()
            torch.cuda.synchronize()
            torch.testing.assert_close(out, peftkern.prefix_attention(*inputs, backend=backend), rtol=0, atol=0)
        else:
            context.lines.append(f"{backend}: captured and replayed, training and decoding shapes")
    context.lines.insert(0, f"{len(context.lines)} backends")
