# SPDX-License-Identifier: Apache-2.0
"""Reads the factors that :mod:`peftkern.tools.calibrate` has measured on this machine.

They lie in a JSON file in the user's cache folder, one for the CPU and one for the GPU. A file that cannot be read,
is malformed, has another format or belongs to another machine is ignored with one warning.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch

from ...strict_json import json_object, read_bytes, shown
from ...user_cache import user_cache

FORMAT = 1

#: The files that a warning has named, and its reason.
_warned: set[tuple[Path, str]] = set()


def path(device: torch.device) -> Path:
    """The file with the measured factors of the CPU or the GPU.

    Raises:
        FileNotFoundError: for a user without a home folder.
    """
    return user_cache() / f"rates_{device.type}.json"


def load(device: torch.device, identity: str) -> tuple[tuple[str, tuple[float, float]], ...]:
    """The factors measured on the machine called ``identity``, or none if there is no valid file for it."""
    try:
        file = path(device)
        data = read_bytes(file)
    except FileNotFoundError:
        return ()
    except (OSError, ValueError) as error:
        return _ignored(file, str(error))
    try:
        content = json_object(data)
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {shown(content['format'])}, not {FORMAT}")
        if content["machine"] != identity:
            raise ValueError(f"it was measured on {shown(content['machine'])}, this is {identity}")
        return tuple((str(name), _factors(scale)) for name, scale in content["scales"].items())
    except KeyError as error:
        return _ignored(file, f"it lacks {error}")
    except (ValueError, TypeError, AttributeError) as error:
        return _ignored(file, str(error))


def _ignored(file: Path, reason: str) -> tuple[()]:
    """Warn, once, that a file is not used."""
    if (file, reason) not in _warned:
        _warned.add((file, reason))
        warnings.warn(
            f"the measured rates in {file} are ignored: {reason:.300}. `peftkern bench --calibrate` measures them "
            "again",
            stacklevel=3,
        )
    return ()


def _factors(scale: Any) -> tuple[float, float]:
    launches, work = (float(x) for x in scale)
    if not (0 <= launches < math.inf and 0 <= work < math.inf and launches + work > 0):
        raise ValueError(f"expected two finite, non-negative factors, got {shown(scale)}")
    return launches, work
