# SPDX-License-Identifier: Apache-2.0
"""Reads the tensors of a file that ``torch.save`` wrote, which may come from anywhere.

Nothing in the file is run. ``torch.load(weights_only=True)`` reads it on the meta device, which allocates nothing.
Then each tensor is compared with the bytes that the file has for it, and copied out of the zip archive.
"""

from __future__ import annotations

import pickletools
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

__all__ = ["TorchFile", "open_torch_file"]

_PARAMETER_LIST = "torch.nn.modules.container ParameterList"
#: All that a pickle of tensors in lists, dicts and ``ParameterList`` refers to.
_GLOBALS = {
    _PARAMETER_LIST, "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "collections OrderedDict",
    "__builtin__ set", "torch FloatStorage", "torch BFloat16Storage", "torch HalfStorage",
}  # fmt: skip
#: Tuples in tuples: a tensor is rebuilt from a tuple with its shape and its strides.
_MAX_DEPTH = 3
#: Bytes of a pickle, of which a tensor takes some 150.
_MAX_PICKLE = 4 << 20


class _Parameters:
    """Stands for a ``ParameterList`` while a file is read. It keeps the state and calls nothing."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class TorchFile:
    """An open file.

    Attributes:
        state: what was saved, with tensors on the meta device. Read lists of them with :meth:`items`.
        size: bytes of the file.
    """

    def __init__(self, path: Path, archive: zipfile.ZipFile, raw: BinaryIO) -> None:
        self.size = path.stat().st_size
        entries = _check_archive(archive, self.size)
        self._archive = archive
        self._records = _tensor_records(raw, entries)
        #: The record that was read last, and its bytes; many tensors may lie in one.
        self._last: tuple[zipfile.ZipInfo | None, bytearray] = None, bytearray()
        _check_pickle(archive.read(entries["data.pkl"]))
        self.state = _load(path)

    @staticmethod
    def items(name: str, value: Any) -> list[Any]:
        """The entries of a list, tuple or ``ParameterList`` of the state.

        Raises:
            ValueError: naming ``name``, for anything else.
        """
        if type(value) is _Parameters:
            parameters = value.state.get("_parameters") if type(value.state) is dict else None
            if not isinstance(parameters, Mapping) or list(parameters) != [str(i) for i in range(len(parameters))]:
                raise ValueError(f"{name}: expected the parameters of a ParameterList in order, got others")
            return list(parameters.values())
        if type(value) not in (list, tuple):
            raise ValueError(f"{name}: expected a list of tensors, got a {type(value).__name__}")
        return list(value)

    def check(self, name: str, x: Any) -> None:
        """Raise ValueError unless ``x`` is a tensor whose numbers lie in the file, each at most once."""
        if type(x) not in (Tensor, torch.nn.Parameter) or x.device.type != "meta" or x.layout != torch.strided:
            raise ValueError(f"{name}: expected a dense tensor, got a {type(x).__name__}")
        record, nbytes = self._record(x), x.untyped_storage().nbytes()
        if record is None or record.file_size != nbytes:
            got = "no record" if record is None else f"{record.file_size} bytes"
            raise ValueError(f"{name}: expected a record of {nbytes} bytes in the file, got {got}")
        end = 1 + x.storage_offset() + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
        if x.numel() and max(end, x.numel()) * x.itemsize > nbytes:
            raise ValueError(f"{name}: expected numbers within its {nbytes} bytes, got {list(x.shape)} of {x.dtype}")
        if x.is_conj() or x.is_neg():
            raise ValueError(f"{name}: expected plain numbers, got the negative or conjugate of a tensor")

    def read(self, x: Tensor) -> Tensor:
        """A contiguous copy on the CPU of a tensor that :meth:`check` has passed."""
        record = self._record(x)
        if not x.numel() or record is None:
            return torch.empty(x.shape, dtype=x.dtype)
        if record is not self._last[0]:
            self._last = record, bytearray(self._archive.read(record))
        numbers = torch.frombuffer(self._last[1], dtype=x.dtype)
        return numbers.as_strided(x.shape, x.stride(), x.storage_offset()).clone(
            memory_format=torch.contiguous_format
        )

    def _record(self, x: Tensor) -> zipfile.ZipInfo | None:
        return self._records.get(getattr(x.untyped_storage(), "_checkpoint_offset", -1))


@contextmanager
def open_torch_file(path: Path) -> Iterator[TorchFile]:
    """Open a file that ``torch.save`` wrote.

    Raises:
        ValueError: naming the file and what was found. Also for every ValueError in the block, whose message it
            completes with the name of the file.
    """
    if not path.is_file():
        got = "a folder" if path.is_dir() else "something else" if path.exists() else "none"
        raise ValueError(f"{path}: expected a file that torch.save wrote, got {got}")
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as raw:
            yield TorchFile(path, archive, raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, struct.error, MemoryError) as error:
        raise ValueError(
            f"{path}: expected a zip archive that torch.save wrote, got another or a damaged file ({error!s:.200})"
        ) from error


def _check_archive(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The entries by their names below the archive's only folder, none of which is compressed."""
    entries = archive.infolist()
    names = {entry.filename.partition("/")[2]: entry for entry in entries}
    folders = {entry.filename.partition("/")[0] for entry in entries}
    if len(folders) != 1 or len(names) != len(entries) or "data.pkl" not in names:
        raise ValueError("expected the archive of one torch.save, got another one, or one with duplicate entries")
    for name, entry in names.items():
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise ValueError(f"{name!r:.80}: expected an entry without compression, got a compressed one")
    if sum(entry.file_size for entry in entries) > size:
        raise ValueError(f"expected entries of at most {size} bytes, the size of the file, got more")
    if names["data.pkl"].file_size > _MAX_PICKLE:
        raise ValueError(f"data.pkl: expected at most {_MAX_PICKLE} bytes, got {names['data.pkl'].file_size}")
    if "byteorder" in names and archive.read(names["byteorder"]) != b"little":
        raise ValueError("byteorder: expected little, got another one")
    return names


def _tensor_records(raw: BinaryIO, entries: Mapping[str, zipfile.ZipInfo]) -> dict[int, zipfile.ZipInfo]:
    """The records of tensors by their offsets.

    On the meta device, torch computes offsets if the file has a format version, and then relies on the order in which
    ``torch.save`` writes records.
    """
    records = {_offset(raw, entry): entry for name, entry in entries.items() if name.startswith("data/")}
    if ".format_version" in entries:
        for index, offset in enumerate(sorted(records)):
            if (name := records[offset].filename.partition("/")[2]) != f"data/{index}":
                raise ValueError(
                    f"{name!r:.80}: expected data/{index}, the next tensor of torch.save, got this record"
                )
    return records


def _offset(raw: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Where the bytes of an entry start: behind its local header, which ends with a name and an extra field."""
    raw.seek(entry.header_offset + 26)
    name, extra = struct.unpack("<HH", raw.read(4))
    return int(entry.header_offset + 30 + name + extra)


def _check_pickle(data: bytes) -> None:
    """Raise ValueError for a pickle that refers to anything but tensors, before it is read.

    Tuples that are nested deeply, or used a second time, are refused: to hash the former overflows the stack, and to
    hash tuples of the latter takes exponential time. ``torch.save`` writes neither.
    """
    depths = _TupleDepths()
    for operation, argument in _operations(data):
        name = operation.name
        if name == "PROTO" and argument != 2:
            raise ValueError(f"data.pkl: expected pickle protocol 2, got {argument}")
        if name == "GLOBAL" and argument not in _GLOBALS:
            raise ValueError(
                f"data.pkl: expected nothing but tensors of float32, bfloat16 or float16, got {argument!r:.80}"
            )
        depths.follow(operation, argument)


class _TupleDepths:
    """How deeply tuples are nested in the values on the stack of a pickle, while its operations are followed.

    A value is the depth of a tuple: 1 for one without tuples in it. It is 0 for everything else, and None for a mark.
    """

    def __init__(self) -> None:
        self.stack: list[int | None] = []
        self.memo: dict[int, int] = {}

    def follow(self, operation: pickletools.OpcodeInfo, argument: Any) -> None:
        """Change the stack as an operation does.

        Raises:
            ValueError: for a tuple that is nested too deeply or used a second time; for an operation without values.
        """
        name = operation.name
        if "PUT" in name and self.stack:
            self.memo[argument] = self.stack[-1] or 0
            return
        if (name == "DUP" and self.stack and self.stack[-1]) or ("GET" in name and self.memo.get(argument)):
            raise ValueError("data.pkl: expected nothing but tensors, got a tuple that is used twice")
        taken = self._take(operation.stack_before)
        made = [0] * len(operation.stack_after)
        if "TUPLE" in name:
            made = [1 + max(taken, default=0)]
            if made[0] > _MAX_DEPTH:
                raise ValueError(f"data.pkl: expected tuples at most {_MAX_DEPTH} deep, got deeper ones")
        self.stack += [None] if name == "MARK" else made

    def _take(self, before: Sequence[pickletools.StackObject]) -> list[int]:
        """Take what an operation takes from the stack."""
        count = len(before)
        if pickletools.markobject in before:
            if None not in self.stack:
                raise ValueError("data.pkl: expected a mark before an operation that ends at one, got none")
            last = len(self.stack) - 1 - self.stack[::-1].index(None)
            count = len(self.stack) - last + before.index(pickletools.markobject)
        if count > len(self.stack):
            raise ValueError("data.pkl: expected values for each operation, got too few")
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return [value or 0 for value in taken]


def _operations(data: bytes) -> Iterator[tuple[pickletools.OpcodeInfo, Any]]:
    """A pickle's operations with their arguments, none of which is carried out."""
    try:
        for operation, argument, _ in pickletools.genops(data):
            yield operation, argument
    except ValueError as error:
        raise ValueError(f"data.pkl: expected a pickle, got something else ({error!s:.200})") from error


def _load(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([(_Parameters, _PARAMETER_LIST.replace(" ", "."))]):
            return torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # whatever a crafted pickle makes torch raise
        kind = type(error).__name__
        raise ValueError(
            f"data.pkl: expected tensors, got what torch.load refuses ({kind}: {error!s:.200})"
        ) from error
