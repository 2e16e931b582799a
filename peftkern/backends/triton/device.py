# SPDX-License-Identifier: Apache-2.0
"""Facts about a device, and whether Triton can run on it. Importable without Triton."""

from __future__ import annotations

import importlib.util
import os

import torch

from .tiles import ARCHITECTURES, INTERPRETER, cuda_architecture

#: Whether the package triton is installed.
INSTALLED = importlib.util.find_spec("triton") is not None
#: Whether kernels run in Triton's interpreter. Triton too reads the variable only once, when it is imported.
INTERPRETED = INSTALLED and os.environ.get("TRITON_INTERPRET", "0") not in ("0", "")


def architecture(device: torch.device) -> str:
    """The architecture of a GPU, as the tile table and the cost model name it: ``"sm_90"``, ``"gfx942"``.

    An NVIDIA GPU without tiles of its own gets the newest older architecture that has some. In the interpreter every
    device is ``"interpreter"``.
    """
    if INTERPRETED:
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).partition(":")[0]
    return cuda_architecture(properties.major, properties.minor)


def processors(device: torch.device) -> int:
    """The number of multiprocessors (AMD: compute units), from which the number of splits follows."""
    return 4 if INTERPRETED else int(torch.cuda.get_device_properties(device).multi_processor_count)


def lacks(device: torch.device) -> list[str]:
    """Reasons why this machine cannot run Triton's kernels on ``device``; empty if it can."""
    if not INSTALLED:
        return ["the package triton is not installed: `pip install triton`"]
    if device.type == "cpu":
        return [] if INTERPRETED else ["CPU tensors need Triton's interpreter: set TRITON_INTERPRET=1, for tests"]
    if device.type != "cuda":
        return [f"has no kernels for device type {device.type!r}"]
    if not torch.cuda.is_available():
        return ["torch.cuda.is_available() is False"]
    if (arch := architecture(device)) not in ARCHITECTURES:
        if arch.startswith("sm_"):
            return [f"{arch} is older than sm_80, the oldest that Triton supports: use backend='reference'"]
        return [f"has no tiles for {arch}, only for {', '.join(ARCHITECTURES)} and GPUs compatible with them"]
    return []
