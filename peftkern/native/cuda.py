# SPDX-License-Identifier: Apache-2.0
"""The native CUDA library: found and loaded through ctypes, its structs filled, its statuses turned into exceptions.

As :mod:`.cpu`, with device pointers and torch's current stream. The library links no CUDA driver, so it
loads on a machine without a GPU; :data:`MISSING` says what is wrong with it, :func:`unsupported` what a device lacks.
"""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .cpu import DTYPES, NativeError, _attention_fields, _embedding_fields, _pointer

if TYPE_CHECKING:
    from ..arguments import AttentionArgs, AttentionGradients

__all__ = [
    "ABI_VERSION",
    "MISSING",
    "architectures",
    "kv_slot",
    "kv_slot_backward",
    "merge_prefix",
    "merge_prefix_backward",
    "prefix_attention",
    "prefix_attention_backward",
    "soft_prompt_embedding",
    "soft_prompt_embedding_backward",
    "softmax_sums",
    "unsupported",
]

#: Version of the structs below; the library must have the same.
ABI_VERSION = 3

_PATH = Path(__file__).parents[1] / "libpeftkern_cuda.so"
_BUILD = "with nvcc, run `PEFTKERN_BUILD=all pip install .` in a checkout, or use backend='triton'"

#: Where tensors must lie. The tests load a library that runs the kernels on a CPU.
DEVICE_TYPE = "cuda"

# The structs of peftkern.h; see :mod:`.cpu`.
_ATTENTION = struct.Struct("=62q3d12q")
_ATTENTION_BACKWARD = struct.Struct("=62q3d32q6q")
_SLOT = struct.Struct("=36q")
_SLOT_BACKWARD = struct.Struct("=15q")
_EMBEDDING = struct.Struct("=30q")


def _load() -> tuple[ctypes.CDLL | None, str]:
    if not _PATH.exists():
        return None, f"the native CUDA library is not built; {_BUILD}"
    try:
        library = ctypes.CDLL(str(_PATH))
        version = library.peftkern_cuda_abi_version()
    except (OSError, AttributeError) as error:
        return None, f"the native CUDA library does not load ({error}); {_BUILD}"
    if version != ABI_VERSION:
        return None, f"the native CUDA library has ABI {version}, this package needs {ABI_VERSION}; {_BUILD}"
    return declare(library), ""


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """``library`` with the types of its functions."""
    library.peftkern_cuda_error_string.restype = ctypes.c_char_p
    library.peftkern_cuda_architectures.restype = ctypes.c_char_p
    library.peftkern_cuda_workspace_size.restype = ctypes.c_int64
    library.peftkern_cuda_split_workspace_size.restype = ctypes.c_int64
    for name in (
        "merge_prefix",
        "merge_prefix_backward",
        "prefix_attention",
        "prefix_attention_backward",
        "workspace_size",
        "split_workspace_size",
        "softmax_sums",
        "kv_slot",
        "kv_slot_backward",
        "soft_prompt_embedding",
        "soft_prompt_embedding_backward",
    ):
        getattr(library, f"peftkern_cuda_{name}").argtypes = [ctypes.c_char_p]
    return library


_library, MISSING = _load()


def architectures() -> tuple[str, ...]:
    """What the library holds code for, named as in TORCH_CUDA_ARCH_LIST: ``("8.0", "9.0+PTX")``."""
    if _library is None:
        return ()
    return tuple(name for name in _library.peftkern_cuda_architectures().decode().split(",") if name)


def unsupported(major: int, minor: int) -> str:
    """Why the library has no code for a GPU of this compute capability, and what to do; empty if it has.

    Machine code runs on GPUs of its major version from its minor version on, PTX on every one from its version on;
    what is marked "a" on its own version only.
    """
    built = architectures()
    for name in built:
        number, plus, _ = name.partition("+PTX")
        version = tuple(int(x) for x in number.rstrip("af").split("."))
        same_major = version[0] == major and version[1] <= minor
        if version == (major, minor) or (
            not number.endswith("a") and (same_major or (plus and version <= (major, minor)))
        ):
            return ""
    if major < 8:
        return f"sm_{major}{minor} has no asynchronous copies: the kernels need compute capability 8.0"
    names = ", ".join("sm_" + name.replace(".", "") for name in built)
    return (
        f"this wheel has {names}; this GPU is sm_{major}{minor}: "
        f"rebuild with TORCH_CUDA_ARCH_LIST={major}.{minor} or use backend='triton'"
    )


def _call(name: str, arguments: bytes) -> None:
    if _library is None:
        raise NativeError(MISSING)
    status = getattr(_library, f"peftkern_cuda_{name}")(arguments)
    if status:
        raise NativeError(f"{name}: {_library.peftkern_cuda_error_string(status).decode()}")


def _queue(x: Tensor) -> tuple[int, int]:
    """Device and stream for work on ``x``."""
    if x.device.type != "cuda":
        return 0, 0
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()[:3]


def _fields(args: AttentionArgs, out: Tensor, lse: Tensor) -> tuple[list[int | float], object]:
    """The fields of ``peftkern_attention``, the gate by its tanh, and temporaries that must live until the call."""
    return _attention_fields(args._replace(gate=None if args.gate is None else args.gate.tanh()), out, lse, "auto")


def merge_prefix(
    args: AttentionArgs, part_out: Tensor | None, part_lse: Tensor | None, out: Tensor, lse: Tensor
) -> None:
    """Write ``out`` and ``lse`` (contiguous): prefix, sinks and ``part_out``, ``part_lse`` of the sequence.

    Raises:
        NativeError: with the library's reason.
    """
    fields, _kept = _fields(args, out, lse)
    fields += [
        _pointer(part_out), _pointer(part_lse), *_strides(part_out), *_strides(part_lse), 0, 0,
        *_queue(args.q),
    ]  # fmt: skip
    _call("merge_prefix", _ATTENTION.pack(*fields))


def prefix_attention(args: AttentionArgs, out: Tensor, lse: Tensor, split: bool = False) -> None:
    """Write ``out`` and ``lse`` (contiguous). ``split``: several blocks divide a row's keys; not with cu_seqlens.

    Raises:
        NativeError: with the library's reason.
    """
    if _library is None:
        raise NativeError(MISSING)
    fields, _kept = _fields(args, out, lse)
    fields += [0] * 8
    queue = _queue(args.q)
    size = _library.peftkern_cuda_split_workspace_size(_ATTENTION.pack(*fields, 0, 0, *queue)) if split else 0
    workspace = lse.new_empty(size // 4)
    _call("prefix_attention", _ATTENTION.pack(*fields, workspace.data_ptr() if size else 0, size, *queue))


def _backward(
    name: str, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, args: AttentionArgs,
    gradients: AttentionGradients, delta: Tensor | None, delta_is_given: bool,
) -> None:  # fmt: skip
    if _library is None:
        raise NativeError(MISSING)
    lse = lse.contiguous()
    fields, _kept = _fields(args, out, lse)
    wanted = [x if x.numel() else None for x in gradients[:5]]
    heads, prefix_len = args.q.shape[1], args.prefix_k.shape[-2]
    dbias = lse.new_empty(-(heads * prefix_len) // 4 * -4 if gradients.dprefix_bias.numel() else 0)
    fields += [
        dout.data_ptr(), _pointer(dlse), *map(_pointer, wanted), 0, 0, dbias.data_ptr() if dbias.numel() else 0, 0,
        *_strides(dout), *_strides(dlse), *(stride for x in wanted[:3] for stride in _strides(x)), *[0] * 6,
    ]  # fmt: skip
    queue = _queue(args.q)
    size = _library.peftkern_cuda_workspace_size(_ATTENTION_BACKWARD.pack(*fields, 0, 0, 0, delta_is_given, *queue))
    workspace = lse.new_empty(size // 4)
    pointers = _pointer(delta), workspace.data_ptr()
    _call(name, _ATTENTION_BACKWARD.pack(*fields, *pointers, size, delta_is_given, *queue))
    if dbias.numel():
        full = dbias[: heads * prefix_len].view(heads, prefix_len)
        gradients.dprefix_bias.copy_(full.sum_to_size(gradients.dprefix_bias.shape))


def merge_prefix_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, args: AttentionArgs, gradients: AttentionGradients,
    delta: Tensor | None = None,
) -> None:  # fmt: skip
    """Add the prefix's part to dq, write dprefix_k, dprefix_v and dprefix_bias; what is empty nobody needs.

    ``delta`` [B, Hq, S], contiguous, is that of :func:`softmax_sums`; dprefix_bias needs it. With a gate, ``out`` and
    ``lse`` are those of the prefix alone.

    Raises:
        NativeError: with the library's reason.
    """
    _backward("merge_prefix_backward", dout, dlse, out, lse, args, gradients, delta, delta is not None)


def prefix_attention_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, args: AttentionArgs, gradients: AttentionGradients,
    delta: Tensor, delta_is_given: bool = False,
) -> None:  # fmt: skip
    """Write dq, dk, dv, dprefix_k, dprefix_v and dprefix_bias; what is empty nobody needs.

    ``delta`` [B, Hq, S] is that of :func:`softmax_sums` or scratch memory.

    Raises:
        NativeError: with the library's reason.
    """
    _backward("prefix_attention_backward", dout, dlse, out, lse, args, gradients, delta, delta_is_given)


def softmax_sums(
    dout: Tensor, dlse: Tensor | None, lse: Tensor, args: AttentionArgs, delta: Tensor, sequence: bool = True
) -> None:
    """Write ``delta`` [B, Hq, S] = sum_j p_ij <dout_i, v_j> - dlse_i, contiguous: rowsum(out * dout) - dlse without
    the rounding of out. Over prefix and sequence, or the prefix alone; ``lse`` is that of the softmax.

    Raises:
        NativeError: with the library's reason.
    """
    lse = lse.contiguous()
    fields, _kept = _fields(args, args.q, lse)
    if not sequence:
        fields[1:3] = 0, 0
    fields += [dout.data_ptr(), _pointer(dlse), *[0] * 9, *_strides(dout), *_strides(dlse), *[0] * 15]
    _call("softmax_sums", _ATTENTION_BACKWARD.pack(*fields, delta.data_ptr(), 0, 0, 0, *_queue(args.q)))


def kv_slot(args: AttentionArgs, slot_k: Tensor, slot_v: Tensor) -> None:
    """Write [prefix | k] and [prefix | v] [B, Hkv, P + T, D].

    Raises:
        NativeError: with the library's reason.
    """
    prefix_k, prefix_v = (x if x.dim() == 4 else x[None] for x in (args.prefix_k, args.prefix_v))
    ids = None if args.prefix_ids is None else args.prefix_ids.contiguous()
    batch, kv_heads, kv_len, head_dim = args.k.shape
    tensors = (args.k, args.v, prefix_k, prefix_v, slot_k, slot_v)
    pointers = [x.data_ptr() for x in tensors]
    _call("kv_slot", _SLOT.pack(
        *pointers[:4], _pointer(ids), *pointers[4:],
        batch, kv_heads, kv_len, head_dim, prefix_k.shape[0], prefix_k.shape[2],
        *(stride for x in tensors for stride in _strides(x)),
        DTYPES[args.k.dtype], DTYPES[prefix_k.dtype], 0 if ids is None else DTYPES[ids.dtype], *_queue(args.k),
    ))  # fmt: skip


def kv_slot_backward(dslot: Tensor, prefix_ids: Tensor | None, total: Tensor) -> None:
    """Write ``total`` [A, Hkv, P, D] fp32, contiguous: sums over the batch of ``dslot`` [B, Hkv, P + T, D].

    Raises:
        NativeError: with the library's reason.
    """
    ids = None if prefix_ids is None else prefix_ids.contiguous()
    batch, kv_heads, _, head_dim = dslot.shape
    bank = total.shape[0] if total.dim() == 4 else 1
    _call("kv_slot_backward", _SLOT_BACKWARD.pack(
        dslot.data_ptr(), _pointer(ids), total.data_ptr(), batch, kv_heads, head_dim, bank, total.shape[-2],
        *_strides(dslot), DTYPES[dslot.dtype], 0 if ids is None else DTYPES[ids.dtype], *_queue(dslot),
    ))  # fmt: skip


def soft_prompt_embedding(
    input_ids: Tensor, weight: Tensor, prompt: Tensor, prompt_ids: Tensor | None, out: Tensor
) -> None:
    """Write ``out`` [B, P+S, E], contiguous.

    Raises:
        NativeError: with the library's reason.
    """
    prompt_ids = None if prompt_ids is None else prompt_ids.contiguous()
    fields = _embedding_fields(input_ids, weight, prompt, prompt_ids, out)
    _call("soft_prompt_embedding", _EMBEDDING.pack(*fields, *[0] * 5, *_queue(weight)))


def soft_prompt_embedding_backward(
    dout: Tensor, input_ids: Tensor, weight: Tensor, prompt: Tensor, prompt_ids: Tensor | None, dprompt: Tensor
) -> None:
    """Write ``dprompt``, fp32 and contiguous.

    Raises:
        NativeError: with the library's reason.
    """
    prompt_ids = None if prompt_ids is None else prompt_ids.contiguous()
    fields = _embedding_fields(input_ids, weight, prompt, prompt_ids, None)
    fields += [dout.data_ptr(), 0, dprompt.data_ptr(), *dout.stride()[:2]]
    _call("soft_prompt_embedding_backward", _EMBEDDING.pack(*fields, *_queue(weight)))
