# SPDX-License-Identifier: Apache-2.0
"""Files that a crash leaves either as they were or complete."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

try:
    import fcntl
except ImportError:  # Windows, where temporary files of a process that was killed stay
    fcntl = None  # type: ignore[assignment]

__all__ = ["append_to_file", "replace_file", "replace_files"]

#: Names of temporary files. The process that writes one holds a lock of it, so an unlocked one belongs to none.
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")
#: Files that are locked at once, because each needs a descriptor. The others have a name that nobody removes.
_MAX_LOCKS = 200


def replace_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Replace files in the given order, each by one rename, after all of them have been flushed to disk.

    A name that is a symbolic link is replaced; the file that it points to stays. Temporary files that a killed
    process has left in the same folders are removed.

    Args:
        folder: exists already.
        contents: names in the folder or paths below it, whose parents exist already, and the bytes of each.

    Raises:
        OSError: naming the file, and the disk if it is full.
    """
    paths = [folder / name for name in contents]
    parents = list(dict.fromkeys(path.parent for path in paths))
    for parent in parents:
        _remove_abandoned(parent)
    with contextlib.ExitStack() as stack:
        temporary = [
            stack.enter_context(_written(path, data, locked=index < _MAX_LOCKS))
            for index, (path, data) in enumerate(zip(paths, contents.values(), strict=True))
        ]
        for source, path in zip(temporary, paths, strict=True):
            with _naming(path):
                os.replace(source, path)
    for parent in parents:
        directory = os.open(parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def replace_file(path: Path, data: bytes) -> None:
    """:func:`replace_files` for one file, whose folder is created if it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_files(path.parent, {path.name: data})


def append_to_file(path: Path, data: bytes) -> None:
    """Append to a file and flush it to disk.

    Raises:
        OSError: naming the file, and the disk if it is full.
    """
    with _naming(path), path.open("ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _written(path: Path, data: bytes, locked: bool) -> Iterator[Path]:
    """A temporary file beside ``path`` with the data, on the disk. It is removed, unless it has been renamed."""
    with _naming(path):
        temporary, file = _create(path, locked)
    with file:
        try:
            with _naming(path):
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if not locked:
                file.close()
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


def _create(path: Path, locked: bool) -> tuple[Path, BinaryIO]:
    """A new temporary file beside ``path``, which is locked while it is open."""
    while True:
        temporary = path.with_name(f".{path.name}.{uuid4().hex}.{'tmp' if locked else 'part'}")
        file = temporary.open("xb")
        if not locked or fcntl is None:
            return temporary, file
        with contextlib.suppress(OSError):  # a file system without locks, where nobody removes what is abandoned
            fcntl.flock(file, fcntl.LOCK_EX)
        if _is(temporary, file.fileno()):
            return temporary, file
        file.close()  # another process has removed it before it was locked


def _remove_abandoned(folder: Path) -> None:
    """Remove the temporary files in a folder that no process is writing, as far as that is possible and allowed."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for path in [Path(entry.path) for entry in entries if _TEMPORARY.fullmatch(entry.name)]:
            with contextlib.suppress(OSError):
                _remove_if_abandoned(path)


def _remove_if_abandoned(path: Path) -> None:
    if fcntl is None:
        return
    file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is(path, file):
            path.unlink()
    finally:
        os.close(file)


def _is(path: Path, file: int) -> bool:
    """Whether an open file is the regular file at a path, which may have been renamed or removed."""
    try:
        found = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return stat.S_ISREG(found.st_mode) and os.path.samestat(found, os.fstat(file))


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Give an error of the operating system the name of the file, and that of the disk if it is full.

    A write or a flush knows no name, and opening or renaming a temporary file only that one's.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        disk = f" ({_disk_of(path)})" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise OSError(error.errno, f"{error.strerror}{disk}", str(path)) from error


def _disk_of(path: Path) -> str:
    """Where the disk of a file is mounted, and how much of it is free."""
    mount = next((p for p in path.absolute().parents if os.path.ismount(p)), path.parent)
    try:
        return f"the disk at {mount} has {shutil.disk_usage(mount).free / 1e6:.1f} MB left"
    except OSError:
        return f"the disk at {mount}"
