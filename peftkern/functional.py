# SPDX-License-Identifier: Apache-2.0
"""The public operations: validate the arguments, choose a plan, differentiate."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from . import ops
from .arguments import AttentionArgs, AttentionGradients, TensorInfo, attention_call, embedding_call
from .backends import registry
from .backends.base import Plan
from .validation import (
    autocast_attention,
    check_attention,
    check_dropout_seed,
    check_embedding,
    check_return_lse,
    has_normal_tensors,
    normalize_attention,
    normalize_numbers,
    validate_attention,
)

__all__ = ["prefix_attention", "soft_prompt_embedding"]

#: Whether autocast is enabled for some device. Not public; if it is missing, each call asks for q's device.
_maybe_autocast = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)
_NUM_DIFFERENTIABLE = len(AttentionGradients._fields)
_NUM_TENSORS = AttentionArgs._fields.index("scale")
#: ``prefix_ids``, ``prefix_lens`` and ``prefix_starts`` of a call with one prefix for all.
_NO_PREFIXES = [None, None, None]
_NO_FLAGS = (False,) * _NUM_DIFFERENTIABLE
_NO_GRADIENTS = (None,) * (_NUM_TENSORS - _NUM_DIFFERENTIABLE)


@overload
def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, *, return_lse: Literal[False] = False,
    backend: str = "auto", **options: Any,
) -> Tensor: ...  # fmt: skip
@overload
def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, *, return_lse: Literal[True],
    backend: str = "auto", **options: Any,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def prefix_attention(  # type: ignore[misc]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    prefix_ids: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    prefix_starts: Tensor | None = None,
    window: int | None = None,
    prefix_in_window: bool = True,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    prefix_bias: Tensor | None = None,
    gate: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    max_seqlen: int | None = None,
    prefix_start: int | None = None,
    max_prefix_len: int | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a sequence over a learned prefix and itself, in one softmax, without copying the prefix.

    ::

                    prefix_k          k                     P = 3, S = T = 4, causal; every query
               q 0  # # #             # . . .               sees every prefix key
                 1  # # #             # # . .
                 2  # # #             # # # .
                 3  # # #             # # # #

        score(i, prefix p)   = softcap(scale * <q_i, prefix_k_p>) + prefix_bias_p
        score(i, sequence t) = softcap(scale * <q_i, k_t>) + bias_it          softcap(x) = c tanh(x / c)
        out_i = sum over visible keys of softmax(scores_i) * value

    Equal to ``scaled_dot_product_attention`` over ``torch.cat([prefix, sequence])`` without the concatenation, the
    expansion of the prefix over the batch, the mask and the repeated heads. Prefix tuning: Li & Liang 2021.

    Args:
        q: [B, Hq, S, D], fp32, fp16, bf16 or fp64. Any strides are supported; only ``stride(-1) == 1`` is required to
            avoid a copy.
        k: [B, Hkv, T, D], q's dtype; Hq is a multiple of Hkv, query head h reads key head h // (Hq // Hkv).
            T > S (a KV cache) is aligned bottom-right: query i stands at key position i + T - S.
        v: [B, Hkv, T, D_v], q's dtype. D_v need not be D: in models with compressed keys (DeepSeek), D is 192 and D_v
            is 128.
        prefix_k, prefix_v: [Hkv, P, D] and [Hkv, P, D_v], shared by the batch, or banks [A, Hkv, P, D] and
            [A, Hkv, P, D_v]; q's dtype or fp32 (then read rounded to q's dtype). Keys are stored after rotary
            embedding. Gradients are accumulated in fp32.
        causal: hides the sequence keys after the query.
        scale: default 1 / sqrt(D).
        key_mask: bool [B, T], false hides a sequence key (padding).
        cu_seqlens: int32 or int64 [n + 1], offsets from 0 to S of n packed sequences; needs B = 1 and S = T. Each
            sequence sees the prefix and itself.
        prefix_ids: int [B] (with cu_seqlens [n]), which prefix of the bank a sequence sees; -1 for none. Or [B, K]
            (with cu_seqlens [n, K]): a sequence sees up to K prefixes as one, concatenated in the order of its row;
            -1 may stand anywhere in a row and adds nothing.
        prefix_lens: int [A], the number of valid tokens of each prefix in the bank. Tokens behind it are ignored.
            With prefix_starts int [A + C], required.
        prefix_starts: int [C], with cu_seqlens and a bank (A and P may be 0): C further prefixes that lie in k and v.
            Prefix A + c consists of the prefix_lens[A + c] rows from prefix_starts[c] on. dk and dv contain what the
            rows contribute as prefixes, summed in fp32 in a fixed order. Rows that key_mask hides must not lie in a
            prefix: the mask hides keys of the sequences, not of prefixes.
        window: hides sequence keys that lie ``window`` or more positions before the query.
        prefix_in_window: if true, the prefix occupies the ``P`` positions before the sequence and the window counts
            them, as in ``transformers``. If false, the prefix is always visible; prefix_starts needs an empty bank
            then. Of several prefixes, their concatenation counts.
        softcap: c in the formula above (Gemma 2), or None to disable it.
        sinks: [Hq] logits that join the softmax's denominator without a value (GPT-OSS). -inf is no sink. +inf takes
            the whole weight: out is 0, lse inf, and all gradients of the head are 0. NaN gives NaN. Finite values
            beyond 2.3e38 may count as 2.3e38.
        bias: float with 4 dims, broadcastable to [B, Hq, S, T]. -inf hides a key; values below -1e38 may do so too.
        prefix_bias: float [Hq, P] (each dim may be 1), for one prefix per sequence.
        gate: [Hq]; the prefix gets a softmax of its own, times tanh(gate), added to the sequence's attention
            (LLaMA-Adapter, Zhang et al. 2023).
        dropout_p: probability of dropping an attention weight.
        dropout_seed: int or 0-dim int64 tensor; default drawn from torch's generator. Equal seeds drop equal weights
            on every backend (:func:`peftkern.reference.dropout_keep`).
        max_seqlen: an upper bound of the lengths that ``cu_seqlens`` contains, known on the host. It spares
            variable-length kernels the blocks of rows that no sequence has. Checked for CPU tensors only: a bound
            that is too small leaves rows uncomputed.
        prefix_start: a row at which a packed sequence starts, known on the host: the sequences before it have no
            prefix (``prefix_ids`` -1) and all others the only prefix of the bank (0). Checked for CPU tensors only.
        max_prefix_len: an upper bound of the number of prefix tokens that a sequence sees, known on the host, for
            prefix_ids with two dims or prefix_starts. It tells the choice of a backend how long the prefixes are.
            Checked for CPU tensors only.
        return_lse: also return lse [B, Hq, S] fp32, the natural logarithm of the denominator; differentiable.
        backend: ``"auto"``, or the name of a backend (:func:`peftkern.available_backends`) or of one of its plans
            (``"merge/cudnn/triton"``), which runs the call or raises.

    Returns:
        out [B, Hq, S, D_v] (a transposed view of [B, S, Hq, D_v]), or (out, lse). A query that sees nothing gets
        out 0 and lse -inf. Gradients flow to q, k, v, prefix_k, prefix_v, sinks, bias, prefix_bias and gate; only
        those needed are computed. They are bitwise repeatable. Double backward is unsupported.

    Raises:
        ValueError: naming the argument, what was expected and what was passed.
        BackendUnavailable: listing each backend's reasons.

    >>> import torch, peftkern
    >>> q, kv = torch.randn(2, 4, 7, 16), torch.randn(2, 2, 7, 16)
    >>> prefix = torch.nn.Parameter(torch.randn(2, 2, 5, 16))  # keys and values [Hkv, P, D]
    >>> out = peftkern.prefix_attention(q, kv, kv, *prefix)
    >>> out.shape
    torch.Size([2, 4, 7, 16])
    """
    inputs = AttentionArgs(
        q, k, v, prefix_k, prefix_v, sinks, bias, prefix_bias, gate, key_mask, cu_seqlens, prefix_ids, prefix_lens,
        prefix_starts, None, scale, causal, window, prefix_in_window, softcap, dropout_p,  # type: ignore[arg-type]
        max_seqlen, prefix_start, max_prefix_len,
    )  # fmt: skip
    check_return_lse(return_lse)
    args, plan, needs_grad = prepare(inputs, dropout_seed, backend)
    if needs_grad:
        call = plan, args[_NUM_TENSORS:], return_lse
        return _PrefixAttention.apply(call, *_given(args))  # type: ignore[no-any-return]
    out, lse = ops.attention(args, plan)
    return (out, lse) if return_lse else out


def prepare(inputs: AttentionArgs, dropout_seed: Any, backend: str) -> tuple[AttentionArgs, Plan | str, bool]:
    """Validate the arguments of a prefix attention and choose its plan.

    ``inputs`` may still have ``scale=None`` and ``softcap=None``. Validation and the choice depend only on shapes,
    strides, dtypes, devices and options, so their result is cached: a call seen before costs a dictionary lookup.

    Returns:
        The arguments as backends receive them, the plan (its name under torch.compile), and whether a backward pass
        follows.

    Raises:
        ValueError: naming the argument, what was expected and what was passed.
        BackendUnavailable: listing each backend's reasons.
    """
    if torch.compiler.is_compiling():
        return _prepare_uncached(inputs, dropout_seed, backend)
    if forward_ad._current_level >= 0:
        _refuse_tangents(inputs)
    try:
        if _maybe_autocast():
            inputs = autocast_attention(inputs)
        needs_grad = needs_backward(inputs)
        prepared = _prepared(_signature(inputs), needs_grad, *registry.choice(backend, inputs.q.is_cpu))
    except (AttributeError, TypeError):  # an argument is not a tensor, or sizes are symbolic and have no hash
        return _prepare_uncached(inputs, dropout_seed, backend)
    if dropout_seed is not None:
        check_dropout_seed(dropout_seed)
    if not prepared.is_normal:
        return normalize_attention(inputs, dropout_seed), prepared.plan, needs_grad
    args = _args(inputs[: _NUM_TENSORS - 1], prepared.numbers)
    if prepared.binds:
        prepared.plan, prepared.binds = prepared.plan.bind(args), False
    return args, prepared.plan, needs_grad


def _refuse_tangents(inputs: AttentionArgs) -> None:
    """Raise NotImplementedError for inputs of forward-mode differentiation, whose tangents would be lost."""
    for name, x in zip(AttentionArgs._fields, inputs.differentiable, strict=False):
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(f"{name}: prefix_attention has no forward-mode derivative; use backward()")


def _prepare_uncached(inputs: AttentionArgs, dropout_seed: Any, backend: str) -> tuple[AttentionArgs, str, bool]:
    args = validate_attention(inputs, dropout_seed)
    needs_grad = needs_backward(args)
    return args, registry.resolve(attention_call(args, needs_grad), backend), needs_grad


@dataclass(slots=True)
class _Prepared:
    """What calls of one signature share.

    Attributes:
        plan: the plan, bound to such calls once one has run.
        numbers: the numbers as backends receive them.
        is_normal: whether the tensors are as backends receive them.
        binds: whether the plan may still be bound: not if it is, nor for calls that have chains.
    """

    plan: Plan
    numbers: tuple[Any, ...]
    is_normal: bool
    binds: bool


def _signature(inputs: AttentionArgs) -> tuple[Any, ...]:
    """What validation and the choice of a plan depend on, as a hashable key: flat, since that is hashed fastest."""
    tensors: Any = inputs[: _NUM_TENSORS - 1]
    q, k, v, prefix_k, prefix_v, *optional = tensors
    sinks, bias, prefix_bias, gate, key_mask, cu_seqlens, *prefixes = optional
    if sinks is bias is prefix_bias is gate is key_mask is cu_seqlens is None and prefixes == _NO_PREFIXES:
        described: tuple[Any, ...] = ()
    else:
        described = tuple([None if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in optional])
    numbers = inputs[_NUM_TENSORS:]
    return (
        q.shape, q.stride(), q.dtype, q.device, k.shape, k.stride(), k.dtype, k.device,
        v.shape, v.stride(), v.dtype, v.device, prefix_k.shape, prefix_k.stride(), prefix_k.dtype, prefix_k.device,
        prefix_v.shape, prefix_v.stride(), prefix_v.dtype, prefix_v.device,
        described, numbers, *map(type, numbers),  # 1 == 1.0 == True as keys, but not as arguments
    )  # fmt: skip


@registry.forgettable
@functools.lru_cache(maxsize=4096)
def _prepared(signature: tuple[Any, ...], needs_grad: bool, requested: str, state: object) -> _Prepared:
    """Validate and choose. ``state`` is the state of torch that the choice depends on (:func:`.registry.choice`)."""
    described, numbers = signature[20:22]
    infos: list[Any] = [TensorInfo(*signature[i : i + 4]) for i in range(0, 20, 4)]
    infos += [x and TensorInfo(*x) for x in described or [None] * (_NUM_TENSORS - 6)]
    args = AttentionArgs(*infos, None, *numbers)  # type: ignore[call-arg]
    check_attention(args)
    plan = registry.plan_named(registry.resolve(attention_call(args, needs_grad), requested))
    # a plan is bound to what it is given, which for chains is another call for each set of values
    return _Prepared(plan, normalize_numbers(args), has_normal_tensors(args), binds=not args.has_chains)


def needs_backward(args: AttentionArgs) -> bool:
    """Whether a backward pass can follow: gradients are enabled, and an argument requires one."""
    if torch.is_grad_enabled():
        for x in args.differentiable:  # a generator would double the time
            if x is not None and x.requires_grad:
                return True
    return False


class _PrefixAttention(torch.autograd.Function):
    """Saves the inputs, out and lse. Gradients of unused outputs arrive as None, so an unused lse costs nothing.

    Every input and output costs time. The tensors are therefore passed without the None behind the last one, all else
    as one, and lse is returned only if the caller asks for it.
    """

    @staticmethod
    def forward(
        ctx: Any, call: tuple[Plan | str, tuple[Any, ...], bool], *tensors: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        plan, numbers, return_lse = call
        out, lse = ops.attention(_args(tensors, numbers), plan)
        ctx.save_for_backward(out, lse, *tensors)
        ctx.plan, ctx.numbers = plan, numbers
        ctx.set_materialize_grads(False)
        return (out, lse) if return_lse else out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None = None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph; without it, the decorator changes nothing but takes time
            return _once_differentiable_gradients(ctx, dout, dlse)  # type: ignore[no-any-return]
        return _gradients(ctx, dout, dlse)


def _gradients(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of the inputs of :class:`_PrefixAttention`."""
    out, lse, *tensors = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    elif dout.stride(-1) != 1:
        dout = dout.contiguous()
    flags = ctx.needs_input_grad[1:]
    needs = [*flags, *_NO_FLAGS][:_NUM_DIFFERENTIABLE]
    gradients = ops.attention_backward(dout, dlse, out, lse, _args(tensors, ctx.numbers), needs, ctx.plan)
    wanted = zip((*gradients, *_NO_GRADIENTS), flags, strict=False)
    return None, *[g if need else None for g, need in wanted]


_once_differentiable_gradients = once_differentiable(_gradients)


def _given(args: AttentionArgs) -> tuple[Tensor | None, ...]:
    """The tensors without the None behind the last one."""
    count = _NUM_TENSORS
    while args[count - 1] is None:
        count -= 1
    return args[:count]  # type: ignore[return-value]


def _args(tensors: Sequence[Any], numbers: tuple[Any, ...]) -> AttentionArgs:
    """The arguments whose :func:`_given` tensors and numbers these are."""
    return AttentionArgs._make((*tensors, *[None] * (_NUM_TENSORS - len(tensors)), *numbers))


def soft_prompt_embedding(
    input_ids: Tensor,
    weight: Tensor,
    prompt: Tensor,
    *,
    prompt_ids: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Embeds tokens behind a learned prompt: ``[prompt | weight[input_ids]]`` in one pass.

    Prompt tuning: Lester et al. 2021.

    Args:
        input_ids: int64 or int32 [B, S].
        weight: [V, E], the model's token embeddings.
        prompt: [P, E], shared by the batch, or a bank [A, P, E]; weight's dtype or fp32. Its gradient is summed over
            the batch in fp32, in a fixed order.
        prompt_ids: int [B], which prompt of the bank a sample gets.
        backend: ``"auto"`` or a name.

    Returns:
        [B, P+S, E] of the weight's dtype.

    Raises:
        ValueError: naming the argument, what was expected and what was passed.
        BackendUnavailable: listing each backend's reasons.

    >>> import torch, peftkern
    >>> weight, prompt = torch.randn(100, 8), torch.randn(3, 8, requires_grad=True)
    >>> peftkern.soft_prompt_embedding(torch.tensor([[1, 2]]), weight, prompt).shape
    torch.Size([1, 5, 8])
    """
    check_embedding(input_ids, weight, prompt, prompt_ids)
    needs_grad = torch.is_grad_enabled() and (weight.requires_grad or prompt.requires_grad)
    plan = registry.resolve(embedding_call(input_ids, weight, prompt, prompt_ids, needs_grad), backend)
    if needs_grad:
        return _SoftPromptEmbedding.apply(plan, input_ids, weight, prompt, prompt_ids)  # type: ignore[no-any-return]
    return ops.soft_prompt_embedding(input_ids, weight, prompt, prompt_ids, plan)  # type: ignore[no-any-return]


class _SoftPromptEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plan: str, input_ids: Tensor, weight: Tensor, prompt: Tensor, prompt_ids: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(input_ids, weight, prompt, prompt_ids)
        ctx.plan = plan
        return ops.soft_prompt_embedding(input_ids, weight, prompt, prompt_ids, plan)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[2:4])
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        dweight, dprompt = ops.soft_prompt_embedding_backward(dout, *ctx.saved_tensors, needs, ctx.plan)
        return None, None, dweight if needs[0] else None, dprompt if needs[1] else None, None
