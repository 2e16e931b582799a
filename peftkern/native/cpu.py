# SPDX-License-Identifier: Apache-2.0
"""The native CPU library through ctypes: loads it, fills its structs, turns its statuses into exceptions.

:mod:`.abi` declares the structs. A missing or unsuitable library is not an import error: :data:`MISSING` says what
is wrong and how to fix it, and :mod:`peftkern.backends.cpu` reports that as its reason.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import abi, fill
from .abi import DTYPES, ISAS

if TYPE_CHECKING:
    from ..arguments import AttentionArgs, AttentionGradients

__all__ = [
    "DTYPES",
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

#: The version that the library must report.
ABI_VERSION = abi.CPU_VERSION

_PATH = Path(__file__).parents[1] / "libpeftkern_cpu.so"
_BUILD = (
    "If a C++ compiler is installed, run `pip install .` in a checkout, "
    "or `cmake -S . -B build && cmake --build build`"
)


class NativeError(RuntimeError):
    """A native library rejected a call. The message contains the library's reason."""


def _load() -> tuple[ctypes.CDLL | None, str]:
    """Return the library and an empty string, or None and the reason.

    The library uses torch's OpenMP runtime, whose symbols are global in the process once torch is imported.
    """
    if not _PATH.exists():
        return None, f"the native CPU library is not built. {_BUILD}"
    try:
        library = ctypes.CDLL(str(_PATH))
        version = library.peftkern_abi_version()
    except (OSError, AttributeError) as error:
        return None, f"the native CPU library does not load ({error}); {_BUILD}"
    if version != ABI_VERSION:
        return None, f"the native CPU library has ABI {version}, this package needs {ABI_VERSION}; {_BUILD}"
    for name in ("error_string", "isa_name"):
        getattr(library, f"peftkern_{name}").restype = ctypes.c_char_p
    for name in abi.CPU_FUNCTIONS:
        getattr(library, f"peftkern_{name}").argtypes = [ctypes.c_char_p]
    return library, ""


_library, MISSING = _load()


_functions = {} if _library is None else {name: getattr(_library, f"peftkern_{name}") for name in abi.CPU_FUNCTIONS}


def _call(name: str, arguments: bytes) -> None:
    if _library is None:
        raise NativeError(MISSING)
    status = _functions[name](arguments)
    if status:
        raise NativeError(f"{name}: {_library.peftkern_error_string(status).decode()}")


def available_isas() -> tuple[str, ...]:
    """Names of the instruction sets that both this processor and this build support, plainest first."""
    if _library is None:
        return ()
    return tuple(name for name, code in ISAS.items() if code and _library.peftkern_isa_available(code))


def default_isa(dtype: torch.dtype) -> str:
    """The instruction set that ``"auto"`` selects for ``dtype``."""
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


def prefix_attention(
    args: AttentionArgs,
    out: Tensor,
    lse: Tensor,
    isa: str = "auto",
    constants: bytes | None = None,
    rows: Tensor | None = None,
) -> None:
    """Write the attention's ``out`` and ``lse``, which :func:`peftkern.arguments.allocate_outputs` allocates.

    Args:
        out: [B, Hq, S, D_v] in q's dtype, with stride 1 along D_v.
        lse: [B, Hq, S], fp32, contiguous.
        isa: a key of :data:`ISAS`. One that is not ``"auto"`` wins over that of ``constants``.
        constants: those of :func:`.fill.attention_constants` for such a call, if known.
        rows: ``prefix_rows`` of ``peftkern_attention``, int64 [C, P, 2], contiguous. ``prefix_ids`` and
            ``prefix_lens`` of ``args`` then speak of its C prefixes.

    Raises:
        NativeError: with the library's reason.
    """
    if constants is None or isa != "auto":
        constants = fill.attention_constants(args, out.stride(), isa, rows)
    tensors, _copies = fill.attention_tensors(args, out, lse, rows=rows)
    _call("prefix_attention", tensors + constants)


def prefix_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    args: AttentionArgs,
    gradients: AttentionGradients,
    isa: str = "auto",
    constants: fill.BackwardConstants | None = None,
    rows: Tensor | None = None,
) -> None:
    """Write those of the nine ``gradients`` that have elements.

    Args:
        out: the forward's result, as is ``lse``.
        isa: a key of :data:`ISAS`. One that is not ``"auto"`` wins over that of ``constants``.
        constants: those of :func:`.fill.backward_constants` for such a call, if known.
        rows: as in :func:`prefix_attention`; dprefix_k is [C, Hkv, P, D] and dprefix_v [C, Hkv, P, D_v] then.

    Raises:
        NativeError: with the library's reason.
    """
    lse = lse.contiguous()
    if constants is None or isa != "auto":
        constants = fill.backward_constants(dout, dlse, out, args, gradients, isa, rows)
    forward, layout = constants
    tensors, _copies = fill.attention_tensors(args, out, lse, rows=rows)
    dq, dk, dv, dprefix_k, dprefix_v, dsinks, dbias, dprefix_bias, dgate = gradients
    gradient_tensors = abi.GRADIENT_TENSORS.pack(
        dout=dout.data_ptr(),
        dlse=0 if dlse is None else dlse.data_ptr(),
        dq=dq.data_ptr(),  # 0 without elements
        dk=dk.data_ptr(),
        dv=dv.data_ptr(),
        dprefix_k=dprefix_k.data_ptr(),
        dprefix_v=dprefix_v.data_ptr(),
        dsinks=dsinks.data_ptr(),
        dbias=dbias.data_ptr(),
        dprefix_bias=dprefix_bias.data_ptr(),
        dgate=dgate.data_ptr(),
    )
    _call("prefix_attention_backward", tensors + forward + gradient_tensors + layout)


def soft_prompt_embedding(
    input_ids: Tensor, weight: Tensor, prompt: Tensor, prompt_ids: Tensor | None, out: Tensor
) -> None:
    """Write ``out`` [B, P+S, E], contiguous, in the dtype of ``weight``.

    Raises:
        NativeError: with the library's reason.
    """
    prompt_ids = fill.contiguous(prompt_ids)
    _call("soft_prompt_embedding", fill.embedding(input_ids, weight, prompt, prompt_ids, out))


def soft_prompt_embedding_backward(
    dout: Tensor,
    input_ids: Tensor,
    weight: Tensor,
    prompt: Tensor,
    prompt_ids: Tensor | None,
    dweight: Tensor | None,
    dprompt: Tensor | None,
) -> None:
    """Write ``dweight`` and ``dprompt``, fp32 and contiguous. None stands for a gradient that is not needed.

    Raises:
        NativeError: with the library's reason.
    """
    prompt_ids = fill.contiguous(prompt_ids)
    packed = abi.EMBEDDING_BACKWARD.pack(
        forward=fill.embedding(input_ids, weight, prompt, prompt_ids, None),
        dout=dout.data_ptr(),
        dweight=fill.pointer(dweight),
        dprompt=fill.pointer(dprompt),
        dout_stride=dout.stride()[:2],
    )
    _call("soft_prompt_embedding_backward", packed)
