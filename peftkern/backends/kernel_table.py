# SPDX-License-Identifier: Apache-2.0
"""The attention kernels that ``merge`` and ``concat`` choose from: torch's and those of installed packages."""

from __future__ import annotations

from . import flash_packages, torch_attention
from .flash_registration import as_registered
from .torch_attention import AttentionKernel

#: Kernels of packages that are faster than torch's wherever they run. The others only add features.
_FASTER = ("FA3", "FA4")


def attention_kernels() -> list[AttentionKernel]:
    """The kernels of torch and of the packages that are installed, in order of preference."""
    installed = [row for row in flash_packages.KERNELS if row.package and row.package.version]
    return _in_order(as_registered(torch_attention.KERNELS), installed)


def known_kernels() -> list[AttentionKernel]:
    """The kernels of torch and of all packages, installed or not, in order of preference."""
    return _in_order(torch_attention.KERNELS, flash_packages.KERNELS)


def kernel_named(name: str) -> AttentionKernel:
    """The kernel with this name.

    Raises:
        ValueError: if neither torch nor an installed package has it.
    """
    kernels = attention_kernels()
    for kernel in kernels:
        if kernel.name == name:
            return kernel
    raise ValueError(f"plan: expected one of the attention kernels {[x.name for x in kernels]}, got {name!r}")


def _in_order(of_torch: list[AttentionKernel], of_packages: list[AttentionKernel]) -> list[AttentionKernel]:
    faster = [row for row in of_packages if row.name in _FASTER]
    return [*faster, *of_torch, *(row for row in of_packages if row.name not in _FASTER)]
