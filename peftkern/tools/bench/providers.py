# SPDX-License-Identifier: Apache-2.0
"""Providers of prefix attention: peftkern, its alternatives, and torch's SDPA without a prefix.

A provider is a function of a :class:`Problem`. It returns the attention, a function of q, k, v, prefix_k and
prefix_v, or a sentence that says why the provider cannot run here. :func:`prepare` makes forward and backward calls.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import peftkern
from peftkern import backends
from peftkern.backends import torch_attention

from .shapes import DIRECTIONS, Shape

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}

#: q, k, v, prefix_k, prefix_v -> out
Attention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """One call with its inputs.

    Attributes:
        inputs: q, k, v with a model's strides ([B, S, H, D] in memory), prefix_k and prefix_v [Hkv, P, D].
        dout: gradient of out.
    """

    shape: Shape
    inputs: tuple[Tensor, ...]
    dout: Tensor

    @classmethod
    def make(cls, shape: Shape, dtype: torch.dtype, device: torch.device | str = "cpu") -> Problem:
        """Standard normal inputs, reproducible for a shape."""
        g = torch.Generator().manual_seed(0)
        sizes = [(shape.B, shape.S, shape.Hq), *[(shape.B, shape.T, shape.Hkv)] * 2, (shape.B, shape.S, shape.Hq)]
        q, k, v, dout = (torch.randn(*size, shape.D, generator=g).to(device, dtype).transpose(1, 2) for size in sizes)
        prefix = (torch.randn(shape.Hkv, shape.P, shape.D, generator=g).to(device, dtype) for _ in range(2))
        return cls(shape, (q, k, v, *prefix), dout)

    @property
    def device(self) -> torch.device:
        """Device of the inputs."""
        return self.inputs[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the inputs."""
        return self.inputs[0].dtype


class Calls(NamedTuple):
    """Functions to time. ``backward`` and ``both`` are None if the provider computes no gradients.

    ``forward`` returns out. ``backward`` and ``both`` return the gradients of q, k, v and, if the provider uses it,
    the prefix; ``backward`` runs repeatedly on one graph.
    """

    forward: Callable[[], Tensor]
    backward: Callable[[], tuple[Tensor, ...]] | None
    both: Callable[[], tuple[Tensor, ...]] | None

    def of(self, direction: str) -> Callable[[], Any] | None:
        """The function for a name in :data:`DIRECTIONS`."""
        return dict(zip(DIRECTIONS, self, strict=True))[direction]


@dataclass(frozen=True)
class Provider:
    """A way to compute prefix attention.

    Attributes:
        title: description for tables.
        make: returns the attention, or the reason why there is none for the problem.
        uses_prefix: false for torch's SDPA on the sequence alone, a baseline and not a lower bound.
        by_default: empty if the provider is timed when the user names none, else the reason why not.
        why_no_backward: empty, or the reason why there are no gradients on the problem's device.
    """

    title: str
    make: Callable[[Problem], Attention | str]
    uses_prefix: bool = True
    by_default: Callable[[Problem], str] = lambda problem: ""
    why_no_backward: Callable[[Problem], str] = lambda problem: ""


class Unavailable(NamedTuple):
    """The reason why a provider is not timed."""

    reason: str


def prepare(name: str, problem: Problem, directions: Iterable[str] = DIRECTIONS) -> Calls | Unavailable:
    """Functions to time, or the reason why the provider has none for this problem.

    Raises:
        ValueError: if there is no such provider.
    """
    if name not in PROVIDERS:
        raise ValueError(f"providers: expected some of {', '.join(PROVIDERS)}, got {name!r}")
    provider = PROVIDERS[name]
    attention = provider.make(problem)
    if isinstance(attention, str):
        return Unavailable(attention)
    with_backward = any("backward" in direction for direction in directions)
    with_backward = with_backward and not provider.why_no_backward(problem)
    return calls_of(attention, problem, with_backward, provider.uses_prefix)


def calls_of(attention: Attention, problem: Problem, with_backward: bool = True, uses_prefix: bool = True) -> Calls:
    """Functions to time for any attention."""
    inputs, dout = problem.inputs, problem.dout

    def forward() -> Tensor:
        with torch.no_grad():
            return attention(*inputs)

    if not with_backward:
        return Calls(forward, None, None)
    leaves = [x.detach().requires_grad_() for x in inputs]
    wanted = leaves if uses_prefix else leaves[:3]
    kept: list[Tensor] = []

    def backward() -> tuple[Tensor, ...]:
        if not kept:
            with torch.enable_grad():
                kept.append(attention(*leaves))
        return torch.autograd.grad(kept[0], wanted, dout, retain_graph=True)

    def both() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            return torch.autograd.grad(attention(*leaves), wanted, dout)

    return Calls(forward, backward, both)


# PEFT's way


def joined(sequence: Tensor, prefix: Tensor, repeat: int = 1) -> Tensor:
    """Concatenate the prefix, expanded over the batch, and the sequence: [B, Hkv * repeat, P + T, D]."""
    prefix = prefix.to(sequence.dtype)[None].expand(sequence.shape[0], -1, -1, -1)
    keys = torch.cat([prefix, sequence], 2)
    return keys if repeat == 1 else keys.repeat_interleave(repeat, 1)


def visible_keys(shape: Shape, device: torch.device) -> Tensor:
    """The keys that each query sees, [S, P + T] bool: causal behind prefix and cache, within the window."""
    positions = shape.P + shape.cached + torch.arange(shape.S, device=device)
    distances = positions[:, None] - torch.arange(shape.P + shape.T, device=device)
    visible = distances >= 0
    return visible if shape.window is None else visible & (distances < shape.window)


def _peft_sdpa(problem: Problem, kernel: SDPBackend | None = None) -> Attention | str:
    """expand, cat, repeat, a mask per sample, SDPA. ``kernel`` None leaves the choice to torch."""
    shape = problem.shape
    if shape.softcap is not None:
        return "torch's scaled_dot_product_attention has no softcap"
    if problem.device.type == "cpu" and kernel in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        return "torch has this kernel on GPUs only"

    def attention(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        k, v = joined(k, prefix_k, group), joined(v, prefix_v, group)
        mask = visible_keys(shape, q.device).expand(q.shape[0], 1, -1, -1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return attention if kernel is None else _with_sdpa(kernel, attention, problem)


def _with_sdpa(kernel: SDPBackend, attention: Attention, problem: Problem) -> Attention | str:
    """``attention`` with one of torch's kernels, or torch's reasons why that kernel cannot run."""

    def chosen(*inputs: Tensor) -> Tensor:
        with sdpa_kernel(kernel):
            return attention(*inputs)

    with warnings.catch_warnings(record=True) as said, torch.no_grad():
        warnings.simplefilter("always")
        try:
            chosen(*problem.inputs)
        except RuntimeError as error:
            reasons = [str(w.message).partition(" (Triggered internally")[0].strip() for w in said]
            reasons = [r for r in reasons if not r.endswith(("because:", "reasons:"))]
            return "; ".join(dict.fromkeys(reasons)) or str(error).strip().splitlines()[0]
    return chosen


def _peft_eager(problem: Problem) -> Attention:
    """Eager attention as in models: the whole score matrix, softmax in fp32."""
    shape = problem.shape

    def attention(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        k, v = joined(k, prefix_k, group), joined(v, prefix_v, group)
        scores = q @ k.transpose(-1, -2) * shape.D**-0.5
        if shape.softcap is not None:
            scores = torch.tanh(scores / shape.softcap) * shape.softcap
        scores = scores.masked_fill(~visible_keys(shape, q.device), -torch.inf)
        return torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v

    return attention


# kernels with bottom-right causality, which need no mask


def _cat_flash(problem: Problem) -> Attention | str:
    """cat, then torch's FlashAttention with bottom-right causality: one copy, no mask, no repeat."""
    shape = problem.shape
    if problem.device.type != "cuda":
        return "torch's flash kernel for CPUs is causal from the top left: it needs a mask, as in peft-flash"
    if torch.version.hip is not None:
        return "torch's flash kernel for ROCm is causal from the top left"
    if problem.dtype == torch.float32:
        return "FlashAttention has no fp32"
    if shape.softcap is not None:
        return "torch's flash op has no softcap"
    if shape.D % 8 or shape.D > 256:
        return f"FlashAttention needs a head dim of 8, 16, 24 to 256, not {shape.D}"
    left = None if shape.window is None else shape.window - 1

    def attention(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, joined(k, prefix_k), joined(v, prefix_v)))
        out, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, None, None, shape.S, shape.P + shape.T, 0.0, True, False, scale=shape.D**-0.5,
            window_size_left=left, window_size_right=None if left is None else 0,
        )  # fmt: skip
        return out.transpose(1, 2)  # type: ignore[no-any-return]

    return attention


def _flash_attn(problem: Problem) -> Attention | str:
    """cat, then the package flash-attn."""
    shape = problem.shape
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed"
    if problem.device.type != "cuda" or problem.dtype == torch.float32:
        return "flash-attn needs a GPU and fp16 or bf16"
    from flash_attn import flash_attn_func

    window = (-1, -1) if shape.window is None else (shape.window - 1, 0)

    def attention(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, joined(k, prefix_k), joined(v, prefix_v)))
        out = flash_attn_func(q, k, v, causal=True, window_size=window, softcap=shape.softcap or 0.0)
        return out.transpose(1, 2)  # type: ignore[no-any-return]

    return attention


def _flex(problem: Problem) -> Attention | str:
    """cat, then compiled FlexAttention with a block mask that is made once."""
    shape = problem.shape
    if importlib.util.find_spec("torch.nn.attention.flex_attention") is None:
        return "this torch has no FlexAttention"
    if problem.device.type == "cpu" and shape.S == 0:
        return "FlexAttention has no empty sequences"
    from torch.nn.attention.flex_attention import create_block_mask

    offset, window, softcap = shape.P + shape.cached, shape.window, shape.softcap

    def mask_mod(b: Tensor, h: Tensor, q_index: Tensor, kv_index: Tensor) -> Tensor:
        seen = kv_index <= q_index + offset
        return seen if window is None else seen & (q_index + offset - kv_index < window)

    def cap(score: Tensor, b: Tensor, h: Tensor, q_index: Tensor, kv_index: Tensor) -> Tensor:
        return score if softcap is None else torch.tanh(score / softcap) * softcap

    score_mod = None if softcap is None else cap
    mask = create_block_mask(mask_mod, None, None, shape.S, shape.P + shape.T, device=problem.device)

    def attention(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
        k, v = joined(k, prefix_k), joined(v, prefix_v)
        group = q.shape[1] != k.shape[1]
        return _compiled_flex()(q, k, v, score_mod=score_mod, block_mask=mask, enable_gqa=group)  # type: ignore[no-any-return]

    return attention


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex_no_backward(problem: Problem) -> str:
    return "FlexAttention has no backward on CPUs" if problem.device.type == "cpu" else ""


# two calls, merged by their log-sum-exps


class _TwoCalls(torch.autograd.Function):
    """out = sum_i exp(lse_i - lse) out_i, over attention to the sequence and attention to the prefix.

    Backward passes the merged out and lse to the backward of both calls, so that they return gradients of the whole.
    """

    @staticmethod
    def forward(ctx: Any, kernel: torch_attention.AttentionKernel, scale: float, *inputs: Tensor) -> Tensor:
        parts = _TwoCalls.parts(scale, *inputs)
        outs, lses = zip(*(torch_attention.attention(kernel, part) for part in parts), strict=True)
        lse = torch.logaddexp(*(x.float() for x in lses))
        weights = [torch.exp(x.float() - lse)[..., None] for x in lses]
        out: Tensor = (weights[0] * outs[0] + weights[1] * outs[1]).to(inputs[0].dtype)
        ctx.kernel, ctx.scale = kernel, scale
        ctx.save_for_backward(out, lse, *inputs)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        out, lse, *inputs = ctx.saved_tensors
        parts = _TwoCalls.parts(ctx.scale, *inputs)
        (dq, dk, dv), (dq_prefix, dprefix_k, dprefix_v) = (
            torch_attention.attention_backward(ctx.kernel, dout, out, lse, part) for part in parts
        )
        dprefix = (x.sum(0, dtype=torch.float32).to(inputs[3].dtype) for x in (dprefix_k, dprefix_v))
        return None, None, dq + dq_prefix, dk, dv, *dprefix

    @staticmethod
    def parts(scale: float, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> list[Any]:
        prefix_k, prefix_v = (x.to(q.dtype)[None].expand(q.shape[0], -1, -1, -1) for x in (prefix_k, prefix_v))
        return [
            torch_attention.KernelInputs(q, k, v, scale, True, None, None, None, None),
            torch_attention.KernelInputs(q, prefix_k, prefix_v, scale, False, None, None, None, None),
        ]


def _two_calls(problem: Problem) -> Attention | str:
    """torch's kernel on the sequence and on the prefix; torch operators merge the results."""
    shape, (q, k, _, prefix_k, _) = problem.shape, problem.inputs
    if shape.options:
        return f"two calls have no {' and no '.join(shape.options)}"
    if 0 in (shape.B, shape.S, shape.P):
        return "two calls need queries and a prefix"
    call = backends.Call(
        "prefix_attention", q.device, q.dtype, prefix_k.dtype, tuple(q.shape), tuple(k.shape), tuple(prefix_k.shape)
    )
    found = torch_attention.candidates(call, (), shape.T)
    if refusal := torch_attention.refusal(call, found):
        return refusal.reasons[0]
    kernel = next(kernel for kernel in found.values() if isinstance(kernel, torch_attention.AttentionKernel))
    if kernel.top_left and shape.S not in (1, shape.T):
        return "torch's kernel here is causal from the top left: no queries behind a cache"
    return functools.partial(_TwoCalls.apply, kernel, shape.D**-0.5)


# no prefix, and this package


def _no_prefix(problem: Problem) -> Attention | str:
    """torch's causal attention to the sequence alone, as in a model without a prefix."""
    shape = problem.shape
    if shape.softcap is not None:
        return "torch's scaled_dot_product_attention has no softcap"
    alone = replace(shape, P=0)
    hides = shape.window is not None and shape.window < shape.T
    masked = hides or (shape.S not in (1, shape.T))  # is_causal is aligned top-left

    def attention(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        if group > 1:
            k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        mask = visible_keys(alone, q.device) if masked else None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not masked and q.shape[2] > 1)

    return attention


def _ours(problem: Problem, backend: str = "auto") -> Attention | str:
    """:func:`peftkern.prefix_attention`."""
    leaves = [x.detach().requires_grad_() for x in problem.inputs]
    explanation = peftkern.explain(*leaves, **problem.shape.options)
    if backend == "auto" and explanation.chosen is None:
        return str(explanation)
    if backend != "auto" and explanation.reasons[backend]:
        return "; ".join(explanation.reasons[backend])
    return functools.partial(peftkern.prefix_attention, backend=backend, **problem.shape.options)


def chosen_by_auto(problem: Problem) -> str | None:
    """The backend that ``auto`` chooses for a call with gradients."""
    leaves = [x.detach().requires_grad_() for x in problem.inputs]
    return peftkern.explain(*leaves, **problem.shape.options).chosen


def _slow_on_cpu(why: str) -> Callable[[Problem], str]:
    return lambda problem: why if problem.device.type == "cpu" else ""


_REFERENCE = "eager and slow on purpose"
PROVIDERS: dict[str, Provider] = {
    "peft": Provider("PEFT's way: expand, cat, repeat, mask, SDPA", _peft_sdpa),
    "peft-flash": Provider(
        "the same, SDPA's flash kernel", functools.partial(_peft_sdpa, kernel=SDPBackend.FLASH_ATTENTION)
    ),
    "peft-efficient": Provider(
        "the same, SDPA's memory-efficient kernel",
        functools.partial(_peft_sdpa, kernel=SDPBackend.EFFICIENT_ATTENTION),
    ),
    "peft-cudnn": Provider(
        "the same, SDPA's cuDNN kernel", functools.partial(_peft_sdpa, kernel=SDPBackend.CUDNN_ATTENTION)
    ),
    "peft-math": Provider("the same, SDPA's math", functools.partial(_peft_sdpa, kernel=SDPBackend.MATH)),
    "peft-eager": Provider("the same, eager attention", _peft_eager),
    "cat-flash": Provider("cat, torch's flash kernel, no mask", _cat_flash),
    "flash-attn": Provider("cat, the package flash-attn, no mask", _flash_attn),
    "flex": Provider(
        "cat, FlexAttention compiled",
        _flex,
        by_default=_slow_on_cpu("compiles every shape, which takes half a minute on a CPU"),
        why_no_backward=_flex_no_backward,
    ),
    "two-calls": Provider("torch's kernel twice, merged by log-sum-exp", _two_calls),
    "no-prefix": Provider("no prefix, torch SDPA: attention to the sequence alone", _no_prefix, uses_prefix=False),
    "peftkern": Provider("peftkern, backend chosen by auto", _ours),
    **{
        f"peftkern-{name}": Provider(
            f"peftkern's {name} backend",
            functools.partial(_ours, backend=name),
            by_default=(lambda problem: _REFERENCE)
            if name == "reference"
            else _slow_on_cpu("Triton's interpreter is for tests and slow on purpose")
            if name in ("triton", "merge", "concat")
            else (lambda problem: ""),
        )
        for name in backends.BACKENDS
    },
}
