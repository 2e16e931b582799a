# SPDX-License-Identifier: Apache-2.0
"""The native CUDA library through ctypes: loads it, fills its structs, turns its statuses into exceptions.

Works as :mod:`.cpu` does, with device pointers and torch's current stream. The library does not link the CUDA driver,
so it loads on a machine without a GPU. :data:`MISSING` says what is wrong with the library, :func:`unsupported` what
a device lacks.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import abi, fill
from .abi import DTYPES
from .cpu import NativeError

if TYPE_CHECKING:
    from ..arguments import AttentionArgs, AttentionGradients

__all__ = [
    "ABI_VERSION",
    "MISSING",
    "architectures",
    "concat",
    "concat_backward",
    "merge_prefix",
    "merge_prefix_backward",
    "prefix_attention",
    "prefix_attention_backward",
    "soft_prompt_embedding",
    "soft_prompt_embedding_backward",
    "softmax_sums",
    "unsupported",
]

#: The version that the library must report.
ABI_VERSION = abi.CUDA_VERSION

_PATH = Path(__file__).parents[1] / "libpeftkern_cuda.so"
_BUILD = "If nvcc is installed, run `PEFTKERN_BUILD=all pip install .` in a checkout, or use backend='triton'"

#: The device type of the tensors. Tests load a library that runs the kernels on a CPU, and set this to "cpu".
DEVICE_TYPE = "cuda"


def _load() -> tuple[ctypes.CDLL | None, str]:
    """Return the library and an empty string, or None and the reason."""
    if not _PATH.exists():
        return None, f"the native CUDA library is not built. {_BUILD}"
    try:
        library = ctypes.CDLL(str(_PATH))
        version = library.peftkern_cuda_abi_version()
    except (OSError, AttributeError) as error:
        return None, f"the native CUDA library does not load ({error}); {_BUILD}"
    if version != ABI_VERSION:
        return None, f"the native CUDA library has ABI {version}, this package needs {ABI_VERSION}; {_BUILD}"
    return declare(library), ""


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Set the argument and result types of the functions of ``library``, and return it."""
    library.peftkern_cuda_error_string.restype = ctypes.c_char_p
    library.peftkern_cuda_architectures.restype = ctypes.c_char_p
    for name in abi.CUDA_FUNCTIONS:
        function = getattr(library, f"peftkern_cuda_{name}")
        function.argtypes = [ctypes.c_char_p]
        function.restype = ctypes.c_int64 if name.endswith("_size") else ctypes.c_int
    return library


_library, MISSING = _load()


def architectures() -> tuple[str, ...]:
    """Compute capabilities that the library holds code for, as in TORCH_CUDA_ARCH_LIST: ``("8.0", "9.0+PTX")``."""
    if _library is None:
        return ()
    return tuple(name for name in _library.peftkern_cuda_architectures().decode().split(",") if name)


def unsupported(major: int, minor: int) -> str:
    """Why the library has no code for a GPU of this compute capability, and what to do. Empty if it has code.

    Machine code runs on GPUs of the same major version and the same or a later minor version. PTX runs on every GPU
    of the same or a later version. Code for a version with the suffix "a" runs on that version only.
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


def _device_and_stream(x: Tensor) -> tuple[int, int]:
    """The index of the device of ``x`` and the handle of torch's current stream on it."""
    if x.device.type != "cuda":
        return 0, 0
    return x.device.index, torch._C._cuda_getCurrentRawStream(x.device.index)


def _attention(args: AttentionArgs, out: Tensor, lse: Tensor, *, sequence: bool = True) -> tuple[bytes, object]:
    """:func:`.fill.attention` with the gate replaced by its tanh, as the kernels expect it."""
    if args.gate is not None:
        args = args._replace(gate=args.gate.tanh())
    return fill.attention(args, out, lse, sequence=sequence)


def _prefix_start(args: AttentionArgs) -> int:
    """The hint as the library takes it: -1 for unknown."""
    return -1 if args.prefix_start is None else args.prefix_start


def merge_prefix(
    args: AttentionArgs, part_out: Tensor | None, part_lse: Tensor | None, out: Tensor, lse: Tensor
) -> None:
    """Write ``out`` and ``lse`` of the prefix, the sinks and an attention over the sequence, merged.

    Args:
        part_out: [B, Hq, S, D], the attention over the sequence alone; None: there is no sequence. May be ``out``.
        part_lse: [B, Hq, S], fp32, its log-sum-exp (natural logarithm), any strides. May be ``lse``.
        out: [B, Hq, S, D] in q's dtype.
        lse: [B, Hq, S], fp32, contiguous.

    Raises:
        NativeError: with the library's reason.
    """
    attention, _copies = _attention(args, out, lse)
    device, stream = _device_and_stream(args.q)
    packed = abi.CUDA_ATTENTION.pack(
        attention=attention,
        part_out=fill.pointer(part_out),
        part_lse=fill.pointer(part_lse),
        part_out_stride=fill.strides(part_out),
        part_lse_stride=fill.strides(part_lse),
        workspace=0,
        workspace_size=0,
        prefix_start=_prefix_start(args),
        device=device,
        stream=stream,
    )
    _call("merge_prefix", packed)


def prefix_attention(args: AttentionArgs, out: Tensor, lse: Tensor, split: bool = False) -> None:
    """Write ``out`` and ``lse`` (contiguous) of the whole attention.

    Args:
        split: several blocks share the keys of a row, which pays for few rows and many keys. Not with cu_seqlens.

    Raises:
        NativeError: with the library's reason.
    """
    if _library is None:
        raise NativeError(MISSING)
    attention, _copies = _attention(args, out, lse)
    device, stream = _device_and_stream(args.q)

    def pack(workspace: int, size: int) -> bytes:
        return abi.CUDA_ATTENTION.pack(
            attention=attention,
            part_out=0,
            part_lse=0,
            part_out_stride=(0, 0, 0),
            part_lse_stride=(0, 0, 0),
            workspace=workspace,
            workspace_size=size,
            prefix_start=-1,
            device=device,
            stream=stream,
        )

    size = _library.peftkern_cuda_split_workspace_size(pack(0, 0)) if split else 0
    workspace = lse.new_empty(size // 4) if size else None
    _call("prefix_attention", pack(fill.pointer(workspace), size))


def _attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    args: AttentionArgs,
    gradients: AttentionGradients | None,
    dprefix_bias: Tensor | None,
    *,
    sequence: bool = True,
) -> tuple[bytes, object]:
    """``peftkern_attention_backward`` as bytes, and an object that must stay alive until the call returns."""
    forward, copies = _attention(args, out, lse, sequence=sequence)
    dq, dk, dv, dprefix_k, dprefix_v = (
        (None,) * 5 if gradients is None else (x if x.numel() else None for x in gradients[:5])
    )
    tensors = abi.GRADIENT_TENSORS.pack(
        dout=dout.data_ptr(),
        dlse=fill.pointer(dlse),
        dq=fill.pointer(dq),
        dk=fill.pointer(dk),
        dv=fill.pointer(dv),
        dprefix_k=fill.pointer(dprefix_k),
        dprefix_v=fill.pointer(dprefix_v),
        dsinks=0,
        dbias=0,
        dprefix_bias=fill.pointer(dprefix_bias),
        dgate=0,
    )
    layout = abi.GRADIENT_LAYOUT.pack(
        dout_stride=fill.strides(dout),
        dlse_stride=fill.strides(dlse),
        dq_stride=fill.strides(dq),
        dk_stride=fill.strides(dk),
        dv_stride=fill.strides(dv),
        bias_size=(0, 0, 0, 0),
        prefix_bias_size=(0, 0),
    )
    return forward + tensors + layout, copies


def _backward(
    name: str, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, args: AttentionArgs,
    gradients: AttentionGradients, delta: Tensor | None, delta_is_given: bool,
) -> None:  # fmt: skip
    """Allocate the workspace, call the backward ``name`` and sum dprefix_bias over its broadcast dimensions."""
    if _library is None:
        raise NativeError(MISSING)
    lse = lse.contiguous()
    heads, prefix_len = args.q.shape[1], args.prefix_k.shape[-2]
    dprefix_bias = None
    if gradients.dprefix_bias.numel():
        dprefix_bias = lse.new_empty((heads * prefix_len + 3) // 4 * 4)  # the kernels write 16 bytes at a time
    backward, _copies = _attention_backward(dout, dlse, out, lse, args, gradients, dprefix_bias)
    device, stream = _device_and_stream(args.q)

    def pack(workspace: int, size: int) -> bytes:
        return abi.CUDA_ATTENTION_BACKWARD.pack(
            backward=backward,
            delta=fill.pointer(delta),
            workspace=workspace,
            workspace_size=size,
            delta_is_given=delta_is_given,
            prefix_start=_prefix_start(args),
            device=device,
            stream=stream,
        )

    size = _library.peftkern_cuda_workspace_size(pack(0, 0))
    workspace = lse.new_empty(size // 4)
    _call(name, pack(workspace.data_ptr(), size))
    if dprefix_bias is not None:
        full = dprefix_bias[: heads * prefix_len].view(heads, prefix_len)
        gradients.dprefix_bias.copy_(full.sum_to_size(gradients.dprefix_bias.shape))


def merge_prefix_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, args: AttentionArgs, gradients: AttentionGradients,
    delta: Tensor | None = None,
) -> None:  # fmt: skip
    """Add the prefix's part to dq and write dprefix_k, dprefix_v and dprefix_bias.

    Args:
        out: the merged result, as is ``lse``. With a gate, both are those of the prefix alone.
        gradients: an empty tensor stands for a gradient that is not needed.
        delta: [B, Hq, S], fp32, contiguous: the result of :func:`softmax_sums`. dprefix_bias requires it.

    Raises:
        NativeError: with the library's reason.
    """
    _backward("merge_prefix_backward", dout, dlse, out, lse, args, gradients, delta, delta is not None)


def prefix_attention_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, args: AttentionArgs, gradients: AttentionGradients,
    delta: Tensor, delta_is_given: bool = False,
) -> None:  # fmt: skip
    """Write dq, dk, dv, dprefix_k, dprefix_v and dprefix_bias.

    Args:
        gradients: an empty tensor stands for a gradient that is not needed.
        delta: [B, Hq, S], fp32, contiguous: the result of :func:`softmax_sums`, or else scratch memory.
        delta_is_given: which of the two ``delta`` is.

    Raises:
        NativeError: with the library's reason.
    """
    _backward("prefix_attention_backward", dout, dlse, out, lse, args, gradients, delta, delta_is_given)


def softmax_sums(
    dout: Tensor, dlse: Tensor | None, lse: Tensor, args: AttentionArgs, delta: Tensor, sequence: bool = True
) -> None:
    """Write ``delta`` [B, Hq, S], fp32, contiguous: sum_j p_ij <dout_i, v_j> - dlse_i.

    This is rowsum(out * dout) - dlse without the rounding of out to half precision.

    Args:
        lse: [B, Hq, S], that of the softmax that is summed.
        sequence: sum over prefix and sequence; False: over the prefix alone.

    Raises:
        NativeError: with the library's reason.
    """
    lse = lse.contiguous()
    backward, _copies = _attention_backward(dout, dlse, args.q, lse, args, None, None, sequence=sequence)
    device, stream = _device_and_stream(args.q)
    packed = abi.CUDA_ATTENTION_BACKWARD.pack(
        backward=backward,
        delta=delta.data_ptr(),
        workspace=0,
        workspace_size=0,
        delta_is_given=False,
        prefix_start=-1,
        device=device,
        stream=stream,
    )
    _call("softmax_sums", packed)


def concat(args: AttentionArgs, out_k: Tensor, out_v: Tensor) -> None:
    """Write ``out_k`` = [prefix_k | k] and ``out_v`` = [prefix_v | v], [B, Hkv, P + T, D].

    Raises:
        NativeError: with the library's reason.
    """
    k, v = args.k, args.v
    prefix_k, prefix_v = (x if x.dim() == 4 else x[None] for x in (args.prefix_k, args.prefix_v))
    prefix_ids = fill.contiguous(args.prefix_ids)
    batch, num_kv_heads, kv_len, head_dim = k.shape
    device, stream = _device_and_stream(k)
    packed = abi.CUDA_CONCAT.pack(
        k=k.data_ptr(),
        v=v.data_ptr(),
        prefix_k=prefix_k.data_ptr(),
        prefix_v=prefix_v.data_ptr(),
        prefix_ids=fill.pointer(prefix_ids),
        out_k=out_k.data_ptr(),
        out_v=out_v.data_ptr(),
        batch=batch,
        num_kv_heads=num_kv_heads,
        kv_len=kv_len,
        head_dim=head_dim,
        bank_size=prefix_k.shape[0],
        prefix_len=prefix_k.shape[2],
        k_stride=fill.strides(k),
        v_stride=fill.strides(v),
        prefix_k_stride=fill.strides(prefix_k),
        prefix_v_stride=fill.strides(prefix_v),
        out_k_stride=fill.strides(out_k),
        out_v_stride=fill.strides(out_v),
        dtype=DTYPES[k.dtype],
        prefix_dtype=DTYPES[prefix_k.dtype],
        prefix_ids_dtype=fill.dtype_code(prefix_ids),
        device=device,
        stream=stream,
    )
    _call("concat", packed)


def concat_backward(dout: Tensor, prefix_ids: Tensor | None, dprefix: Tensor) -> None:
    """Write ``dprefix``, [A, Hkv, P, D] or [Hkv, P, D], fp32, contiguous, from that of ``out_k`` or ``out_v``.

    Args:
        dout: [B, Hkv, at least P, D]. Its first P rows are summed over the samples of each prefix.

    Raises:
        NativeError: with the library's reason.
    """
    prefix_ids = fill.contiguous(prefix_ids)
    batch, num_kv_heads, _, head_dim = dout.shape
    device, stream = _device_and_stream(dout)
    packed = abi.CUDA_CONCAT_BACKWARD.pack(
        dout=dout.data_ptr(),
        prefix_ids=fill.pointer(prefix_ids),
        dprefix=dprefix.data_ptr(),
        batch=batch,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        bank_size=dprefix.shape[0] if dprefix.dim() == 4 else 1,
        prefix_len=dprefix.shape[-2],
        dout_stride=fill.strides(dout),
        dtype=DTYPES[dout.dtype],
        prefix_ids_dtype=fill.dtype_code(prefix_ids),
        device=device,
        stream=stream,
    )
    _call("concat_backward", packed)


def _embedding(forward: bytes, dout: Tensor | None, dprompt: Tensor | None, weight: Tensor) -> bytes:
    device, stream = _device_and_stream(weight)
    backward = abi.EMBEDDING_BACKWARD.pack(
        forward=forward,
        dout=fill.pointer(dout),
        dweight=0,
        dprompt=fill.pointer(dprompt),
        dout_stride=(0, 0) if dout is None else dout.stride()[:2],
    )
    return abi.CUDA_EMBEDDING.pack(backward=backward, device=device, stream=stream)


def soft_prompt_embedding(
    input_ids: Tensor, weight: Tensor, prompt: Tensor, prompt_ids: Tensor | None, out: Tensor
) -> None:
    """Write ``out`` [B, P+S, E], contiguous. A token outside the vocabulary becomes a row of NaN.

    Raises:
        NativeError: with the library's reason.
    """
    prompt_ids = fill.contiguous(prompt_ids)
    forward = fill.embedding(input_ids, weight, prompt, prompt_ids, out)
    _call("soft_prompt_embedding", _embedding(forward, None, None, weight))


def soft_prompt_embedding_backward(
    dout: Tensor, input_ids: Tensor, weight: Tensor, prompt: Tensor, prompt_ids: Tensor | None, dprompt: Tensor
) -> None:
    """Write ``dprompt``, fp32 and contiguous.

    Raises:
        NativeError: with the library's reason.
    """
    prompt_ids = fill.contiguous(prompt_ids)
    forward = fill.embedding(input_ids, weight, prompt, prompt_ids, None)
    _call("soft_prompt_embedding_backward", _embedding(forward, dout, dprompt, weight))
