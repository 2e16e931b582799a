# SPDX-License-Identifier: Apache-2.0
"""What a step is given, and what its items return."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class LeftOut(Exception):
    """An item cannot run here, for a reason that is not a failure."""


@dataclass
class Finding:
    """The result of an item: one line, and the rows and further lines behind it."""

    line: str
    rows: list[Row] = field(default_factory=list)
    details: list[str] = field(default_factory=list)


#: The items of a step by name. An item raises AssertionError if a result is wrong, :class:`LeftOut` if it cannot run.
Items = dict[str, Callable[[], Finding]]


@dataclass(frozen=True)
class Context:
    """What a step is given.

    Attributes:
        folder: for files beside the results, such as profiles.
        dry_run: use tiny sizes on the CPU.
    """

    folder: Path
    dry_run: bool

    @property
    def device(self) -> str:
        """The device under test."""
        return "cpu" if self.dry_run else "cuda"

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            import torch  # late: steps that test the runner do not wait for it

            torch.cuda.synchronize()

    def is_broken(self) -> bool:
        """Whether an error has made CUDA unusable in this process."""
        torch = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_initialized():
            return False
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
        return False
