# SPDX-License-Identifier: Apache-2.0
"""Reads the factors that :mod:`peftkern.tools.calibrate` has measured on this machine.

They lie in a JSON file in the user's cache folder, one for the CPU and one for the GPU. A file that is malformed, has
another format or belongs to another machine is ignored with a warning.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from pathlib import Path
from typing import Any

import torch

FORMAT = 1


def path(device: torch.device) -> Path:
    """The file with the measured factors of the CPU or the GPU."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "peftkern" / f"rates_{device.type}.json"


def load(device: torch.device, identity: str) -> tuple[tuple[str, tuple[float, float]], ...]:
    """The factors measured on the machine called ``identity``, or none if there is no valid file for it."""
    file = path(device)
    try:
        content = json.loads(file.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']}, not {FORMAT}")
        if content["machine"] != identity:
            raise ValueError(f"it was measured on {content['machine']}, this is {identity}")
        return tuple((str(name), _factors(scale)) for name, scale in content["scales"].items())
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        warnings.warn(
            f"the measured rates in {file} are ignored: {reason}. `peftkern bench --calibrate` measures them again",
            stacklevel=2,
        )
        return ()


def _factors(scale: Any) -> tuple[float, float]:
    launches, work = (float(x) for x in scale)
    if not (0 <= launches < math.inf and 0 <= work < math.inf and launches + work > 0):
        raise ValueError(f"expected two finite, non-negative factors, got {scale}")
    return launches, work
