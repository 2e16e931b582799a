# SPDX-License-Identifier: Apache-2.0
"""The folder of files that peftkern keeps for a user: measured rates, tuned tiles, converted models."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["expanded", "user_cache"]


def user_cache() -> Path:
    """peftkern's folder in the user's cache folder, which need not exist.

    Raises:
        FileNotFoundError: for a user without a home folder, where ``XDG_CACHE_HOME`` names no other folder.
    """
    chosen = os.environ.get("XDG_CACHE_HOME")
    if chosen:
        base = Path(chosen)
    elif sys.platform == "darwin":
        base = Path("~/Library/Caches")
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or "~/AppData/Local")
    else:
        base = Path("~/.cache")
    return expanded(base) / "peftkern"


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path in which ``~`` stands for the home folder.

    Raises:
        FileNotFoundError: for a ``~`` of a user without a home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(
            f"{path}: expected a home folder for ~, got none: set HOME, or XDG_CACHE_HOME for what peftkern keeps"
        ) from error
