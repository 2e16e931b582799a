# SPDX-License-Identifier: Apache-2.0
"""The findings of the cartridge demo: its numbers, the table and the JSON file."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any, NamedTuple

from ....self_study import Comparison
from ..report import size
from .options import Options

__all__ = ["Findings", "Row", "as_json", "headline", "setting", "summary", "table"]

_SAMPLES = 2000


class Interval(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


class Row(NamedTuple):
    """What a model that reads ``tokens`` tokens predicts, beside the teacher that reads the whole text.

    Attributes:
        comparison: on each held-out question; the mean over the runs.
        runs: the mean KL of each run.
        bytes: of the keys and values.
    """

    name: str
    tokens: int
    bytes: int
    comparison: Comparison
    runs: list[float]

    @classmethod
    def of(cls, name: str, tokens: int, bytes_per_token: int, comparisons: Sequence[Comparison]) -> Row:
        """A row from one comparison per run."""
        kl, agreement = (
            [fmean(values) for values in zip(*(getattr(c, field) for c in comparisons), strict=True)]
            for field in Comparison._fields
        )
        runs = [fmean(comparison.kl) for comparison in comparisons]
        return cls(name, tokens, tokens * bytes_per_token, Comparison(kl, agreement), runs)

    def interval(self, field: str) -> Interval:
        """Of ``"kl"`` or ``"agreement"``, by bootstrap over the questions."""
        return Interval(*self.comparison.interval(field))


class Findings(NamedTuple):
    """The results of a run. ``rows``: no document, start, trained and whole; ``composed``: rows of two documents."""

    options: Options
    model: str
    threads: int
    title: str
    versions: dict[str, str]
    rows: list[Row]
    losses: list[list[float]]
    composed: list[Row]
    cpu_seconds: float

    @property
    def closed(self) -> Interval:
        """The share of the KL of the start that training removes, by bootstrap over the questions of both rows."""
        _, start, trained, _ = self.rows
        pairs = list(zip(start.comparison.kl, trained.comparison.kl, strict=True))
        rng = random.Random(0)
        shares = sorted(_closed(rng.choices(pairs, k=len(pairs))) for _ in range(_SAMPLES))
        low, high = (shares[round(q * (_SAMPLES - 1))] for q in (0.025, 0.975))
        return Interval(_closed(pairs), low, high)


def _closed(pairs: Sequence[tuple[float, float]]) -> float:
    before, after = map(sum, zip(*pairs, strict=True))
    return 1 - after / before if before else 0.0


def setting(findings: Findings) -> str:
    """One line that describes the run."""
    options = findings.options
    return (
        f"{findings.rows[-1].tokens} tokens of {findings.title} · {options.questions} questions · {options.steps} "
        f"steps of {options.batch_size} · {options.runs} run{'s' * (options.runs > 1)} · {options.eval_rows} "
        f"held-out questions · fp32 · {findings.threads} thread{'s' * (findings.threads > 1)}"
    )


def headline(findings: Findings) -> str:
    """The result in one line, also if training does not help."""
    closed, trained, whole = findings.closed, findings.rows[2], findings.rows[3]
    if closed.mean <= 0:
        return f"The cartridge of {trained.tokens} tokens is no closer to the whole document than its start"
    return (
        f"{trained.tokens} tokens instead of {whole.tokens}: training closes {closed.mean:.0%} "
        f"[{closed.low:.0%}, {closed.high:.0%}] of the gap to the whole document"
    )


def summary(row: Row) -> dict[str, Any]:
    """A row's numbers, with those of each question."""
    return {
        "name": row.name,
        "tokens": row.tokens,
        "bytes": row.bytes,
        "kl": row.interval("kl")._asdict(),
        "agreement": row.interval("agreement")._asdict(),
        "kl_of_runs": row.runs,
        **{f"{field}_of_questions": getattr(row.comparison, field) for field in Comparison._fields},
    }


def as_json(findings: Findings) -> dict[str, Any]:
    """The findings for JSON, with the numbers of each question."""
    return {
        "model": findings.model,
        "document": findings.title,
        "threads": findings.threads,
        "versions": findings.versions,
        "options": asdict(findings.options),
        "gap_closed": findings.closed._asdict(),
        "rows": [summary(row) for row in findings.rows],
        "composed": [summary(row) for row in findings.composed],
        "losses": findings.losses,
        "cpu_seconds": findings.cpu_seconds,
    }


def table(findings: Findings) -> Any:
    """A ``rich`` table, at most 80 columns wide."""
    from rich import box
    from rich.table import Table

    result = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1), show_edge=False)
    result.add_column("The model reads", no_wrap=True)
    for title in ("tokens", "KV", "KL to teacher", "same top-1"):
        result.add_column(title, justify="right", no_wrap=True)
    for row in findings.rows:
        result.add_row(*_cells(row))
    if findings.composed:
        result.add_section()
        result.add_row("[dim]teacher: both documents[/]")
        for row in findings.composed:
            result.add_row(*_cells(row))
    return result


def _cells(row: Row) -> tuple[str, ...]:
    kl, agreement = row.interval("kl"), row.interval("agreement")
    half = (agreement.high - agreement.low) / 2
    return (
        row.name,
        str(row.tokens),
        size(row.bytes) if row.bytes else "0",
        f"{kl.mean:.3f} [{kl.low:.3f}, {kl.high:.3f}]",
        f"{agreement.mean:.1%} ± {half:.1%}" if half else f"{agreement.mean:.1%}",
    )
