# SPDX-License-Identifier: Apache-2.0
"""What a backend is given, what it returns, and what it must be able to say: the contract of all backends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, cast

import torch
from torch import Tensor

OpName = Literal["prefix_attention", "soft_prompt_embedding"]


class AttentionArgs(NamedTuple):
    """The arguments of one prefix attention, in the order of the op's schema (tensors first, then numbers).

    Shapes as in :func:`peftkern.prefix_attention`. ``softcap`` 0.0 and ``window`` ``None`` mean "none"; ``scale`` is
    always a number; ``dropout_seed`` is a 0-dim int64 tensor, given iff ``dropout_p > 0``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    prefix_k: Tensor
    prefix_v: Tensor
    sinks: Tensor | None
    bias: Tensor | None
    prefix_bias: Tensor | None
    gate: Tensor | None
    key_mask: Tensor | None
    cu_seqlens: Tensor | None
    prefix_ids: Tensor | None
    prefix_lens: Tensor | None
    dropout_seed: Tensor | None
    scale: float
    causal: bool
    window: int | None
    prefix_in_window: bool
    softcap: float
    dropout_p: float

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """The nine arguments that may have a gradient, q to gate."""
        return cast("tuple[Tensor | None, ...]", self[: len(AttentionGradients._fields)])


class AttentionGradients(NamedTuple):
    """Gradients of the nine differentiable arguments, in the order of :class:`AttentionArgs`.

    What nobody needs is a tensor without elements (an op's outputs cannot be optional).
    """

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dprefix_k: Tensor
    dprefix_v: Tensor
    dsinks: Tensor
    dbias: Tensor
    dprefix_bias: Tensor
    dgate: Tensor


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Softmax statistics and prefix gradients are fp32, or fp64 where the activations are."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def allocate_outputs(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    """Uninitialised (out [B,Hq,S,D] with the memory order [B,S,Hq,D], lse [B,Hq,S]).

    The order is the one the next linear layer reads, so no copy follows.
    """
    batch, num_heads, q_len, head_dim = args.q.shape
    out = args.q.new_empty(batch, q_len, num_heads, head_dim).transpose(1, 2)
    return out, args.q.new_empty(batch, num_heads, q_len, dtype=lse_dtype(args.q.dtype))


def allocate_gradients(args: AttentionArgs, needs: list[bool]) -> AttentionGradients:
    """Uninitialised gradients, empty where ``needs`` (nine flags) is false.

    dq, dk, dv have their argument's dtype and the memory order [B,S,H,D]; all others are contiguous fp32 (fp64 with
    fp64 activations), whatever their argument's dtype: they are sums over many rows.
    """
    fp = lse_dtype(args.q.dtype)
    gradients = []
    for argument, need in zip(args.differentiable, needs, strict=True):
        if argument is None or not need:
            gradients.append(args.q.new_empty(0))
        elif argument is args.q or argument is args.k or argument is args.v:
            batch, heads, length, head_dim = argument.shape
            gradients.append(argument.new_empty(batch, length, heads, head_dim).transpose(1, 2))
        else:
            gradients.append(argument.new_empty(argument.shape, dtype=fp))
    return AttentionGradients(*gradients)


@dataclass(frozen=True)
class Call:
    """What an op is asked to do: all that a backend may refuse on, and nothing else.

    ``features`` holds the names of the optional arguments in use (``"key_mask"``, ``"window"``, ``"bank"``, …);
    ``needs_grad`` says whether a backward pass will follow. For ``soft_prompt_embedding``, ``q_shape`` is
    [B, S], ``kv_shape`` the weight's [V, E] and ``prefix_shape`` the prompt's.
    """

    op: OpName
    device: torch.device
    dtype: torch.dtype
    prefix_dtype: torch.dtype
    q_shape: tuple[int, ...]
    kv_shape: tuple[int, ...]
    prefix_shape: tuple[int, ...]
    features: tuple[str, ...] = ()
    needs_grad: bool = False

    def __str__(self) -> str:
        """One line for messages, sizes and dtypes first."""
        names = ("q", "k", "prefix_k") if self.op == "prefix_attention" else ("input_ids", "weight", "prompt")
        shapes = zip(names, (self.q_shape, self.kv_shape, self.prefix_shape), strict=True)
        parts = [f"{name} {list(shape)}" for name, shape in shapes]
        dtype, prefix_dtype = (str(d).removeprefix("torch.") for d in (self.dtype, self.prefix_dtype))
        parts[1] += f" {dtype}"
        parts[2] += f" {prefix_dtype}"
        parts += [str(self.device), *self.features]
        return " · ".join([*parts, "forward and backward" if self.needs_grad else "forward"])


def call_of(args: AttentionArgs, needs_grad: bool = False) -> Call:
    """What a backend may refuse of a prefix attention."""
    features = [
        name
        for name, used in (
            ("non-causal", not args.causal),
            ("key_mask", args.key_mask is not None),
            ("cu_seqlens", args.cu_seqlens is not None),
            ("bank", args.prefix_ids is not None),
            ("prefix_lens", args.prefix_lens is not None),
            ("window", args.window is not None),
            ("prefix outside window", args.window is not None and not args.prefix_in_window),
            ("softcap", args.softcap != 0.0),
            ("sinks", args.sinks is not None),
            ("bias", args.bias is not None),
            ("prefix_bias", args.prefix_bias is not None),
            ("gate", args.gate is not None),
            ("dropout", args.dropout_p > 0.0),
        )
        if used
    ]
    return Call(
        "prefix_attention", args.q.device, args.q.dtype, args.prefix_k.dtype, tuple(args.q.shape),
        tuple(args.k.shape), tuple(args.prefix_k.shape), tuple(features), needs_grad,
    )  # fmt: skip


class Backend(Protocol):
    """What a backend module provides. ``needs`` in a backward says, per output, whether anybody wants it."""

    def why_not(self, call: Call) -> list[str]:
        """Reasons, each with what to do about it, why ``call`` cannot run here; empty if it can."""

    def prefix_attention(self, args: AttentionArgs) -> tuple[Tensor, Tensor]:
        """(out, lse), laid out by :func:`allocate_outputs`."""

    def prefix_attention_backward(
        self, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, args: AttentionArgs, needs: list[bool]
    ) -> AttentionGradients:
        """Gradients, laid out by :func:`allocate_gradients`. ``dlse`` is None where lse is not used."""

    def soft_prompt_embedding(
        self, input_ids: Tensor, weight: Tensor, prompt: Tensor, prompt_ids: Tensor | None
    ) -> Tensor:
        """[B, P+S, E] contiguous, of the weight's dtype."""

    def soft_prompt_embedding_backward(
        self,
        dout: Tensor,
        input_ids: Tensor,
        weight: Tensor,
        prompt: Tensor,
        prompt_ids: Tensor | None,
        needs: list[bool],
    ) -> tuple[Tensor, Tensor]:
        """(dweight, dprompt), both fp32 (fp64 with fp64 weights), contiguous; empty where not needed."""
