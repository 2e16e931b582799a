# SPDX-License-Identifier: Apache-2.0
"""The files of a run: the plot, the steps as CSV, and everything as JSON."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from .plot import save_plot
from .report import Findings, as_json
from .training import ARMS


def write_files(findings: Findings, out: Path) -> list[Path]:
    """Write ``demo.png``, ``steps.csv`` and ``result.json`` into ``out``."""
    files = [out / "demo.png", out / "steps.csv", out / "result.json"]
    with files[1].open("w", newline="") as file:
        writer = csv.writer(file)
        names = [f"{what}_{arm}" for what in ("loss", "seconds") for arm in ARMS]
        writer.writerow(["step", "tokens", "first", *names])
        for pair in findings.pairs:
            columns = [values[arm] for values in (pair.loss, pair.seconds) for arm in ARMS]
            writer.writerow([pair.step + 1, pair.tokens, pair.first, *columns])
    files[2].write_text(json.dumps(as_json(findings), indent=1) + "\n")
    save_plot(findings, files[0])
    return files
