# SPDX-License-Identifier: Apache-2.0
"""The prefixes that a server can give to requests: files ``NAME.safetensors`` in one folder.

A file may be added, replaced or removed while the server runs. This module needs only torch and safetensors.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, uint8

from .kv_file import KVFile, kv_path, plain_name, read_kv

__all__ = ["PrefixFolder", "ServedPrefix", "find_file", "plain_name"]


@dataclass(frozen=True, eq=False)
class ServedPrefix:
    """A prefix as it was read. A file that changes later does not change it.

    Attributes:
        name: of the file, without its extension.
        length: P, tokens of every layer with keys. Text starts at position P.
        layers: (key [P, Hkv, D], value [P, Hkv, D_v]) of each layer on the CPU; None for a layer without keys.
        largest: the largest absolute value in them.
        digest: of the contents. Prefixes of one digest are equal.
    """

    name: str
    length: int
    layers: Sequence[tuple[Tensor, Tensor] | None]
    largest: float
    digest: str = field(repr=False)

    @classmethod
    def of(cls, name: str, contents: KVFile) -> ServedPrefix:
        """Raises ValueError for a prefix that cannot stand before text as ordinary tokens do."""
        lengths = {pair[0].shape[0] for pair in contents.layers if pair is not None}
        if len(lengths) != 1:
            raise ValueError(f"prefix {name!r}: expected one length for all layers, got {sorted(lengths)}")
        length = lengths.pop()
        if length < 1 or contents.positions != length:
            raise ValueError(
                f"prefix {name!r}: expected at least one token, and a prefix that takes as many positions as it has "
                f"tokens, got {length} tokens and {contents.positions} positions"
            )
        bounds = [bound.item() for pair in contents.layers for x in pair or () for bound in x.aminmax()]
        return cls(name, length, contents.layers, max(map(abs, bounds)), _digest(contents))

    @property
    def num_bytes(self) -> int:
        """Memory of the tensors."""
        return sum(x.nbytes for pair in self.layers if pair is not None for x in pair)


class PrefixFolder:
    """Reads prefixes by name and keeps those that were used last.

    Args:
        folder: contains the files.
        max_bytes: of the prefixes that are kept, at least one. Prefixes in use elsewhere are not counted.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int) -> None:
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        self._kept: OrderedDict[str, tuple[_Version, ServedPrefix]] = OrderedDict()

    def get(self, name: str) -> ServedPrefix:
        """The prefix that the file contains now.

        Raises:
            ValueError: for a name that is no plain one, a missing or damaged file, or a prefix that cannot be served.
        """
        kept = self._kept.pop(name, None)
        path = find_file(self.folder, name)
        if kept is None or kept[0] != _version(path):
            kept = _read(name, path)
        self._kept[name] = kept  # behind those that were used before
        self._evict()
        return kept[1]

    def digests(self) -> set[str]:
        """Digests of the prefixes that are kept."""
        return {prefix.digest for _, prefix in self._kept.values()}

    def _evict(self) -> None:
        total = sum(prefix.num_bytes for _, prefix in self._kept.values())
        while total > self.max_bytes and len(self._kept) > 1:
            _, (_, prefix) = self._kept.popitem(last=False)
            total -= prefix.num_bytes


def find_file(folder: str | os.PathLike[str], name: str) -> Path:
    """The file of a prefix.

    Raises:
        ValueError: for a name that is no plain one, and if there is no such file that can be reached.
    """
    path = kv_path(folder, name)
    try:
        found = path.is_file()
    except OSError as error:
        raise ValueError(f"prefix {name!r}: expected a readable file {path.name} ({error.strerror})") from error
    if not found:
        raise ValueError(f"prefix {name!r}: expected a file {path.name} in the server's folder, got none")
    return path


#: Device, inode, size and time of the last change of a file.
_Version = tuple[int, int, int, int]
#: Times that a file is read which is replaced in the meantime.
_ATTEMPTS = 3


def _read(name: str, path: Path) -> tuple[_Version, ServedPrefix]:
    for _ in range(_ATTEMPTS):
        version = _version(path)
        prefix = ServedPrefix.of(name, read_kv(path))
        if _version(path) == version:
            return version, prefix
    raise ValueError(f"{path}: expected a file that stays while it is read, got {_ATTEMPTS} that were replaced")


def _version(path: Path) -> _Version:
    try:
        found = path.stat()
    except OSError as error:
        raise ValueError(f"{path}: expected a readable file ({error.strerror})") from error
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _digest(contents: KVFile) -> str:
    hasher = hashlib.blake2b(digest_size=20)
    for pair in contents.layers:
        for x in pair or ():
            hasher.update(f"{x.dtype} {tuple(x.shape)};".encode())
            hasher.update(x.contiguous().view(uint8).numpy().data)
        hasher.update(b"|")
    return hasher.hexdigest()
