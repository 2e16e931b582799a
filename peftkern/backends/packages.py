# SPDX-License-Identifier: Apache-2.0
"""Packages with attention kernels, which peftkern runs where they are installed and never requires."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import math
import re
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Package:
    """A distribution, the module that holds its functions, and the oldest version whose conventions are known.

    It is found by its metadata, and imported when a call first needs it. A failing import is a reason why its kernels
    do not run, never an error.
    """

    distribution: str
    module: str
    oldest: str = "0"

    def __str__(self) -> str:
        return f"{self.distribution} {self.version or '(not installed)'}"

    @property
    def version(self) -> str | None:
        """The installed version, or None."""
        return _version(self.distribution)

    def missing(self) -> str | None:
        """Why its kernels cannot run in this process, or None."""
        if self.version is None:
            return f"{self.distribution} is not installed"
        if torch.version.hip is not None:
            return f"{self.distribution} runs here on CUDA only"
        if _numbers(self.version) < _numbers(self.oldest):
            return f"{self.distribution} {self.version} is older than {self.oldest}"
        return _import_error(self.module)

    def load(self) -> Any:
        """The module."""
        return importlib.import_module(self.module)


@functools.cache
def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[float, ...]:
    """A version as numbers in order, for comparison. A beta precedes its release: 4.0.0b10 -> (4, 0, 0, 10).

    >>> _numbers("4.0.0b10") < _numbers("4.0.0") < _numbers("4.0.1+cu12")
    True
    """
    release, _, beta = version.partition("+")[0].partition("b")
    numbers = [*map(float, re.findall(r"\d+", release)), 0.0, 0.0][:3]
    return (*numbers, float(beta) if beta.isdigit() else math.inf)


@functools.cache
def _import_error(module: str) -> str | None:
    """What importing a module raises, or None."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a package built for another torch or CUDA fails in ways of its own
        return f"cannot import {module} ({type(error).__name__}: {error})"
    return None
