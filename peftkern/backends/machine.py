# SPDX-License-Identifier: Apache-2.0
"""The machine that this process runs on, as the cost model describes it."""

from __future__ import annotations

import functools
import os

import torch

from .. import native
from ..processor import processor_name
from . import triton
from .cost import measured
from .cost.model import Machine
from .flash_registration import registered_flash
from .kernel_table import attention_kernels

__all__ = ["identity", "machine_of", "registered_flash"]


@functools.lru_cache(maxsize=16)
def machine_of(device: torch.device, dtype: torch.dtype, flash: str | None, threads: int) -> Machine:
    """The machine behind ``device``, with the factors measured on it.

    Args:
        flash: the FlashAttention that replaces torch's own (:func:`registered_flash`).
        threads: the number of CPU threads.
    """
    arch = ""
    scales: tuple[tuple[str, tuple[float, float]], ...] = ()
    if device.type == "cpu":
        arch = "portable" if native.cpu.MISSING or dtype not in native.cpu.DTYPES else native.cpu.default_isa(dtype)
        scales = measured.load(device, identity(device))
    elif device.type == "cuda" and torch.cuda.is_available():
        arch = triton.architecture(device)
        scales = measured.load(device, identity(device))
    kernels = tuple(x.name for x in attention_kernels() if x.device == device.type and x.why_not_here(device) is None)
    return Machine(arch, kernels, threads, flash, scales)


def identity(device: torch.device) -> str:
    """The machine to which measured factors belong: processor, instruction set or architecture, torch's version."""
    if device.type == "cuda":
        name = torch.cuda.get_device_properties(device).name
        return f"{name}, {triton.architecture(device)}, torch {torch.__version__}"
    isa = "no native library" if native.cpu.MISSING else native.cpu.default_isa(torch.bfloat16)
    return f"{processor_name()}, {isa}, {os.cpu_count()} cores, torch {torch.__version__}"
