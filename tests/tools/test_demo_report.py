# SPDX-License-Identifier: Apache-2.0
"""What the demo reports, and how it measures memory."""

from __future__ import annotations

import argparse
import os

import torch

from peftkern.tools.bench import memory
from peftkern.tools.demo import assets, session, training
from peftkern.tools.demo.files import write_files
from peftkern.tools.demo.options import Options
from peftkern.tools.demo.report import Findings, as_json, headline, table
from peftkern.tools.demo.reviews import Batch
from peftkern.tools.demo.training import ARMS, Accuracy, Pair


def test_saved_bytes_counts_storages_once_and_no_parameters():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(16))

        def forward(self, input_ids, attention_mask, labels):
            x = self.weight * 2.0  # saves no tensor
            y = x.exp()  # saves its output, 64 bytes
            return argparse.Namespace(loss=(y.view(4, 4) * y.view(4, 4)).sum() + (self.weight * y).sum())

    assert training.saved_bytes(Model(), Batch(*torch.zeros(3, 1))) == 64


def findings(ratio: float = 0.5, memory=None) -> Findings:
    """Findings of a run in which peftkern takes 1 / ratio of the time of stock PEFT."""
    pairs = [
        Pair(i, "stock", 64, {"stock": 1.0, "peftkern": 1.25}, {"stock": ratio, "peftkern": 1.0}) for i in range(6)
    ]
    accuracy = {
        "zero-shot": {"stock": Accuracy(150, 300)},
        "untrained": dict.fromkeys(ARMS, Accuracy(150, 300)),
        "final": {"stock": Accuracy(270, 300), "peftkern": Accuracy(268, 300)},
    }
    return Findings(Options(steps=6), "tiny", "reference", 1, {}, pairs, accuracy, memory or {})


def render(found: Findings) -> str:
    from rich.console import Console

    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(table(found))
    return console.export_text()


def test_losing_is_said_as_plainly_as_winning(tmp_path):
    sizes = {"stock": {"peak": 10**6, "saved": 10**6}, "peftkern": {"peak": 3 * 10**6, "saved": 10**6}}
    printed = render(findings(0.5, sizes))
    for words in ("2.00x slower", "3.00x larger", "equal", "-2 reviews", "0.25 apart at most"):
        assert words in printed
    assert headline(findings(0.5, sizes)) == (
        "Losses within 0.25 of each other · steps 2.00x slower · peak memory 3.00x larger"
    )
    assert "2.00x faster" in render(findings(2.0, sizes))
    assert write_files(findings(0.5, sizes), tmp_path)[0].stat().st_size > 10_000


def test_the_table_fits_a_terminal_of_80_columns():
    sizes = {arm: {"peak": 1.234e12, "saved": 5.6789e8, "rounding": 0.0512} for arm in ARMS}
    lines = render(findings(1.234, sizes)).splitlines()
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines if "…" in line]


def test_memory_that_was_not_measured_is_said(tmp_path):
    assert "not measured" in render(findings())
    assert as_json(findings())["memory_ratio"] == {"peak": None, "saved": None}
    assert write_files(findings(), tmp_path)[0].stat().st_size > 10_000


def test_a_dying_measuring_process_costs_the_memory_figures_only(tiny):
    options, batch = Options(dtype="fp32"), Batch(*torch.zeros(3, 1, 4, dtype=torch.long))
    found, trouble = session._measure(assets.ModelSource("/no/such", "x"), options, batch, 1)
    assert found == {}
    assert trouble.startswith("memory and rounding could not be measured: ")


def test_peak_memory_is_measured_on_linux():
    peak = memory.peak_bytes(lambda: torch.ones(50_000_000, dtype=torch.uint8).sum())
    assert peak is not None, "the high-water mark of this process cannot be reset: run the tests on Linux with /proc"
    assert peak > 45_000_000
