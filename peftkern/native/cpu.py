# SPDX-License-Identifier: Apache-2.0
"""The native CPU library: found and loaded through ctypes, its structs filled, its statuses turned into exceptions.

``csrc/peftkern.h`` is the other side. A library that is missing or does not fit is no error here: :data:`MISSING`
says what is wrong and what to do, and :mod:`peftkern.backends.cpu` passes that on.
"""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..arguments import AttentionArgs, AttentionGradients

__all__ = [
    "ISAS",
    "MISSING",
    "NativeError",
    "available_isas",
    "default_isa",
    "philox4x32",
    "prefix_attention",
    "prefix_attention_backward",
    "soft_prompt_embedding",
    "soft_prompt_embedding_backward",
]

#: Version of the structs below; the library must have the same.
ABI_VERSION = 1

#: Instruction sets by name, as ``peftkern_isa`` numbers them.
ISAS = {"auto": 0, "portable": 1, "avx2": 2, "avx512": 3, "avx512_bf16": 4, "amx_bf16": 5}

#: Dtypes as ``peftkern_dtype`` numbers them.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int32: 3, torch.int64: 4}

_PATH = Path(__file__).parents[1] / "libpeftkern_cpu.so"
_BUILD = "with a C++ compiler, run `pip install .` or `cmake -S . -B build && cmake --build build` in a checkout"

# The structs of peftkern.h: every field is a 64-bit integer or pointer, but for three doubles.
_ATTENTION = struct.Struct("=62q3d")
_ATTENTION_BACKWARD = struct.Struct("=62q3d32q")
_EMBEDDING = struct.Struct("=23q")
_EMBEDDING_BACKWARD = struct.Struct("=28q")


class NativeError(RuntimeError):
    """The native library refused a call. The message carries its reason."""


def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason. Its OpenMP runtime is torch's, which is global to the process by now."""
    if not _PATH.exists():
        return None, f"the native CPU library is not built; {_BUILD}"
    try:
        library = ctypes.CDLL(str(_PATH))
        version = library.peftkern_abi_version()
    except (OSError, AttributeError) as error:
        return None, f"the native CPU library does not load ({error}); {_BUILD}"
    if version != ABI_VERSION:
        return None, f"the native CPU library has ABI {version}, this package needs {ABI_VERSION}; {_BUILD}"
    for name in ("error_string", "isa_name"):
        getattr(library, f"peftkern_{name}").restype = ctypes.c_char_p
    for name in (
        "prefix_attention",
        "prefix_attention_backward",
        "soft_prompt_embedding",
        "soft_prompt_embedding_backward",
    ):
        getattr(library, f"peftkern_{name}").argtypes = [ctypes.c_char_p]
    return library, ""


_library, MISSING = _load()


def _call(name: str, arguments: bytes) -> None:
    if _library is None:
        raise NativeError(MISSING)
    status = getattr(_library, f"peftkern_{name}")(arguments)
    if status:
        raise NativeError(f"{name}: {_library.peftkern_error_string(status).decode()}")


def available_isas() -> tuple[str, ...]:
    """Instruction sets that this processor and this build have, plainest first."""
    if _library is None:
        return ()
    return tuple(name for name, code in ISAS.items() if code and _library.peftkern_isa_available(code))


def default_isa(dtype: torch.dtype) -> str:
    """The instruction set that ``"auto"`` stands for."""
    if _library is None:
        raise NativeError(MISSING)
    return str(_library.peftkern_isa_name(_library.peftkern_isa_default(DTYPES[dtype])).decode())


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, ...]:
    """One block of Philox4x32-10, for known-answer tests."""
    if _library is None:
        raise NativeError(MISSING)
    out = (ctypes.c_uint32 * 4)()
    _library.peftkern_philox4x32((ctypes.c_uint32 * 4)(*counter), (ctypes.c_uint32 * 2)(*key), out)
    return tuple(out)


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _dtype(x: Tensor | None) -> int:
    return 0 if x is None else DTYPES[x.dtype]


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _broadcast_strides(x: Tensor | None, dims: int) -> tuple[int, ...]:
    """Strides, 0 where a dimension of size 1 stands for all."""
    if x is None:
        return (0,) * dims
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _attention_fields(
    args: AttentionArgs, out: Tensor, lse: Tensor, isa: str
) -> tuple[list[int | float], list[Tensor | None]]:
    """The fields of ``peftkern_attention``, and temporaries that must live until the call returns."""
    q, k, v, prefix_k, prefix_v = args[:5]
    sinks, gate, cu_seqlens, prefix_ids, prefix_lens = kept = [
        _contiguous(x) for x in (args.sinks, args.gate, args.cu_seqlens, args.prefix_ids, args.prefix_lens)
    ]
    bias, prefix_bias, key_mask = args.bias, args.prefix_bias, args.key_mask
    is_bank = prefix_k.dim() == 4
    bank_size = prefix_k.shape[0] if is_bank else 1
    batch, num_heads, q_len, head_dim = q.shape
    dropout_seed = 0 if args.dropout_seed is None else int(args.dropout_seed)
    fields: list[int | float] = [
        q.data_ptr(), k.data_ptr(), v.data_ptr(), prefix_k.data_ptr(), prefix_v.data_ptr(), _pointer(sinks),
        _pointer(bias), _pointer(prefix_bias), _pointer(gate), _pointer(key_mask), _pointer(cu_seqlens),
        _pointer(prefix_ids), _pointer(prefix_lens), out.data_ptr(), lse.data_ptr(),
        batch, num_heads, k.shape[1], q_len, k.shape[2], head_dim, bank_size, prefix_k.shape[-2],
        0 if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *(prefix_k.stride()[:3] if is_bank else (0, *prefix_k.stride()[:2])),
        *(prefix_v.stride()[:3] if is_bank else (0, *prefix_v.stride()[:2])),
        *_broadcast_strides(bias, 4), *_broadcast_strides(prefix_bias, 2),
        *((0, 0) if key_mask is None else key_mask.stride()),
        *out.stride()[:3],
        DTYPES[q.dtype], DTYPES[prefix_k.dtype], _dtype(bias), _dtype(cu_seqlens), _dtype(prefix_ids),
        _dtype(prefix_lens), args.causal, args.window or 0, args.prefix_in_window,
        dropout_seed, torch.get_num_threads(), ISAS[isa], args.scale, args.softcap, args.dropout_p,
    ]  # fmt: skip
    return fields, kept


def prefix_attention(args: AttentionArgs, out: Tensor, lse: Tensor, isa: str = "auto") -> None:
    """Write ``out`` and ``lse`` (contiguous), laid out by :func:`peftkern.backends.allocate_outputs`.

    Args:
        isa: a key of :data:`ISAS`.

    Raises:
        NativeError: with the library's reason.
    """
    fields, _kept = _attention_fields(args, out, lse, isa)
    _call("prefix_attention", _ATTENTION.pack(*fields))


def prefix_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    args: AttentionArgs,
    gradients: AttentionGradients,
    needs: list[bool],
    isa: str = "auto",
) -> None:
    """Write those of ``gradients`` that ``needs`` (nine flags) asks for.

    Raises:
        NativeError: with the library's reason.
    """
    lse = lse.contiguous()
    fields, _kept = _attention_fields(args, out, lse, isa)
    pointers = [g.data_ptr() if need else 0 for g, need in zip(gradients, needs, strict=True)]
    dq, dk, dv = gradients[:3]
    none = (0, 0, 0)
    fields += [
        dout.data_ptr(), _pointer(dlse), *pointers[:6], pointers[6], *pointers[7:],
        *dout.stride()[:3], *(none if dlse is None else dlse.stride()),
        *(dq.stride()[:3] if needs[0] else none), *(dk.stride()[:3] if needs[1] else none),
        *(dv.stride()[:3] if needs[2] else none),
        *((0, 0, 0, 0) if args.bias is None else args.bias.shape),
        *((0, 0) if args.prefix_bias is None else args.prefix_bias.shape),
    ]  # fmt: skip
    _call("prefix_attention_backward", _ATTENTION_BACKWARD.pack(*fields))


def _embedding_fields(
    input_ids: Tensor, weight: Tensor, prompt: Tensor, prompt_ids: Tensor | None, out: Tensor | None
) -> list[int]:
    bank_size = 1 if prompt_ids is None else prompt.shape[0]
    return [
        input_ids.data_ptr(), weight.data_ptr(), prompt.data_ptr(), _pointer(prompt_ids), _pointer(out),
        *input_ids.shape, *weight.shape, bank_size, prompt.shape[-2],
        *input_ids.stride(), *weight.stride(), *((0,) * (3 - prompt.dim())), *prompt.stride(),
        DTYPES[weight.dtype], DTYPES[prompt.dtype], DTYPES[input_ids.dtype], _dtype(prompt_ids),
        torch.get_num_threads(),
    ]  # fmt: skip


def soft_prompt_embedding(
    input_ids: Tensor, weight: Tensor, prompt: Tensor, prompt_ids: Tensor | None, out: Tensor
) -> None:
    """Write ``out`` [B, P+S, E], contiguous.

    Raises:
        NativeError: with the library's reason.
    """
    prompt_ids = _contiguous(prompt_ids)
    _call("soft_prompt_embedding", _EMBEDDING.pack(*_embedding_fields(input_ids, weight, prompt, prompt_ids, out)))


def soft_prompt_embedding_backward(
    dout: Tensor,
    input_ids: Tensor,
    weight: Tensor,
    prompt: Tensor,
    prompt_ids: Tensor | None,
    dweight: Tensor | None,
    dprompt: Tensor | None,
) -> None:
    """Write the gradients that are given, fp32 and contiguous.

    Raises:
        NativeError: with the library's reason.
    """
    prompt_ids = _contiguous(prompt_ids)
    fields = _embedding_fields(input_ids, weight, prompt, prompt_ids, None)
    fields += [dout.data_ptr(), _pointer(dweight), _pointer(dprompt), *dout.stride()[:2]]
    _call("soft_prompt_embedding_backward", _EMBEDDING_BACKWARD.pack(*fields))
