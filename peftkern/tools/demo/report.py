# SPDX-License-Identifier: Apache-2.0
"""The findings of a run: its numbers, and the table."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, quantiles
from typing import Any, NamedTuple

from .measuring import Measured
from .options import Options, as_dict
from .training import ARMS, TITLES, Accuracy, Pair

_UNTIMED = 2  # pairs at the start, while allocators, kernels and caches warm up; each arm runs first once
_LAST = 10


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Compute them for one or more values."""
        low, median, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
        return cls(median, low, high)


class Findings(NamedTuple):
    """The results of a run. ``speedup`` and memory ratios are stock / peftkern: above 1, peftkern is better."""

    options: Options
    model: str
    backend: str
    threads: int
    versions: dict[str, str]
    pairs: list[Pair]
    accuracy: dict[str, dict[str, Accuracy]]
    measured: dict[str, Measured]

    @property
    def timed(self) -> list[Pair]:
        """The pairs after the warm-up."""
        return self.pairs[_UNTIMED:] or self.pairs

    @property
    def seconds(self) -> dict[str, Spread]:
        """Seconds per step of each arm."""
        return {arm: Spread.of([pair.seconds[arm] for pair in self.timed]) for arm in ARMS}

    @property
    def speedup(self) -> Spread:
        """Ratios of the two times of each batch. Noise of the machine hits both alike."""
        return Spread.of([pair.seconds["stock"] / pair.seconds["peftkern"] for pair in self.timed])

    @property
    def last_loss(self) -> dict[str, float]:
        """Mean loss of the last steps, per arm."""
        return {arm: fmean(pair.loss[arm] for pair in self.pairs[-_LAST:]) for arm in ARMS}

    @property
    def largest_difference(self) -> Pair:
        """The pair with the largest difference of losses."""
        return max(self.pairs, key=loss_difference)

    def memory_ratio(self, kind: str) -> float | None:
        """Ratio of ``"peak"`` or ``"saved"``; None if it was not measured."""
        stock, ours = (self.measured.get(arm, {}).get(kind) for arm in ARMS)
        return stock / ours if stock and ours else None


def loss_difference(pair: Pair) -> float:
    """Absolute difference of the two losses."""
    return abs(pair.loss["peftkern"] - pair.loss["stock"])


def as_json(findings: Findings) -> dict[str, Any]:
    """The findings with all steps, for JSON."""
    worst = findings.largest_difference
    return {
        "model": findings.model,
        "backend": findings.backend,
        "threads": findings.threads,
        "versions": findings.versions,
        "options": as_dict(findings.options),
        "accuracy": {
            moment: {arm: {**share._asdict(), "value": share.value} for arm, share in shares.items()}
            for moment, shares in findings.accuracy.items()
        },
        f"loss_mean_of_last_{_LAST}": findings.last_loss,
        "loss_largest_difference": {"value": loss_difference(worst), "step": worst.step + 1},
        "seconds_per_step": {arm: spread._asdict() for arm, spread in findings.seconds.items()},
        "speedup_of_pairs": findings.speedup._asdict(),
        "timed_pairs": len(findings.timed),
        "measured": findings.measured,
        "memory_ratio": {kind: findings.memory_ratio(kind) for kind in ("peak", "saved")},
        "steps": [pair._asdict() for pair in findings.pairs],
    }


def setting(options: Options, threads: int, backend: str) -> str:
    """One line that describes the run."""
    return (
        f"{options.method} of {options.length} tokens · {options.dtype} · {options.steps} steps of "
        f"{options.batch_size} reviews up to {options.seq} tokens · {threads} thread{'s' * (threads > 1)} · "
        f"{backend} backend"
    )


def duration(seconds: float) -> str:
    """Seconds with three digits, in s or ms."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:#.3g} ms".replace(". ", " ")


def interval(spread: Spread) -> str:
    """The quartiles as text."""
    low, high = (duration(seconds).rpartition(" ") for seconds in (spread.low, spread.high))
    return f"{low[0]} - {high[0]} {high[2]}" if low[2] == high[2] else f"{''.join(low)} - {''.join(high)}"


def size(number: float) -> str:
    """Bytes in GB, MB or kB (powers of ten)."""
    if number >= 1e9:
        return f"{number / 1e9:.2f} GB"
    return f"{number / 1e6:.1f} MB" if number >= 1e6 else f"{number / 1e3:.1f} kB"


def verdict(ratio: float, better: str, worse: str) -> str:
    """``1.31x faster``, ``1.05x slower``, or ``equal`` within half a percent."""
    if abs(ratio - 1) < 0.005:
        return "equal"
    return f"{ratio:.2f}x {better}" if ratio > 1 else f"{1 / ratio:.2f}x {worse}"


def headline(findings: Findings) -> str:
    """The result in one line, also if peftkern is slower."""
    difference = loss_difference(findings.largest_difference)
    parts = [
        f"Losses within {difference:.2g} of each other" if difference else "Identical losses",
        f"steps {verdict(findings.speedup.median, 'faster', 'slower')}",
    ]
    peak = findings.memory_ratio("peak")
    if peak is not None:
        parts.append(f"peak memory {verdict(peak, 'smaller', 'larger')}")
    return " · ".join(parts)


def table(findings: Findings) -> Any:
    """A ``rich`` table of both arms, at most 80 columns wide."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    result = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1), show_edge=False)
    result.add_column("", no_wrap=True)
    for title in TITLES.values():
        result.add_column(title, justify="right", no_wrap=True)
    result.add_column("peftkern is", no_wrap=True)

    def row(title: str, cells: dict[str, str], judgement: Text) -> None:
        result.add_row(title, *(cells.get(arm, "") for arm in ARMS), judgement)

    def judged(ratio: float | None, better: str, worse: str) -> Text:
        if ratio is None:
            return Text("not measured", "dim")
        words = verdict(ratio, better, worse)
        return Text(words, "green" if better in words else "yellow" if worse in words else "dim")

    moments = {"zero-shot": "Accuracy, zero-shot", "untrained": "  prefix untrained", "final": "  after training"}
    for moment, title in moments.items():
        shares = findings.accuracy[moment]
        if moment == "zero-shot":
            words = Text(f"of {shares['stock'].rows} held-out rows", "dim")
        else:
            more = shares["peftkern"].correct - shares["stock"].correct
            words = Text(f"{more:+d} review{'s' * (abs(more) > 1)}", "yellow") if more else Text("equal", "dim")
        row(title, {arm: f"{a.value:.1%} ± {a.standard_error:.1%}" for arm, a in shares.items()}, words)

    worst = findings.largest_difference
    words = Text(f"{loss_difference(worst):.2g} apart at most" if loss_difference(worst) else "identical", "dim")
    losses = {arm: f"{loss:.4f}" for arm, loss in findings.last_loss.items()}
    row(f"Loss, last {min(_LAST, len(findings.pairs))} steps", losses, words)

    errors = {arm: error for arm in ARMS if (error := findings.measured.get(arm, {}).get("rounding")) is not None}
    if findings.options.dtype != "fp32" and errors:
        row(
            f"  {findings.options.dtype} rounding",
            {a: f"± {x:.2g}" for a, x in errors.items()},
            Text("of a row's loss", "dim"),
        )

    seconds, speedup = findings.seconds, findings.speedup
    medians = {arm: duration(s.median) for arm, s in seconds.items()}
    row("Step time, median", medians, judged(speedup.median, "faster", "slower").append(" in pairs", "dim"))
    halves = {arm: interval(s) for arm, s in seconds.items()}
    row("  middle half", halves, Text(f"{speedup.low:.2f}x - {speedup.high:.2f}x", "dim"))
    for kind, title in (("peak", "Peak memory of a step"), ("saved", "  saved for backward")):
        sizes = {arm: bytes_ for arm in ARMS if (bytes_ := findings.measured.get(arm, {}).get(kind)) is not None}
        row(title, {a: size(x) for a, x in sizes.items()}, judged(findings.memory_ratio(kind), "smaller", "larger"))
    return result
