# SPDX-License-Identifier: Apache-2.0
"""The structs, enums, functions and versions of ``csrc/peftkern.h``, by name.

Each struct is declared once, as the header declares it: fields in order, with their kind and array length. The
format of :class:`struct.Struct` and the function that fills it follow from the declaration. Every field is eight
bytes wide, so structs have no padding. ``tests/native/test_abi.py`` compares all of this with the header.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

__all__ = [
    "CPU_FUNCTIONS",
    "CPU_VERSION",
    "CUDA_FUNCTIONS",
    "CUDA_VERSION",
    "DTYPES",
    "ISAS",
    "Field",
    "Status",
    "Struct",
]

#: Versions of the structs and functions below. Each library reports its own and must match.
CPU_VERSION = 3
CUDA_VERSION = 6

#: Instruction sets by name, as ``peftkern_isa`` numbers them.
ISAS = {
    "auto": 0, "portable": 1, "avx2": 2, "avx512": 3, "avx512_bf16": 4, "amx_bf16": 5, "sve256": 6, "neon_bf16": 7,
}  # fmt: skip

#: Dtypes as ``peftkern_dtype`` numbers them.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int32: 3, torch.int64: 4}


class Status(enum.IntEnum):
    """``peftkern_status``: the result of every call."""

    OK = 0
    INVALID_ARGUMENT = 1
    UNSUPPORTED_ISA = 2
    OUT_OF_MEMORY = 3
    MISALIGNED = 4
    SHARED_MEMORY = 5
    CUDA_ERROR = 1000  # plus a cudaError_t


@dataclass(frozen=True)
class Field:
    """One field of a struct. ``kind`` is another :class:`Struct` where that is embedded."""

    name: str
    kind: Literal["pointer", "int64", "double"] | Struct
    count: int = 1

    @property
    def format(self) -> str:
        """The characters of :mod:`struct` for this field."""
        if isinstance(self.kind, Struct):
            return f"{self.kind.size}s"
        return f"{self.count}{'d' if self.kind == 'double' else 'q'}"


class Struct:
    """A struct of the C ABI.

    Attributes:
        name: its name in the header. Empty for a group of fields of the struct that it is embedded in.
        fields: its fields in the header's order.
        size: its size in bytes.
        pack: returns the struct as bytes. Takes every field by name: a number, a sequence of ``count`` numbers for an
            array, or bytes for an embedded struct. A missing or unknown name is a ``TypeError``, a wrong total of
            numbers a ``struct.error``.
    """

    def __init__(self, name: str, *groups: tuple[Field, ...]) -> None:
        self.name = name
        self.fields = tuple(field for group in groups for field in group)
        compiled = struct.Struct("=" + "".join(field.format for field in self.fields))
        self.size = compiled.size
        self.pack = self._packer(compiled.pack)

    def _packer(self, pack: Callable[..., bytes]) -> Callable[..., bytes]:
        """A function with one keyword per field that packs all of them in one call.

        It is generated, as :func:`collections.namedtuple` generates ``__new__``: host time per attention call is a
        few microseconds, and a loop over the fields would double it.
        """
        names = ", ".join(field.name for field in self.fields)
        values = ", ".join(field.name if field.count == 1 else f"*{field.name}" for field in self.fields)
        namespace: dict[str, Callable[..., bytes]] = {"_pack": pack}
        exec(f"def pack(*, {names}):\n return _pack({values})", namespace)
        return namespace["pack"]

    def members(self) -> Iterator[Field]:
        """The fields as the header lists them: those of nameless groups one by one."""
        for field in self.fields:
            if isinstance(field.kind, Struct) and not field.kind.name:
                yield from field.kind.members()
            else:
                yield field


def _declare(kind: Literal["pointer", "int64", "double"], declarations: str) -> tuple[Field, ...]:
    """Fields of one kind from their C declarators: ``"batch q_stride[3]"``."""

    def parse() -> Iterator[Field]:
        for declarator in declarations.split():
            name, _, count = declarator.rstrip("]").partition("[")
            yield Field(name, kind, int(count or 1))

    return tuple(parse())


def _pointers(declarations: str) -> tuple[Field, ...]:
    return _declare("pointer", declarations)


def _int64(declarations: str) -> tuple[Field, ...]:
    return _declare("int64", declarations)


def _double(declarations: str) -> tuple[Field, ...]:
    return _declare("double", declarations)


def _embedded(name: str, kind: Struct) -> tuple[Field, ...]:
    return (Field(name, kind),)


# The larger structs are packed in groups: Python matches keywords by a linear search, and a call with more than 15 of
# them takes longer than packing.
ATTENTION_TENSORS = Struct(
    "",
    _pointers("q k v prefix_k prefix_v sinks bias prefix_bias gate"),
    _pointers("key_mask cu_seqlens prefix_ids prefix_lens prefix_rows out lse"),
)
ATTENTION_LAYOUT = Struct(
    "",
    _int64("batch num_heads num_kv_heads q_len kv_len head_dim value_dim bank_size prefix_len"),
    _int64("num_sequences source_size source_len"),
    _int64("q_stride[3] k_stride[3] v_stride[3] prefix_k_stride[3] prefix_v_stride[3]"),
    _int64("bias_stride[4] prefix_bias_stride[2] key_mask_stride[2] out_stride[3]"),
)
ATTENTION_OPTIONS = Struct(
    "",
    _int64("dtype prefix_dtype bias_dtype cu_seqlens_dtype prefix_ids_dtype prefix_lens_dtype"),
    _int64("causal window prefix_in_window dropout_seed num_threads isa"),
    _double("scale softcap dropout_p"),
)
ATTENTION = Struct(
    "peftkern_attention",
    _embedded("tensors", ATTENTION_TENSORS),
    _embedded("layout", ATTENTION_LAYOUT),
    _embedded("options", ATTENTION_OPTIONS),
)
GRADIENT_TENSORS = Struct("", _pointers("dout dlse dq dk dv dprefix_k dprefix_v dsinks dbias dprefix_bias dgate"))
GRADIENT_LAYOUT = Struct(
    "",
    _int64("dout_stride[3] dlse_stride[3] dq_stride[3] dk_stride[3] dv_stride[3]"),
    _int64("bias_size[4] prefix_bias_size[2]"),
)
ATTENTION_BACKWARD = Struct(
    "peftkern_attention_backward",
    _embedded("forward", ATTENTION),
    _embedded("tensors", GRADIENT_TENSORS),
    _embedded("layout", GRADIENT_LAYOUT),
)
EMBEDDING = Struct(
    "peftkern_embedding",
    _pointers("input_ids weight prompt prompt_ids out"),
    _int64("batch seq_len vocab_size dim bank_size prompt_len"),
    _int64("input_ids_stride[2] weight_stride[2] prompt_stride[3]"),
    _int64("dtype prompt_dtype input_ids_dtype prompt_ids_dtype num_threads"),
)
EMBEDDING_BACKWARD = Struct(
    "peftkern_embedding_backward",
    _embedded("forward", EMBEDDING),
    _pointers("dout dweight dprompt"),
    _int64("dout_stride[2]"),
)
CUDA_ATTENTION = Struct(
    "peftkern_cuda_attention",
    _embedded("attention", ATTENTION),
    _pointers("part_out part_lse"),
    _int64("part_out_stride[3] part_lse_stride[3]"),
    _pointers("workspace"),
    _int64("workspace_size prefix_start device"),
    _pointers("stream"),
)
CUDA_ATTENTION_BACKWARD = Struct(
    "peftkern_cuda_attention_backward",
    _embedded("backward", ATTENTION_BACKWARD),
    _pointers("delta workspace"),
    _int64("workspace_size delta_is_given prefix_start device"),
    _pointers("stream"),
)
CUDA_CONCAT = Struct(
    "peftkern_cuda_concat_args",
    _pointers("k v prefix_k prefix_v prefix_ids out_k out_v"),
    _int64("batch num_kv_heads kv_len head_dim bank_size prefix_len"),
    _int64("k_stride[3] v_stride[3] prefix_k_stride[3] prefix_v_stride[3] out_k_stride[3] out_v_stride[3]"),
    _int64("dtype prefix_dtype prefix_ids_dtype device"),
    _pointers("stream"),
)
CUDA_CONCAT_BACKWARD = Struct(
    "peftkern_cuda_concat_backward_args",
    _pointers("dout prefix_ids dprefix"),
    _int64("batch num_kv_heads head_dim bank_size prefix_len dout_stride[3] dtype prefix_ids_dtype device"),
    _pointers("stream"),
)
CUDA_EMBEDDING = Struct(
    "peftkern_cuda_embedding",
    _embedded("backward", EMBEDDING_BACKWARD),
    _int64("device"),
    _pointers("stream"),
)

#: Functions that take one struct by pointer and return a status, without the prefix ``peftkern_``.
CPU_FUNCTIONS = {
    "prefix_attention": ATTENTION,
    "prefix_attention_backward": ATTENTION_BACKWARD,
    "soft_prompt_embedding": EMBEDDING,
    "soft_prompt_embedding_backward": EMBEDDING_BACKWARD,
}
#: The same of the CUDA library, without the prefix ``peftkern_cuda_``. The two sizes return int64, not a status.
CUDA_FUNCTIONS = {
    "merge_prefix": CUDA_ATTENTION,
    "merge_prefix_backward": CUDA_ATTENTION_BACKWARD,
    "workspace_size": CUDA_ATTENTION_BACKWARD,
    "softmax_sums": CUDA_ATTENTION_BACKWARD,
    "split_workspace_size": CUDA_ATTENTION,
    "prefix_attention": CUDA_ATTENTION,
    "prefix_attention_backward": CUDA_ATTENTION_BACKWARD,
    "concat": CUDA_CONCAT,
    "concat_backward": CUDA_CONCAT_BACKWARD,
    "soft_prompt_embedding": CUDA_EMBEDDING,
    "soft_prompt_embedding_backward": CUDA_EMBEDDING,
}
