# SPDX-License-Identifier: Apache-2.0
"""The state of a stage: its folder, its time and its findings."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from peftkern import backends

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class LeftOut(Exception):
    """A stage cannot run here, for a reason that is not a failure."""


@dataclass
class Context:
    """The state of a stage.

    Attributes:
        folder: for its tables.
        dry_run: use tiny sizes on the CPU.
        end: value of ``time.monotonic()`` after which no further item is started.
        lines: findings; the first line is the headline.
        tables: names of the CSV files.
    """

    folder: Path
    dry_run: bool
    end: float
    lines: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)

    @property
    def device(self) -> str:
        """The device under test."""
        return "cpu" if self.dry_run else "cuda"

    def in_time(self, items: Iterable[Any]) -> Iterator[Any]:
        """Yield items until the time is over."""
        items = list(items)
        for done, item in enumerate(items):
            if time.monotonic() > self.end:
                self.lines.append(f"out of time after {done} of {len(items)}")
                return
            yield item

    def table(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Write rows as a CSV file of the folder."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with (self.folder / f"{name}.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows({k: f"{x:.5g}" if isinstance(x, float) else x for k, x in row.items()} for row in rows)
        self.tables.append(f"{name}.csv")


def backend_names(context: Context, dtype: torch.dtype) -> list[str]:
    """Names of the backends that run a plain call here, without Triton's interpreter."""
    found = backends.available_backends(context.device, dtype)
    return [name for name in found if not context.dry_run or name in ("cpu", "reference")]
