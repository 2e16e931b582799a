# SPDX-License-Identifier: Apache-2.0
"""The public operations: validate, choose a backend, differentiate."""

from __future__ import annotations

import inspect
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backends, ops
from .backends import AttentionArgs, AttentionGradients, Call, Explanation

__all__ = ["explain", "prefix_attention", "soft_prompt_embedding"]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_NUM_DIFFERENTIABLE = len(AttentionGradients._fields)
_NUM_TENSORS = AttentionArgs._fields.index("scale")
#: Devices that know autocast: others raise when asked whether it is on. A constant, which every torch.compile traces.
_AUTOCAST = frozenset(device for device in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(device))


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
    window: int | None = None,
    prefix_in_window: bool = True,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    prefix_bias: Tensor | None = None,
    gate: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a sequence over a learned prefix and itself, in one softmax; the prefix is read where it lies.

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
        q: [B, Hq, S, D], fp32, fp16, bf16 or fp64. Of all tensors only ``stride(-1) == 1`` is asked.
        k, v: [B, Hkv, T, D], q's dtype; Hq is a multiple of Hkv, query head h reads key head h // (Hq // Hkv).
            T > S (a KV cache) is aligned bottom-right: query i stands at key position i + T - S.
        prefix_k, prefix_v: [Hkv, P, D], shared by the batch, or a bank [A, Hkv, P, D]; q's dtype or fp32 (then read
            rounded to q's dtype). Keys are stored after rotary embedding. Gradients are accumulated in fp32.
        causal: hide sequence keys after the query.
        scale: default 1 / sqrt(D).
        key_mask: bool [B, T], false hides a sequence key (padding).
        cu_seqlens: int32 or int64 [n + 1], offsets from 0 to S of n packed sequences; needs B = 1 and S = T. Each
            sequence sees the prefix and itself.
        prefix_ids: int [B] (with cu_seqlens [n]), which prefix of the bank a sequence sees; -1 for none.
        prefix_lens: int [A], used tokens of each prefix of the bank, the rest is never read as a key.
        window: hides sequence keys that lie ``window`` or more positions before the query.
        prefix_in_window: the window counts the prefix as the ``P`` positions before the sequence, as models of
            ``transformers`` do; false keeps the prefix always visible.
        softcap: c above; None for none (Gemma 2).
        sinks: [Hq] logits that join the softmax's denominator without a value (GPT-OSS).
        bias: float, broadcastable to [B, Hq, S, T], 4 dims; -inf hides, and so may anything below -1e38.
        prefix_bias: float [Hq, P] (each dim may be 1).
        gate: [Hq]; the prefix gets a softmax of its own, times tanh(gate), added to the sequence's attention
            (LLaMA-Adapter, Zhang et al. 2023).
        dropout_p: probability of dropping an attention weight.
        dropout_seed: int or 0-dim int64 tensor; default drawn from torch's generator. Equal seeds drop equal weights
            on every backend (:func:`peftkern.reference.dropout_keep`).
        return_lse: also return lse [B, Hq, S] fp32, the natural logarithm of the denominator; differentiable.
        backend: ``"auto"`` or a name (:func:`peftkern.available_backends`), which then runs or raises.

    Returns:
        out [B, Hq, S, D] (a transposed view of [B, S, Hq, D]), or (out, lse). A query that sees nothing gets out 0
        and lse -inf. Gradients: q, k, v, prefix_k, prefix_v, sinks, bias, prefix_bias, gate; only those needed are
        computed; bitwise repeatable. Twice differentiable it is not.

    Raises:
        ValueError: naming the argument, what was expected and what came.
        BackendUnavailable: listing each backend's reasons.

    >>> import torch, peftkern
    >>> q, kv = torch.randn(2, 4, 7, 16), torch.randn(2, 2, 7, 16)
    >>> prefix_k, prefix_v = torch.randn(2, 2, 5, 16, requires_grad=True)
    >>> out = peftkern.prefix_attention(q, kv, kv, prefix_k, prefix_v)
    >>> out.shape
    torch.Size([2, 4, 7, 16])
    """
    args = _attention_args(
        q, k, v, prefix_k, prefix_v, causal, scale, key_mask, cu_seqlens, prefix_ids, prefix_lens, window,
        prefix_in_window, softcap, sinks, bias, prefix_bias, gate, dropout_p, dropout_seed,
    )  # fmt: skip
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in args.differentiable)
    name = backends.resolve(backends.call_of(args, needs_grad), backend)
    out, lse = _PrefixAttention.apply(name, *args) if needs_grad else ops.prefix_attention(*args, name)
    return (out, lse) if return_lse else out


class _PrefixAttention(torch.autograd.Function):
    """Saves the inputs, out and lse. Undefined output gradients arrive as None, so an unused lse costs nothing."""

    @staticmethod
    def forward(ctx: Any, backend: str, *inputs: Any) -> tuple[Tensor, Tensor]:
        out, lse = ops.prefix_attention(*inputs, backend)
        ctx.save_for_backward(out, lse, *inputs[:_NUM_TENSORS])
        ctx.numbers, ctx.backend = inputs[_NUM_TENSORS:], backend
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        out, lse, *tensors = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        elif dout.stride(-1) != 1:
            dout = dout.contiguous()
        needs = list(ctx.needs_input_grad[1 : 1 + _NUM_DIFFERENTIABLE])
        gradients = ops.prefix_attention_backward(dout, dlse, out, lse, *tensors, *ctx.numbers, needs, ctx.backend)
        wanted = [g if need else None for g, need in zip(gradients, needs, strict=True)]
        return None, *wanted, *[None] * (len(AttentionArgs._fields) - _NUM_DIFFERENTIABLE)


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
        ValueError: naming the argument, what was expected and what came.
        BackendUnavailable: listing each backend's reasons.

    >>> import torch, peftkern
    >>> weight, prompt = torch.randn(100, 8), torch.randn(3, 8, requires_grad=True)
    >>> peftkern.soft_prompt_embedding(torch.tensor([[1, 2]]), weight, prompt).shape
    torch.Size([1, 5, 8])
    """
    _check_embedding(input_ids, weight, prompt, prompt_ids)
    needs_grad = torch.is_grad_enabled() and (weight.requires_grad or prompt.requires_grad)
    call = Call(
        "soft_prompt_embedding", weight.device, weight.dtype, prompt.dtype, tuple(input_ids.shape),
        tuple(weight.shape), tuple(prompt.shape), () if prompt_ids is None else ("bank",), needs_grad,
    )  # fmt: skip
    name = backends.resolve(call, backend)
    if needs_grad:
        return _SoftPromptEmbedding.apply(name, input_ids, weight, prompt, prompt_ids)  # type: ignore[no-any-return]
    return ops.soft_prompt_embedding(input_ids, weight, prompt, prompt_ids, name)  # type: ignore[no-any-return]


class _SoftPromptEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, backend: str, input_ids: Tensor, weight: Tensor, prompt: Tensor, prompt_ids: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(input_ids, weight, prompt, prompt_ids)
        ctx.backend = backend
        return ops.soft_prompt_embedding(input_ids, weight, prompt, prompt_ids, backend)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[2:4])
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        dweight, dprompt = ops.soft_prompt_embedding_backward(dout, *ctx.saved_tensors, needs, ctx.backend)
        return None, None, dweight if needs[0] else None, dprompt if needs[1] else None, None


@overload
def explain(model: torch.nn.Module, /) -> str: ...
@overload
def explain(*tensors: Tensor | Call, **options: Any) -> Explanation: ...
def explain(*tensors: Any, **options: Any) -> Explanation | str:
    """Why each backend can or cannot run a call: ``explain(q, k, v, prefix_k, prefix_v, window=128)``.

    Takes the arguments of :func:`prefix_attention`, or one :class:`peftkern.backends.Call`. Printing the result
    gives a line per backend. For a patched model: a line on how its batches run, and why not otherwise.

    >>> import torch, peftkern
    >>> q, prefix = torch.randn(1, 2, 3, 8, dtype=torch.float64), torch.randn(2, 4, 8, dtype=torch.float64)
    >>> peftkern.explain(q, q, q, prefix, prefix).chosen
    'reference'
    """
    if len(tensors) == 1 and isinstance(tensors[0], torch.nn.Module):
        patch = getattr(tensors[0], "_peftkern_patch", None)
        if patch is None:
            raise _error("model", "one that was given to patch", type(tensors[0]).__name__)
        return patch.explain()  # type: ignore[no-any-return]
    if len(tensors) == 1 and isinstance(tensors[0], Call):
        return backends.explain(tensors[0])
    try:
        given = inspect.signature(prefix_attention).bind(*tensors, **options)
    except TypeError as error:
        raise ValueError(f"explain: expected the arguments of prefix_attention, {error}") from None
    given.apply_defaults()
    backend = given.arguments.pop("backend")
    del given.arguments["return_lse"]
    args = _attention_args(**given.arguments)
    needs_grad = any(x is not None and x.requires_grad for x in args.differentiable)
    return backends.explain(backends.call_of(args, needs_grad), backend)


def _error(argument: str, expected: str, got: object) -> ValueError:
    return ValueError(f"{argument}: expected {expected}, got {got}")


# Messages are formatted on failure only: formatting a size would make the compiler treat it as a constant.


def _check_shape(argument: str, x: Tensor, *expected: int | str) -> None:
    """``expected``: a size per dim, or a letter for any size."""
    fits = x.dim() == len(expected)
    for size, wanted in zip(x.shape, expected, strict=False):  # a loop: a generator costs as much as a small kernel
        fits = fits and (isinstance(wanted, str) or wanted == size)
    if not fits:
        raise _error(argument, f"shape [{', '.join(map(str, expected))}]", list(x.shape))


def _check_broadcastable(argument: str, x: Tensor, *sizes: int) -> None:
    fits = x.dim() == len(sizes) and all(n in (1, size) for n, size in zip(x.shape, sizes, strict=True))
    if not fits:
        raise _error(argument, f"{len(sizes)} dims broadcastable to {list(sizes)}", list(x.shape))


def _check_dtype(argument: str, x: Tensor, *expected: torch.dtype) -> None:
    if x.dtype not in expected:
        raise _error(argument, " or ".join(str(d) for d in dict.fromkeys(expected)), x.dtype)


def _check_indices(argument: str, x: Tensor, size: int | str) -> None:
    _check_dtype(argument, x, torch.int32, torch.int64)
    _check_shape(argument, x, size)


def _check_device(argument: str, x: Tensor | None, owner: str, device: torch.device) -> None:
    if x is not None and x.device != device:
        raise _error(argument, f"{owner}'s device {device}", x.device)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _attention_args(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    causal: bool,
    scale: float | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    prefix_ids: Tensor | None,
    prefix_lens: Tensor | None,
    window: int | None,
    prefix_in_window: bool,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    prefix_bias: Tensor | None,
    gate: Tensor | None,
    dropout_p: float,
    dropout_seed: int | Tensor | None,
) -> AttentionArgs:
    """Validate and normalise: what a backend receives is complete and consistent."""
    for name, x in (("q", q), ("k", k), ("v", v), ("prefix_k", prefix_k), ("prefix_v", prefix_v)):
        if not isinstance(x, Tensor):
            raise _error(name, "a tensor", type(x).__name__)
        if x.dtype not in _FLOATS:
            raise _error(name, "fp32, fp16, bf16 or fp64", x.dtype)
    optional = (
        ("sinks", sinks), ("bias", bias), ("prefix_bias", prefix_bias), ("gate", gate), ("key_mask", key_mask),
        ("cu_seqlens", cu_seqlens), ("prefix_ids", prefix_ids), ("prefix_lens", prefix_lens),
    )  # fmt: skip
    for name, tensor in optional:
        if tensor is not None and not isinstance(tensor, Tensor):
            raise _error(name, "a tensor or None", type(tensor).__name__)
    device = q.device.type
    if q.dtype != torch.float64 and device in _AUTOCAST and torch.is_autocast_enabled(device):
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))

    _check_shape("q", q, "B", "Hq", "S", "D")
    batch, num_heads, q_len, head_dim = q.shape
    if head_dim == 0:
        raise _error("q", "D of at least 1", list(q.shape))
    _check_shape("k", k, batch, "Hkv", "T", head_dim)
    num_kv_heads, kv_len = k.shape[1], k.shape[2]
    _check_shape("v", v, batch, num_kv_heads, kv_len, head_dim)
    if num_kv_heads == 0 or num_heads % num_kv_heads != 0:
        raise _error("q", f"Hq, a multiple of Hkv = {num_kv_heads}", num_heads)
    if causal and kv_len < q_len:
        raise _error("k", f"T of at least S = {q_len} when causal", kv_len)
    if prefix_k.dim() == 4:
        _check_shape("prefix_k", prefix_k, "A", num_kv_heads, "P", head_dim)
        if prefix_ids is None:
            raise _error("prefix_ids", "the prefix of each sequence, as prefix_k is a bank", None)
    else:
        _check_shape("prefix_k", prefix_k, num_kv_heads, "P", head_dim)
        for name, tensor in (("prefix_ids", prefix_ids), ("prefix_lens", prefix_lens)):
            if tensor is not None:
                raise _error(name, "None, as prefix_k [Hkv, P, D] is no bank", "a tensor")
    _check_shape("prefix_v", prefix_v, *prefix_k.shape)
    _check_dtype("k", k, q.dtype)
    _check_dtype("v", v, q.dtype)
    _check_dtype("prefix_k", prefix_k, q.dtype, torch.float32)
    _check_dtype("prefix_v", prefix_v, prefix_k.dtype)

    sequences: int | str = batch
    if cu_seqlens is not None:
        if batch != 1 or q_len != kv_len:
            raise _error("cu_seqlens", "packed q and k with B = 1 and S = T", f"q {list(q.shape)}, k {list(k.shape)}")
        _check_indices("cu_seqlens", cu_seqlens, "n + 1")
        if cu_seqlens.shape[0] == 0:
            raise _error("cu_seqlens", "at least the offset 0", "an empty tensor")
        sequences = cu_seqlens.shape[0] - 1
    if prefix_ids is not None:
        _check_indices("prefix_ids", prefix_ids, sequences)
    if prefix_lens is not None:
        _check_indices("prefix_lens", prefix_lens, prefix_k.shape[0])
    if key_mask is not None:
        if key_mask.dtype != torch.bool:
            raise _error("key_mask", "bool, true where a key is visible", key_mask.dtype)
        _check_shape("key_mask", key_mask, batch, kv_len)
    if not isinstance(causal, bool):
        raise _error("causal", "True or False", repr(causal))
    if window is not None and (not isinstance(window, int | torch.SymInt) or window < 1):
        raise _error("window", "None or an int of at least 1", window)
    if softcap is not None and not 0 < softcap < float("inf"):
        raise _error("softcap", "None or a positive number", softcap)
    if not 0.0 <= dropout_p < 1.0:
        raise _error("dropout_p", "a probability in [0, 1)", dropout_p)

    fp = backends.lse_dtype(q.dtype)
    if sinks is not None:
        _check_dtype("sinks", sinks, *_FLOATS)
        _check_shape("sinks", sinks, num_heads)
        sinks = sinks.to(fp)
    if gate is not None:
        _check_dtype("gate", gate, *_FLOATS)
        _check_shape("gate", gate, num_heads)
        gate = gate.to(fp)
    if prefix_bias is not None:
        _check_dtype("prefix_bias", prefix_bias, *_FLOATS)
        _check_broadcastable("prefix_bias", prefix_bias, num_heads, prefix_k.shape[-2])
        prefix_bias = prefix_bias.to(fp)
    if bias is not None:
        if bias.dtype not in _FLOATS:
            raise _error("bias", "a float tensor; a bool mask over keys is key_mask", bias.dtype)
        _check_broadcastable("bias", bias, batch, num_heads, q_len, kv_len)
        bias = bias if bias.dtype == q.dtype else bias.to(fp)
    for name, tensor in (("k", k), ("v", v), ("prefix_k", prefix_k), ("prefix_v", prefix_v), *optional):
        _check_device(name, tensor, "q", q.device)

    seed = None
    if dropout_p > 0.0:
        if isinstance(dropout_seed, Tensor):
            if dropout_seed.dtype != torch.int64 or dropout_seed.dim() != 0:
                got = f"{dropout_seed.dtype} {list(dropout_seed.shape)}"
                raise _error("dropout_seed", "an int or a 0-dim int64 tensor", got)
            seed = dropout_seed.to(q.device)
        elif dropout_seed is None:
            seed = torch.randint(torch.iinfo(torch.int64).max, (), device=q.device)
        elif not -(2**63) <= dropout_seed < 2**63:
            raise _error("dropout_seed", "an int of 64 bits", dropout_seed)
        else:
            seed = torch.tensor(dropout_seed, dtype=torch.int64, device=q.device)
    return AttentionArgs(
        q=_unit_stride(q), k=_unit_stride(k), v=_unit_stride(v), prefix_k=_unit_stride(prefix_k),
        prefix_v=_unit_stride(prefix_v), sinks=sinks, bias=bias, prefix_bias=prefix_bias, gate=gate,
        key_mask=key_mask, cu_seqlens=cu_seqlens, prefix_ids=prefix_ids, prefix_lens=prefix_lens, dropout_seed=seed,
        scale=float(head_dim**-0.5 if scale is None else scale), causal=causal, window=window,
        prefix_in_window=prefix_in_window, softcap=float(softcap or 0.0), dropout_p=float(dropout_p),
    )  # fmt: skip


def _check_embedding(input_ids: Tensor, weight: Tensor, prompt: Tensor, prompt_ids: Tensor | None) -> None:
    _check_dtype("input_ids", input_ids, torch.int32, torch.int64)
    _check_shape("input_ids", input_ids, "B", "S")
    _check_dtype("weight", weight, *_FLOATS)
    _check_shape("weight", weight, "V", "E")
    _check_dtype("prompt", prompt, weight.dtype, torch.float32)
    if prompt_ids is None:
        _check_shape("prompt", prompt, "P", weight.shape[1])
    else:
        _check_shape("prompt", prompt, "A", "P", weight.shape[1])
        _check_indices("prompt_ids", prompt_ids, input_ids.shape[0])
    for name, tensor in (("input_ids", input_ids), ("prompt", prompt), ("prompt_ids", prompt_ids)):
        _check_device(name, tensor, "weight", weight.device)
