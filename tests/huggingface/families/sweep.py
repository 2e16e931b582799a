# SPDX-License-Identifier: Apache-2.0
"""One family: each way to put a prefix or a prompt before its tiny model, patched beside stock.

Five cells: ``prefix`` and ``prompt`` are PEFT's adapters, ``PrefixKV`` and ``SoftPrompt`` the package's modules
in the plain model, and ``share`` is the plain model whose rows begin alike, with ``share="prefixes"``. A cell has
checks: training steps with no padding, on the right and on the left (loss, logits at tokens, gradients of the
prefix or prompt; with ``share``, of the model), greedy tokens without padding and with padding on the left, and a
step after ``unpatch``, which has to be equal to the bit.

Behind a prompt, PEFT leaves padding on the left between prompt and text. Patched models have each sample as it is
alone and without padding, and PEFT's numbers with ``peft_bugs=True``; both are checked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import io
import warnings

import torch

from tests.huggingface.families import tiny
from tests.huggingface.families.cells import NativePrefix, NativePrompt, PeftPrefix, PeftPrompt, SharedText
from tests.huggingface.families.limits import attempt, message_of
from tests.huggingface.families.trials import AGREE, FAILURES, Cell, Trial
from tests.huggingface.models import IDS

__all__ = ["CELLS", "Family", "decided", "sweep"]

CELLS: dict[str, type[Trial]] = {
    "prefix": PeftPrefix,
    "prompt": PeftPrompt,
    "PrefixKV": NativePrefix,
    "SoftPrompt": NativePrompt,
    "share": SharedText,
}


@dataclasses.dataclass
class Family:
    """Cells of a family by name, or why there are none."""

    name: str
    cells: dict[str, Cell]
    not_built: str = ""

    @property
    def failures(self) -> dict[str, Cell]:
        """Cells in which a patched model does not do what stock does."""
        return {name: cell for name, cell in self.cells.items() if cell.outcome in FAILURES}


def sweep(family: str) -> Family:
    """Runs all cells of a family. Never raises, but for what ends a program."""
    if family in tiny.CANNOT:
        return Family(family, {}, tiny.CANNOT[family])
    # Some models print, and most warn.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        _, error = attempt(lambda: tiny.tiny_model(family)(input_ids=IDS, labels=IDS))
        if error is not None:
            return Family(family, {}, message_of(error))
        cells = {}
        for name, kind in CELLS.items():
            cell, error = attempt(functools.partial(decided, kind, family), seconds=120.0)
            cells[name] = Cell("RAISES", message_of(error)) if error is not None else cell
        gc.collect()
    return Family(family, cells)


def decided(kind: type[Trial], family: str) -> Cell:
    """The cell; where numbers differ in fp32, as it is in fp64, in which rounding cannot be the reason."""
    cell = kind(family, torch.float32).run()
    if cell.outcome == "DIFFERENT":
        exact = kind(family, torch.float64).run()
        if exact.outcome in (*AGREE, "DIFFERENT"):
            return exact
    return cell
