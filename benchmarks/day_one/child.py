# SPDX-License-Identifier: Apache-2.0
"""The process of one stage. Imports torch late: a planted crash must come within a second."""

from __future__ import annotations

import os
import time
from pathlib import Path

from .runner import write_result


def child(name: str, folder: Path, limit: float, dry_run: bool) -> None:
    """Run a stage in this process and write its result."""
    if name == "planted_crash":
        os.abort()
    if name == "planted_hang":
        time.sleep(3600)
    from . import stages

    result = stages.run(name, folder, limit, dry_run)
    write_result(folder / f"{name}.json", result | {"stage": name})
