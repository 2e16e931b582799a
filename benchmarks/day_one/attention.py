# SPDX-License-Identifier: Apache-2.0
"""Device times of attention: torch's kernels alone, the prefix kernels alone, every plan, and the alternatives."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peftkern.arguments import AttentionArgs, allocate_gradients
from peftkern.backends import prefix_kernels, registry, torch_attention
from peftkern.backends.base import PrefixKernels
from peftkern.backends.kernel_table import attention_kernels
from peftkern.backends.torch_attention import AttentionKernel, KernelInputs
from peftkern.tools.bench.checks import Judge
from peftkern.tools.bench.providers import PROVIDERS, Problem, Unavailable, prepare
from peftkern.tools.bench.shapes import Shape
from peftkern.validation import validate_attention

from . import plans
from .context import Context, Finding, Items, LeftOut, Row
from .machine import ceilings, judged, plan_calls, seconds_of

LLAMA = {"Hq": 32, "Hkv": 8, "D": 128}
#: In the order of their worth.
SHAPES = (
    Shape(B=4, S=2048, P=128, **LLAMA), Shape(B=8, S=512, P=16, **LLAMA), Shape(B=4, S=2048, P=512, **LLAMA),
    Shape(B=4, S=2048, P=64, **LLAMA), Shape(B=2, S=4096, P=128, **LLAMA), Shape(B=4, S=2048, P=16, **LLAMA),
    Shape(B=16, S=512, P=32, Hq=9, Hkv=3, D=64), Shape(B=32, S=1, P=2048, cached=511, **LLAMA),
    Shape(B=1, S=1, P=64, cached=16383, **LLAMA), Shape(B=2, S=1024, P=64, Hq=16, Hkv=8, D=256, softcap=50.0),
)  # fmt: skip
#: FlexAttention compiles each shape.
FLEX = SHAPES[:2]
OTHERS = ("peft", "cat-flash", "no-prefix")
#: Lengths of the packed sequences, 17 in 8192 rows.
PACKED = (256, 768) * 8


def attention(context: Context) -> Items:
    """The ceilings again, with nothing beside them; then kernels alone, then plans and alternatives by shape."""
    items: Items = {"ceilings": functools.partial(ceilings, context)}
    for kernel in attention_kernels():
        if kernel.device == context.device and kernel.backward is not None:
            for layout in ("square", "bottom-right", "packed"):
                items[f"torch's {kernel.name}, {layout}"] = functools.partial(_torch_kernel, context, kernel, layout)
    for length in (16, 64, 128, 512):
        for kernels, _ in prefix_kernels.PREFIX_KERNELS:
            name = f"{kernels.name} prefix kernels, P={length}"
            items[name] = functools.partial(_prefix_kernels, context, kernels, length)
    for shape in (Shape(B=1, Hq=4, Hkv=2, S=24, D=16, P=5),) if context.dry_run else SHAPES:
        judges: dict[str, Judge] = {}  # the exact results are computed once per shape
        names = plans.names(plans.shape_call(context.device, shape))
        for name in ["auto", *names, *OTHERS, *["flex"] * (shape in FLEX and not context.dry_run)]:
            items[f"{title(shape)}: {name}"] = functools.partial(_provider, context, shape, name, judges)
    return items


def title(shape: Shape) -> str:
    """The sizes of a shape in a few words."""
    cached = f" cached={shape.cached}" if shape.cached else ""
    softcap = " softcap" if shape.softcap else ""
    return f"B={shape.B} H={shape.Hq}/{shape.Hkv} S={shape.S}{cached} D={shape.D} P={shape.P}{softcap}"


def _provider(context: Context, shape: Shape, name: str, judges: dict[str, Judge]) -> Finding:
    """Check a plan or an alternative, then time it forward and, if there are gradients, backward."""
    problem = judges["judge"].problem if judges else Problem.make(shape, torch.bfloat16, context.device)
    if not judges:
        judges["judge"] = Judge(problem)
    ours, backward = name not in PROVIDERS or name == "auto", shape.S > 1
    calls = plan_calls(problem, name) if ours else prepare(name, problem)
    if isinstance(calls, Unavailable):
        raise LeftOut(calls.reason)
    start = time.monotonic()
    with plans.on_its_own_kernel():
        error = judged(judges["judge"], calls, ours or PROVIDERS[name].uses_prefix, backward)
    row: Row = {"shape": title(shape), "what": name, "error": error, "cold_s": time.monotonic() - start}
    if ours:
        row["plan"] = registry.resolve(plans.shape_call(context.device, shape), name)
    row["forward_us"] = 1e6 * seconds_of(context, calls.forward)
    if backward and calls.both is not None:
        row["both_us"] = 1e6 * seconds_of(context, calls.both)
    return Finding(f"forward {row['forward_us']:.1f} us, with backward {row.get('both_us', 0.0):.1f} us", [row])


def _inputs(context: Context, queries: int, keys: int, batch: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((batch, queries, 32), (batch, keys, 8), (batch, keys, 8), (batch, queries, 32))
    drawn = (torch.randn(*size, 128, generator=generator) for size in sizes)
    return [x.to(context.device, torch.bfloat16).transpose(1, 2) for x in drawn]


def _torch_kernel(context: Context, kernel: AttentionKernel, layout: str) -> Finding:
    """Time one of torch's kernels alone. Packed: once with the longest sequence as the bound, once with all rows."""
    if context.dry_run and layout == "packed":
        raise LeftOut("torch has no packed kernel for a CPU")
    batch, queries = (1, 32) if context.dry_run else (1, sum(PACKED)) if layout == "packed" else (4, 2048)
    keys = queries + (128 if layout == "bottom-right" else 0)
    q, k, v, dout = _inputs(context, queries, keys, batch)
    inputs, bounds = KernelInputs(q, k, v, 128**-0.5, True, None, None), [0]
    if layout == "packed":
        offsets = torch.tensor([0, *PACKED]).cumsum(0).to(context.device, torch.int32)
        inputs, bounds = inputs._replace(cu_seqlens=offsets), [max(PACKED), queries]
    if kernel.needs_mask(inputs):
        raise LeftOut("needs a mask")
    rows = []
    for bound in bounds:
        given = inputs._replace(max_seqlen=bound or None)
        rows.append({"what": f"torch's {kernel.name}", "shape": layout + (f", bound {bound}" if bound else "")})
        rows[-1] |= _pair(
            context, lambda given=given: torch_attention.attention(kernel, given),
            lambda out, lse, given=given: torch_attention.attention_backward(kernel, dout, out, lse, given),
        )  # fmt: skip
    return Finding("; ".join(f"{r['shape']}: {r['forward_us']:.1f} + {r['backward_us']:.1f} us" for r in rows), rows)


def _pair(context: Context, forward: Callable[[], Any], backward: Callable[[Tensor, Tensor], Any]) -> Row:
    """The times of a forward that returns (out, lse), and of a backward that takes both."""
    out, lse = forward()
    return {
        "forward_us": 1e6 * seconds_of(context, forward),
        "backward_us": 1e6 * seconds_of(context, lambda: backward(out, lse)),
    }


def _prefix_kernels(context: Context, kernels: PrefixKernels, length: int) -> Finding:
    """Time the prefix kernels alone: merging into attention, its backward, and concatenation with its backward."""
    if not plans.matching(plans.names(plans.plain_call(context.device, torch.bfloat16)), "merge", kernels.name):
        raise LeftOut("they cannot run here")
    batch, tokens = (1, 16) if context.dry_run else (4, 2048)
    q, k, v, dout = _inputs(context, tokens, tokens, batch)
    prefix = torch.randn(2, 8, length, 128, device=q.device).to(q.dtype)
    given: dict[str, Any] = dict.fromkeys(AttentionArgs._fields)
    given |= {"q": q, "k": k, "v": v, "prefix_k": prefix[0], "prefix_v": prefix[1], "causal": True}
    args = validate_attention(AttentionArgs(**given | {"prefix_in_window": True, "dropout_p": 0.0}), None)
    part_out, part_lse = q.transpose(1, 2).contiguous().transpose(1, 2), torch.zeros(q.shape[:3], device=q.device)
    out, lse = kernels.merge_prefix(args, part_out.clone(), part_lse.clone())
    gradients = allocate_gradients(args, [True, False, False, True, True, *[False] * 4])
    joined, _ = kernels.concat_prefix(args)
    calls: dict[str, Callable[[], object]] = {
        "merge": lambda: kernels.merge_prefix(args, part_out, part_lse),
        "merge backward": lambda: kernels.merge_prefix_backward(dout, out, lse, args, gradients.dq, gradients),
        "concat": lambda: kernels.concat_prefix(args),
        "sum of a prefix gradient": lambda: kernels.sum_prefix_gradient(args, joined, gradients.dprefix_k),
    }
    rows = [
        {
            "what": f"{kernels.name} {name}",
            "shape": f"B={batch} S={tokens} P={length}",
            "us": 1e6 * seconds_of(context, call),
        }
        for name, call in calls.items()
    ]
    return Finding(", ".join(f"{row['what']} {row['us']:.1f} us" for row in rows), rows)
