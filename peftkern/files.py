# SPDX-License-Identifier: Apache-2.0
"""Files that a crash leaves either as they were or complete."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from uuid import uuid4

__all__ = ["replace_files"]


def replace_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Replace files in the given order, each by one rename, after all of them have been flushed to disk.

    A name that is a symbolic link is replaced; the file that it points to stays.

    Args:
        folder: exists already.
        contents: names in the folder or paths below it, whose parents exist already, and the bytes of each.
    """
    paths = {name: folder / name for name in contents}
    temporary = {name: path.with_name(f".{path.name}.{uuid4().hex}.tmp") for name, path in paths.items()}
    try:
        for name, data in contents.items():
            with temporary[name].open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for name, path in temporary.items():
            os.replace(path, paths[name])
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    for parent in dict.fromkeys(path.parent for path in paths.values()):
        directory = os.open(parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
