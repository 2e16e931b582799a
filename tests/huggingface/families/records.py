# SPDX-License-Identifier: Apache-2.0
"""Results of a sweep: a file with a JSON line a family, and the table that documentation shows."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import peftkern
from tests.huggingface.families.sweep import CELLS, Family
from tests.huggingface.families.tiny import FAMILIES
from tests.huggingface.families.trials import AGREE, Cell

__all__ = ["append", "conditions", "read", "table"]


def conditions() -> dict[str, str]:
    """What results depend on: versions, and the sources of the package and of the sweep."""
    sources = [*Path(peftkern.__file__).parent.rglob("*.py"), *Path(__file__).parent.glob("*.py")]
    digest = hashlib.sha256()
    for source in sorted(sources):
        digest.update(source.read_bytes())
    versions = {module.__name__: module.__version__ for module in (peftkern, transformers, peft, torch)}
    return {**versions, "sources": digest.hexdigest()[:16]}


def append(path: Path, family: Family, seconds: float, under: Mapping[str, str]) -> None:
    """Adds a line."""
    line = {**dataclasses.asdict(family), "seconds": round(seconds, 2), "conditions": dict(under)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def read(path: Path, under: Mapping[str, str]) -> dict[str, Family]:
    """Families of the lines that were written under these conditions, of several the last; no torn lines."""
    families: dict[str, Family] = {}
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            line: dict[str, Any] = json.loads(text)
        except json.JSONDecodeError:
            continue
        if line["conditions"] == under:
            cells = {name: Cell(**cell) for name, cell in line["cells"].items()}
            families[line["name"]] = Family(line["name"], cells, line["not_built"])
    return families


_HEAD = """\
# Causal model families

This page compares the patched model with the stock model for every causal family of `transformers`, and for some
families that read images, on text. The models are tiny and have random weights. Compared are loss, logits and
gradients without padding and with padding on either side, greedy tokens, and a step after `unpatch`.
`python -m tests.huggingface.families` generates the page.

{versions}

- **equal**: to stock within rounding; the number is the largest relative difference. "padding-free": training steps
  leave padding out. "prompt once": the prompt runs once per batch.
- **PEFT's way**: equal, but the prompt runs before every sample, as PEFT has it.
- **PEFT cannot**, **stock cannot**: no stock training step runs, or its prefix changes nothing.
- **refused**: `patch` or the module raises a ValueError, and nothing changes.
- **DIFFERENT**, **RAISES**: faults.

"prefix" and "prompt" are PREFIX_TUNING and PROMPT_TUNING of PEFT. `PrefixKV` and `SoftPrompt` are patched into the
plain model. `share` is the plain model with `share="prefixes"`, on rows that begin alike, with the gradients of all
its parameters. Numbers in brackets refer to the messages below. Messages that differ only in names are listed once.

One flaw of stock PEFT is corrected for the comparison: it looks for the cache under one name, and loses the prefix in
generation with models that use another.
"""


def table(families: Mapping[str, Family], under: Mapping[str, str]) -> str:
    """The results in Markdown: counts, a row a family, messages in full, and the families that are not built."""
    built = [family for _, family in sorted(families.items()) if family.cells]
    messages = _Messages()
    rows = [[f"`{family.name}`", *(messages.short(family.cells[name]) for name in CELLS)] for family in built]
    counts = [[outcome, *columns] for outcome, columns in _counts(built).items()]
    versions = ", ".join(f"{name} {version}" for name, version in under.items() if name != "sources")
    parts = [_HEAD.format(versions=f"With {versions}, in fp32 on a CPU."), "## Counts", _rows(["", *CELLS], counts)]
    parts += ["## Families", _rows(["family", *CELLS], rows), "## Messages", messages.text()]
    missing = [
        [f"`{name}`", family.not_built.replace("|", "\\|")]
        for name, family in sorted(families.items())
        if not family.cells
    ]
    if missing:
        parts += ["## Not built", _rows(["family", "because"], missing)]
    left = FAMILIES.keys() - families.keys()
    if left:
        parts += [f"Not run yet: {', '.join(sorted(left))}."]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _counts(built: Iterable[Family]) -> dict[str, list[str]]:
    outcomes = [[family.cells[name].outcome for family in built] for name in CELLS]
    order = [*AGREE, "PEFT cannot", "stock cannot", "refused", "DIFFERENT", "RAISES"]
    return {outcome: [str(column.count(outcome)) for column in outcomes] for outcome in order}


def _rows(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


class _Messages:
    """Messages by number: many families have the same, but for names of modules."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.families: dict[str, str] = {}

    def short(self, cell: Cell) -> str:
        """What a table has room for."""
        if cell.outcome in AGREE:
            number = f", {cell.difference:.0e}" if cell.outcome == "equal" else ""
            way = f"; {cell.way}" if cell.outcome == "equal" and cell.way else ""
            told = f" [{self._number(cell.detail)}]" if cell.detail else ""
            cannot = [
                name for name, result in cell.checks.items() if "cannot: " in result and "peft_bugs" not in name
            ]
            left_out = f" (stock cannot: {', '.join(cannot)})" if cannot else ""
            return f"{cell.outcome}{number}{way}{told}{left_out}"
        return f"{cell.outcome} [{self._number(cell.detail)}]"

    def _number(self, message: str) -> int:
        kind = re.sub(r"\b[A-Z]\w*(Model|Decoder|ForCausalLM|ForConditionalGeneration|Wrapper)\b", "…", message)
        kind = re.sub(
            r" reach .*|\(\w+, kv_lora_rank.*|[\w.]*\blayers\.\d+\.\S+|\[[\d, ]+\]|[\d.]+e[-+]\d+", " …", kind
        )
        self.families.setdefault(kind, message)
        return self.numbers.setdefault(kind, len(self.numbers) + 1)

    def text(self) -> str:
        """The numbered messages, of each kind the first."""
        return "\n".join(f"{number}. {self.families[kind]}" for kind, number in self.numbers.items())
