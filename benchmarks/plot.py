# SPDX-License-Identifier: Apache-2.0
"""Draws results: ``python benchmarks/plot.py`` makes an SVG (``--format png``: a PNG) beside each CSV.

Kernels and decode: times as fast as PEFT's way, per shape; a bar per dtype and number of threads, a panel per
direction.
Training step: the same, over PEFT and over the frozen model without a prefix.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from report import RESULTS

from peftkern.tools.bench.plot import draw, save


def main(arguments: list[str] | None = None) -> None:
    """Draw and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, nargs="*", help="default: all CSVs of this repository's CPU benchmarks")
    parser.add_argument("--format", choices=["svg", "png"], default="svg")
    options = parser.parse_args(arguments)
    names = ("cpu_attention", "cpu_decode", "training_step")
    for path in options.csv or [RESULTS / f"{name}.csv" for name in names]:
        print(save(draw(pd.read_csv(path)), path.with_suffix(f".{options.format}")))


if __name__ == "__main__":
    main()
