# SPDX-License-Identifier: Apache-2.0
"""Validation of the public operations' arguments: what a backend receives is complete and consistent.

The checks read shapes, dtypes and devices only. :func:`check_attention` therefore takes tensors or the
:class:`~peftkern.arguments.TensorInfo` of each, and its result may be cached.
"""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from .arguments import HINTS, AttentionArgs, lse_dtype

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
#: Device types that support autocast; others raise when asked whether it is enabled. A constant, so that
#: torch.compile can trace it.
_AUTOCAST = frozenset(device for device in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(device))


def argument_error(argument: str, expected: str, got: object) -> ValueError:
    """The error of all checks: ``argument: expected ..., got ...``."""
    return ValueError(f"{argument}: expected {expected}, got {got}")


def validate_attention(inputs: AttentionArgs, dropout_seed: Any) -> AttentionArgs:
    """Arguments of :func:`peftkern.prefix_attention` as backends receive them; all steps of this module.

    Raises:
        ValueError: naming the argument, what was expected and what was passed.
    """
    check_tensors(inputs)
    inputs = autocast_attention(inputs)
    check_attention(inputs)
    return normalize_attention(inputs, dropout_seed)


def check_tensors(args: AttentionArgs) -> None:
    """Raise ValueError if an argument that must be a tensor is none. All other checks rely on this one."""
    for name, x in zip(("q", "k", "v", "prefix_k", "prefix_v"), args, strict=False):
        if not isinstance(x, Tensor):
            raise argument_error(name, "a tensor", type(x).__name__)
    for name in _OPTIONAL_TENSORS:
        x = getattr(args, name)
        if x is not None and not isinstance(x, Tensor):
            raise argument_error(name, "a tensor or None", type(x).__name__)


_OPTIONAL_TENSORS = (
    "sinks", "bias", "prefix_bias", "gate", "key_mask", "cu_seqlens", "prefix_ids", "prefix_lens",
    "prefix_starts",
)  # fmt: skip


def autocast_attention(inputs: AttentionArgs) -> AttentionArgs:
    """``inputs`` with q, k and v in the autocast dtype, if autocast is enabled. fp64 stays, as in torch's matmul."""
    q = inputs.q
    device = q.device.type
    if device in _AUTOCAST and torch.is_autocast_enabled(device) and q.dtype != torch.float64:
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in inputs[:3])
        inputs = inputs._replace(q=q, k=k, v=v)
    return inputs


def check_attention(args: AttentionArgs) -> None:
    """Raise ValueError if the arguments are inconsistent; see :func:`peftkern.prefix_attention` for what they are."""
    _check_sequence(args)
    _check_prefix(args)
    _check_indices(args)
    _check_numbers(args)
    _check_biases(args)
    for name in ("k", "v", "prefix_k", "prefix_v", *_OPTIONAL_TENSORS):
        check_device(name, getattr(args, name), "q", args.q.device)


def _check_sequence(args: AttentionArgs) -> None:
    for name, x in zip(("q", "k", "v", "prefix_k", "prefix_v"), args[:5], strict=True):
        if x.dtype not in FLOATS:
            raise argument_error(name, "fp32, fp16, bf16 or fp64", x.dtype)
    check_shape("q", args.q, "B", "Hq", "S", "D")
    batch, num_heads, q_len, head_dim = args.q.shape
    if head_dim == 0:
        raise argument_error("q", "D >= 1", list(args.q.shape))
    check_shape("k", args.k, batch, "Hkv", "T", head_dim)
    num_kv_heads, kv_len = args.k.shape[1], args.k.shape[2]
    check_shape("v", args.v, batch, num_kv_heads, kv_len, "D_v")
    if args.v.shape[3] == 0:
        raise argument_error("v", "D_v >= 1", list(args.v.shape))
    if num_kv_heads == 0 or num_heads % num_kv_heads != 0:
        raise argument_error("q", f"Hq, a multiple of Hkv = {num_kv_heads}", num_heads)
    if not isinstance(args.causal, bool):
        raise argument_error("causal", "True or False", repr(args.causal))
    if args.causal and kv_len < q_len:
        raise argument_error("k", f"T >= S = {q_len} if causal", kv_len)
    check_dtype("k", args.k, args.q.dtype)
    check_dtype("v", args.v, args.q.dtype)


def _check_prefix(args: AttentionArgs) -> None:
    prefix_k, num_kv_heads, head_dim = args.prefix_k, args.k.shape[1], args.q.shape[3]
    if len(prefix_k.shape) == 4:
        check_shape("prefix_k", prefix_k, "A", num_kv_heads, "P", head_dim)
        if args.prefix_ids is None:
            raise argument_error("prefix_ids", "the prefix of each sequence, since prefix_k is a bank", None)
    else:
        check_shape("prefix_k", prefix_k, num_kv_heads, "P", head_dim)
        for name in ("prefix_ids", "prefix_lens", "prefix_starts"):
            if getattr(args, name) is not None:
                raise argument_error(name, "None, since prefix_k [Hkv, P, D] is a single prefix", "a tensor")
    check_shape("prefix_v", args.prefix_v, *prefix_k.shape[:-1], args.v.shape[3])
    check_dtype("prefix_k", prefix_k, args.q.dtype, torch.float32)
    check_dtype("prefix_v", args.prefix_v, prefix_k.dtype)


def _check_indices(args: AttentionArgs) -> None:
    batch, _, q_len, _ = args.q.shape
    kv_len = args.k.shape[2]
    sequences: int | str = batch
    if args.cu_seqlens is not None:
        if batch != 1 or q_len != kv_len:
            got = f"q {list(args.q.shape)}, k {list(args.k.shape)}"
            raise argument_error("cu_seqlens", "packed q and k with B = 1 and S = T", got)
        check_index_tensor("cu_seqlens", args.cu_seqlens, "n + 1")
        if args.cu_seqlens.shape[0] == 0:
            raise argument_error("cu_seqlens", "at least the offset 0", "an empty tensor")
        sequences = args.cu_seqlens.shape[0] - 1
    if args.prefix_ids is not None:
        several = ("K",) if len(args.prefix_ids.shape) == 2 else ()
        check_index_tensor("prefix_ids", args.prefix_ids, sequences, *several)
    num_prefixes = args.prefix_k.shape[0]
    if args.prefix_starts is not None:
        _check_starts(args)
        num_prefixes += args.prefix_starts.shape[0]
    if args.prefix_lens is not None:
        check_index_tensor("prefix_lens", args.prefix_lens, num_prefixes)
    _check_hints(args)
    if args.key_mask is not None:
        if args.key_mask.dtype != torch.bool:
            raise argument_error("key_mask", "bool, true for visible keys", args.key_mask.dtype)
        check_shape("key_mask", args.key_mask, batch, kv_len)


def _check_starts(args: AttentionArgs) -> None:
    assert args.prefix_starts is not None
    check_index_tensor("prefix_starts", args.prefix_starts, "C")
    if args.cu_seqlens is None:
        raise argument_error("prefix_starts", "None, since the input is not packed (cu_seqlens)", "a tensor")
    if args.prefix_lens is None:
        raise argument_error("prefix_lens", "the length of each prefix, since prefix_starts is given", None)
    if args.window is not None and not args.prefix_in_window and args.prefix_k.shape[0] > 0:
        reason = "None, since prefix_in_window is False: the window does not tell the bank's prefixes from others"
        raise argument_error("prefix_starts", reason, "a tensor")


def _check_hints(args: AttentionArgs) -> None:
    for name in HINTS:
        value = getattr(args, name)
        if value is None:
            continue
        if args.cu_seqlens is None and name != "max_prefix_len":
            raise argument_error(name, "None, since the input is not packed (cu_seqlens)", value)
        if not (_is_int(value) and value >= 0):
            raise argument_error(name, "None or a non-negative int of at most 64 bits", repr(value))
    if args.prefix_start is not None:
        if args.prefix_ids is None or args.prefix_k.shape[0] != 1:
            raise argument_error("prefix_start", "None, since there is no bank of one prefix", args.prefix_start)
        if args.has_chains:
            raise argument_error("prefix_start", f"None, since {_why_chains(args)}", args.prefix_start)
        if args.prefix_start > args.q.shape[2]:
            raise argument_error("prefix_start", f"at most S = {args.q.shape[2]}", args.prefix_start)
    if args.max_prefix_len is not None and not args.has_chains:
        reason = "None, since prefix_ids does not have two dims and prefix_starts is None"
        raise argument_error("max_prefix_len", reason, args.max_prefix_len)


def _why_chains(args: AttentionArgs) -> str:
    """Which argument makes :attr:`.AttentionArgs.has_chains` true."""
    return "prefix_ids has two dims" if args.prefix_starts is None else "prefix_starts is given"


def _check_numbers(args: AttentionArgs) -> None:
    scale, window, softcap, dropout_p = args.scale, args.window, args.softcap, args.dropout_p
    if scale is not None and not (_is_number(scale) and -float("inf") < scale < float("inf")):
        raise argument_error("scale", "None or a finite number", repr(scale))
    if window is not None and not (_is_int(window) and window >= 1):
        raise argument_error("window", "None or an int of at least 1 and at most 64 bits", repr(window))
    if not isinstance(args.prefix_in_window, bool):
        raise argument_error("prefix_in_window", "True or False", repr(args.prefix_in_window))
    if softcap is not None and not (_is_number(softcap) and 0 < softcap < float("inf")):
        raise argument_error("softcap", "None or a positive number", repr(softcap))
    if not (_is_number(dropout_p) and 0.0 <= dropout_p < 1.0):
        raise argument_error("dropout_p", "a probability in [0, 1)", repr(dropout_p))


def _check_biases(args: AttentionArgs) -> None:
    batch, num_heads, q_len, _ = args.q.shape
    for name, x in (("sinks", args.sinks), ("gate", args.gate)):
        if x is not None:
            check_dtype(name, x, *FLOATS)
            check_shape(name, x, num_heads)
    if args.prefix_bias is not None:
        if args.has_chains:
            raise argument_error("prefix_bias", f"None, since {_why_chains(args)}", "a tensor")
        check_dtype("prefix_bias", args.prefix_bias, *FLOATS)
        _check_broadcastable("prefix_bias", args.prefix_bias, num_heads, args.prefix_k.shape[-2])
    if args.bias is not None:
        if args.bias.dtype not in FLOATS:
            raise argument_error("bias", "a float tensor (a bool mask over keys is key_mask)", args.bias.dtype)
        _check_broadcastable("bias", args.bias, batch, num_heads, q_len, args.k.shape[2])


def normalize_attention(args: AttentionArgs, dropout_seed: Any) -> AttentionArgs:
    """Checked arguments as backends receive them: unit strides, biases in fp32 or q's dtype, a dropout seed.

    Raises:
        ValueError: if ``dropout_seed`` is neither None, a 64-bit int nor a 0-dim int64 tensor.
    """
    check_dropout_seed(dropout_seed)
    q, k, v, prefix_k, prefix_v, sinks, bias, prefix_bias, gate = args[:9]
    if sinks is not None or bias is not None or prefix_bias is not None or gate is not None:
        fp = lse_dtype(q.dtype)
        sinks, prefix_bias, gate = (None if x is None else x.to(fp) for x in (sinks, prefix_bias, gate))
        bias = bias if bias is None or bias.dtype == q.dtype else bias.to(fp)
    return AttentionArgs(
        q if q.stride(-1) == 1 else _unit_stride(q), k if k.stride(-1) == 1 else _unit_stride(k),
        v if v.stride(-1) == 1 else _unit_stride(v),
        prefix_k if prefix_k.stride(-1) == 1 else _unit_stride(prefix_k),
        prefix_v if prefix_v.stride(-1) == 1 else _unit_stride(prefix_v),
        sinks, bias, prefix_bias, gate, *args[9:14],
        _dropout_seed(dropout_seed, q.device) if args.dropout_p > 0.0 else None,
        *normalize_numbers(args),
    )  # fmt: skip


def normalize_numbers(args: AttentionArgs) -> tuple[Any, ...]:
    """Checked numbers as backends receive them: ``scale`` to ``max_prefix_len``."""
    scale = args.scale
    return (
        float(args.q.shape[3] ** -0.5 if scale is None else scale), args.causal, args.window, args.prefix_in_window,
        float(args.softcap or 0.0), float(args.dropout_p), args.max_seqlen, args.prefix_start,
        args.max_prefix_len,
    )  # fmt: skip


def has_normal_tensors(args: AttentionArgs) -> bool:
    """Whether :func:`normalize_attention` leaves the tensors as they are. They are given as :class:`TensorInfo`."""
    infos: Any = args
    fp = lse_dtype(args.q.dtype)
    return (
        args.dropout_p == 0.0
        and all(x.strides[-1] == 1 for x in infos[:5])
        and all(x is None or x.dtype == fp for x in (args.sinks, args.prefix_bias, args.gate))
        and (args.bias is None or args.bias.dtype in (args.q.dtype, fp))
    )


def _dropout_seed(seed: Any, device: torch.device) -> Tensor:
    """The seed as a 0-dim int64 tensor, drawn from torch's generator if it is None."""
    if isinstance(seed, Tensor):
        return seed.to(device)
    if seed is None:
        return torch.randint(torch.iinfo(torch.int64).max, (), device=device)
    return torch.tensor(seed, dtype=torch.int64, device=device)


def check_dropout_seed(seed: Any) -> None:
    """Raise ValueError for a seed that is none, also where nothing is dropped."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.dim() != 0:
            raise argument_error("dropout_seed", "an int or a 0-dim int64 tensor", f"{seed.dtype} {list(seed.shape)}")
    elif seed is not None and not _is_int(seed):
        got = repr(seed) if isinstance(seed, int | float | str) else type(seed).__name__
        raise argument_error("dropout_seed", "None, an int of at most 64 bits or a 0-dim int64 tensor", got)


def check_return_lse(return_lse: Any) -> None:
    """Raise ValueError unless ``return_lse`` is a bool."""
    if return_lse is not True and return_lse is not False:
        raise argument_error("return_lse", "True or False", type(return_lse).__name__)


def _is_int(x: object) -> bool:
    if isinstance(x, torch.SymInt):
        return True
    return isinstance(x, int) and not isinstance(x, bool) and -(2**63) <= x < 2**63


def _is_number(x: object) -> bool:
    is_real = isinstance(x, int | float | torch.SymInt | torch.SymFloat | numbers.Real)
    return is_real and not isinstance(x, bool)


def check_embedding(input_ids: Tensor, weight: Tensor, prompt: Tensor, prompt_ids: Tensor | None) -> None:
    """Raise ValueError if arguments of :func:`peftkern.soft_prompt_embedding` are not tensors, or inconsistent."""
    for name, x in (("input_ids", input_ids), ("weight", weight), ("prompt", prompt)):
        if not isinstance(x, Tensor):
            raise argument_error(name, "a tensor", type(x).__name__)
    if prompt_ids is not None and not isinstance(prompt_ids, Tensor):
        raise argument_error("prompt_ids", "a tensor or None", type(prompt_ids).__name__)
    check_embedding_tensors(input_ids, weight, prompt, prompt_ids)


def check_embedding_tensors(input_ids: Tensor, weight: Tensor, prompt: Tensor, prompt_ids: Tensor | None) -> None:
    """:func:`check_embedding` of tensors, which may be given as :class:`~peftkern.arguments.TensorInfo`."""
    check_dtype("input_ids", input_ids, torch.int32, torch.int64)
    check_shape("input_ids", input_ids, "B", "S")
    check_dtype("weight", weight, *FLOATS)
    check_shape("weight", weight, "V", "E")
    check_dtype("prompt", prompt, weight.dtype, torch.float32)
    if prompt_ids is None:
        if len(prompt.shape) == 3:
            raise argument_error("prompt_ids", "the prompt of each sample, since prompt is a bank", None)
        check_shape("prompt", prompt, "P", weight.shape[1])
    else:
        check_shape("prompt", prompt, "A", "P", weight.shape[1])
        check_index_tensor("prompt_ids", prompt_ids, input_ids.shape[0])
    for name, tensor in (("input_ids", input_ids), ("prompt", prompt), ("prompt_ids", prompt_ids)):
        check_device(name, tensor, "weight", weight.device)


# Messages are formatted on failure only: formatting a size would make torch.compile treat it as a constant.


def check_shape(argument: str, x: Tensor, *expected: int | str) -> None:
    """Raise ValueError for another shape. Each of ``expected`` is a dimension's size, or a letter for any size."""
    fits = len(x.shape) == len(expected)
    for size, wanted in zip(x.shape, expected, strict=False):  # a generator would cost as much as a small kernel
        fits = fits and (isinstance(wanted, str) or wanted == size)
    if not fits:
        raise argument_error(argument, f"shape [{', '.join(map(str, expected))}]", list(x.shape))


def _check_broadcastable(argument: str, x: Tensor, *sizes: int) -> None:
    fits = len(x.shape) == len(sizes) and all(n in (1, size) for n, size in zip(x.shape, sizes, strict=True))
    if not fits:
        raise argument_error(argument, f"{len(sizes)} dims broadcastable to {list(sizes)}", list(x.shape))


def check_dtype(argument: str, x: Tensor, *expected: torch.dtype) -> None:
    """Raise ValueError unless a tensor has one of the dtypes."""
    if x.dtype not in expected:
        raise argument_error(argument, " or ".join(str(d) for d in dict.fromkeys(expected)), x.dtype)


def check_index_tensor(argument: str, x: Tensor, *sizes: int | str) -> None:
    """Raise ValueError unless a tensor is int32 or int64 and of this shape, as for :func:`check_shape`."""
    check_dtype(argument, x, torch.int32, torch.int64)
    check_shape(argument, x, *sizes)


def check_device(argument: str, x: Tensor | None, owner: str, device: torch.device) -> None:
    """Raise ValueError unless a tensor is on the device of the argument ``owner``, or None."""
    if x is not None and x.device != device:
        raise argument_error(argument, f"{owner}'s device {device}", x.device)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.shape[-1] <= 1 else x.contiguous()
