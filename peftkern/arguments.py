# SPDX-License-Identifier: Apache-2.0
"""The arguments and results of the ops, and the description of a call by which a backend is chosen.

The ground floor: everything else in the package may import this module, and it imports nothing of the package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

OpName = Literal["prefix_attention", "soft_prompt_embedding"]


#: Arguments that repeat on the host what ``cu_seqlens`` and the prefixes' tensors say on the device. Backends may
#: ignore them.
HINTS = ("max_seqlen", "prefix_start", "max_prefix_len")


class AttentionArgs(NamedTuple):
    """The arguments of one prefix attention in the order of the op's schema, tensors first.

    The shapes are those of :func:`peftkern.prefix_attention`. ``softcap=0.0`` disables the cap, ``window=None`` the
    window. ``scale`` is always a number. ``dropout_seed`` is a 0-dim int64 tensor if ``dropout_p > 0``, else None.

    The op's schema (:mod:`peftkern.ops`) is derived from the annotations of these fields.
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
    prefix_starts: Tensor | None
    dropout_seed: Tensor | None
    scale: float
    causal: bool
    window: int | None
    prefix_in_window: bool
    softcap: float
    dropout_p: float
    max_seqlen: int | None = None
    prefix_start: int | None = None
    max_prefix_len: int | None = None

    @property
    def has_chains(self) -> bool:
        """Whether a sequence may see several prefixes, or one that lies in k and v."""
        ids = self.prefix_ids
        return ids is not None and (len(ids.shape) == 2 or self.prefix_starts is not None)

    def without_hints(self) -> dict[str, Any]:
        """The arguments that define the result, by name: all but the :data:`HINTS`."""
        return {name: x for name, x in self._asdict().items() if name not in HINTS}

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors: ``q`` to ``dropout_seed``."""
        return cast("tuple[Tensor | None, ...]", self[:_NUM_TENSORS])

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """The nine arguments that may have a gradient: ``q`` to ``gate``."""
        return cast("tuple[Tensor | None, ...]", self[: len(AttentionGradients._fields)])


_NUM_TENSORS = AttentionArgs._fields.index("scale")


class AttentionGradients(NamedTuple):
    """The gradients of the nine differentiable arguments, in the order of :class:`AttentionArgs`.

    A gradient that was not requested is a tensor without elements, since an op's outputs cannot be optional.
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


def constant(x: Tensor, host: Tensor | None = None) -> Tensor:
    """Mark ``x`` as a tensor that never changes again, and return it.

    What backends compute from it, such as a dense mask, is shared by all calls that pass it.

    Args:
        host: the values of ``x`` on the CPU, if they are known there. Whoever needs them does not wait for the device
            then.
    """
    x._peftkern_constant = True  # type: ignore[attr-defined]
    if host is not None:
        x._peftkern_host = host  # type: ignore[attr-defined]
    return x


def host_values(x: Tensor) -> Tensor:
    """The values of ``x`` on the CPU. For a device tensor without those of :func:`constant`, this waits for them."""
    if x.device.type == "cpu":
        return x
    host: Tensor | None = getattr(x, "_peftkern_host", None)
    return x.cpu() if host is None else host


def is_constant(x: Tensor) -> bool:
    """Whether ``x`` has been marked by :func:`constant`."""
    return hasattr(x, "_peftkern_constant")


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax statistics and prefix gradients: fp64 for fp64 activations, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


_Layout = tuple[tuple[int, ...], tuple[int, ...]]


def output_layouts(args: AttentionArgs) -> tuple[_Layout, _Layout]:
    """(size, strides) of ``out`` [B, Hq, S, D_v] and of ``lse`` [B, Hq, S].

    ``out`` lies in memory as [B, S, Hq, D], the order in which the next linear layer reads it, so no copy follows.
    """
    batch, num_heads, q_len, _ = args.q.shape
    out = _bshd((batch, num_heads, q_len, args.v.shape[3]))
    return out, ((batch, num_heads, q_len), (num_heads * q_len, q_len, 1))


def _bshd(shape: tuple[int, ...]) -> _Layout:
    """(size, strides) of a tensor of ``shape`` [B, H, S, D] that lies in memory as [B, S, H, D]."""
    batch, heads, length, head_dim = shape
    row = heads * head_dim
    return (batch, heads, length, head_dim), (length * row, head_dim, row, 1)


def allocate_outputs(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    """Uninitialised ``out`` and ``lse``, laid out as :func:`output_layouts` says."""
    out, lse = output_layouts(args)
    return args.q.new_empty_strided(*out), args.q.new_empty_strided(*lse, dtype=lse_dtype(args.q.dtype))


def allocate_gradients(args: AttentionArgs, needs: list[bool]) -> AttentionGradients:
    """Uninitialised gradients. Those whose flag in ``needs`` (nine flags) is false are one tensor without elements.

    dq, dk and dv have their argument's dtype and lie in memory as [B, S, H, D]. All others are sums over many rows
    and therefore contiguous fp32 (fp64 for fp64 activations), whatever their argument's dtype.
    """
    fp = lse_dtype(args.q.dtype)
    nothing = args.q.new_empty_strided((0,), (1,))
    gradients = []
    for argument, need in zip(args.differentiable, needs, strict=True):
        if argument is None or not need:
            gradients.append(nothing)
        elif argument is args.q or argument is args.k or argument is args.v:
            gradients.append(argument.new_empty_strided(*_bshd(argument.shape)))
        elif (
            argument.dtype == fp and argument.is_contiguous()
        ):  # as below by the call above, which takes half as long
            gradients.append(argument.new_empty_strided(argument.shape, argument.stride()))
        else:
            gradients.append(argument.new_empty(argument.shape, dtype=fp))
    return AttentionGradients(*gradients)


class TensorInfo(NamedTuple):
    """What validation and the choice of a backend read of a tensor."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Call:
    """What an op is asked to do: everything that a backend may refuse or price, and nothing else.

    ``features`` holds the names of the optional arguments in use (``"key_mask"``, ``"window"``, ``"bank"``, …), and
    ``needs_grad`` says whether a backward pass follows. ``kv_shape`` is k's, ``prefix_shape`` that of prefix_k, and
    ``own_value_dim`` is D_v where it is not D. For ``soft_prompt_embedding``, ``q_shape`` is [B, S], ``kv_shape`` the
    weight's [V, E] and ``prefix_shape`` the prompt's.
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
    own_value_dim: int | None = None
    _hash: int | None = field(default=None, init=False, repr=False, compare=False)

    def __reduce__(self) -> tuple[type[Call], tuple[object, ...]]:
        """Without the hash: that of strings differs between processes."""
        shapes = (self.q_shape, self.kv_shape, self.prefix_shape)
        options = (self.features, self.needs_grad, self.own_value_dim)
        return Call, (self.op, self.device, self.dtype, self.prefix_dtype, *shapes, *options)

    @property
    def value_dim(self) -> int:
        """D_v, the head dim of the values and of out."""
        return self.q_shape[-1] if self.own_value_dim is None else self.own_value_dim

    def __hash__(self) -> int:
        """Computed once: a call is looked up each time an op runs."""
        if self._hash is None:
            fields = (
                self.op, self.device, self.dtype, self.prefix_dtype, self.q_shape, self.kv_shape, self.prefix_shape,
                self.features, self.needs_grad, self.own_value_dim,
            )  # fmt: skip
            object.__setattr__(self, "_hash", hash(fields))
        return cast(int, self._hash)

    def __str__(self) -> str:
        """One line for messages: shapes, dtypes, device, features."""
        names = ("q", "k", "prefix_k") if self.op == "prefix_attention" else ("input_ids", "weight", "prompt")
        shapes = zip(names, (self.q_shape, self.kv_shape, self.prefix_shape), strict=True)
        parts = [f"{name} {list(shape)}" for name, shape in shapes]
        dtype, prefix_dtype = (str(d).removeprefix("torch.") for d in (self.dtype, self.prefix_dtype))
        parts[1] += f" {dtype}"
        parts[2] += f" {prefix_dtype}"
        values = [] if self.own_value_dim is None else [f"values of head dim {self.own_value_dim}"]
        parts += [str(self.device), *values, *self.features]
        return " · ".join([*parts, "forward and backward" if self.needs_grad else "forward"])


def attention_call(args: AttentionArgs, needs_grad: bool = False) -> Call:
    """The :class:`Call` of a prefix attention. Tensors may be given as :class:`TensorInfo`."""
    features = tuple(name for name, is_used in _FEATURES if is_used(args))
    return Call(
        "prefix_attention", args.q.device, args.q.dtype, args.prefix_k.dtype, tuple(args.q.shape),
        tuple(args.k.shape), _prefix_shape(args), features, needs_grad,
        None if args.v.shape[3] == args.q.shape[3] else args.v.shape[3],
    )  # fmt: skip


def _prefix_shape(args: AttentionArgs) -> tuple[int, ...]:
    """The shape of ``prefix_k`` or, for chains, that of the bank which they become, as far as the host knows it."""
    if not args.has_chains:
        return tuple(args.prefix_k.shape)
    ids = args.prefix_ids
    assert ids is not None
    num_kv_heads, prefix_len, head_dim = args.prefix_k.shape[1:]
    longest = args.max_prefix_len
    if longest is None:
        longest = args.k.shape[2] if args.prefix_starts is not None else ids.shape[1] * prefix_len
    return ids.shape[0], num_kv_heads, longest, head_dim


_FEATURES: tuple[tuple[str, Callable[[AttentionArgs], bool]], ...] = (
    ("non-causal", lambda args: not args.causal),
    ("key_mask", lambda args: args.key_mask is not None),
    ("cu_seqlens", lambda args: args.cu_seqlens is not None),
    ("bank", lambda args: args.prefix_ids is not None),
    ("prefix_lens", lambda args: args.prefix_lens is not None or args.has_chains),
    ("gathered prefixes", lambda args: args.has_chains),
    ("window", lambda args: args.window is not None),
    ("prefix outside window", lambda args: args.window is not None and not args.prefix_in_window),
    ("softcap", lambda args: bool(args.softcap)),
    ("sinks", lambda args: args.sinks is not None),
    ("bias", lambda args: args.bias is not None),
    ("prefix_bias", lambda args: args.prefix_bias is not None),
    ("gate", lambda args: args.gate is not None),
    ("dropout", lambda args: args.dropout_p > 0.0),
)


def embedding_call(
    input_ids: Tensor, weight: Tensor, prompt: Tensor, prompt_ids: Tensor | None, needs_grad: bool = False
) -> Call:
    """The :class:`Call` of a soft prompt embedding."""
    return Call(
        "soft_prompt_embedding", weight.device, weight.dtype, prompt.dtype, tuple(input_ids.shape),
        tuple(weight.shape), tuple(prompt.shape), () if prompt_ids is None else ("bank",), needs_grad,
    )  # fmt: skip
