# SPDX-License-Identifier: Apache-2.0
"""Training steps whose prompts run once and whose padding is skipped, beside stock PEFT on the same batches.

SmolLM2-135M (as `peftkern demo` finds it), forward and backward, no optimizer step; random tokens with a label on
each, or movie reviews. Losses and gradients of the prompt or prefix are first compared in fp32. In the row's dtype
our loss may differ from PEFT's fp32 loss twice as much as PEFT's own. "rows" is the ratio of the rows that PEFT and
peftkern run through the model; "bar" is the speed-up that a row must reach. "labelled" compares logits="labelled"
with peftkern's default. Peak memory is the growth of a process during a step, in a process of its own. Writes
results/packing.csv, row by row.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import peftkern
from peftkern.tools.bench import memory
from peftkern.tools.bench.measuring import by, stamp, take_turns
from peftkern.tools.bench.providers import DTYPES
from peftkern.tools.demo import assets
from peftkern.tools.demo.reviews import Task, split, training_rows

from ..common import RESULTS, Row, add_model_options, show, write
from .models import prefix_of, step

COLUMNS = ("case", "method", "B", "P", "S", "dtype", "threads", "rows", "reference_s", "ours_s",
           "spread_reference", "spread_ours", "ratio", "bar", "reached", "peak_ratio", "loss_difference",
           "gradient_difference")  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        data: ``random``, or the source of the reviews, which are cut to ``seq`` tokens.
        bar: the speed-up to reach; None for 0.95 times the ratio of rows.
    """

    title: str
    method: str
    batch: int
    length: int
    seq: int
    data: str = "random"
    reference: str = "PEFT"
    ours: str = "peftkern"
    bar: float | None = None


CASES = (
    Case("prompt", "prompt", 4, 200, 210),
    Case("prompt", "prompt", 8, 100, 100),
    Case("prompt", "prompt", 16, 50, 200),
    Case("prompt, padded", "prompt", 16, 20, 64, "rotten_tomatoes"),
    Case("prompt, one label a row", "prompt", 16, 20, 200, "imdb", "peftkern", "labelled", 1.15),
    Case("prefix, padded", "prefix", 8, 20, 1024, "imdb", bar=2.0),
)


class Workbench:
    """Makes the models and batches of the cases."""

    def __init__(self, model: str | None, cache: Path | None, data: str | None) -> None:
        self.source = assets.find_model(model, assets.cache_folder(cache))
        self.reviews = data
        self.tokenizer = AutoTokenizer.from_pretrained(self.source.path)

    def batch(self, case: Case) -> dict[str, Tensor]:
        """The batch of a case, the same for both providers."""
        if case.data == "random":
            ids = torch.randint(0, 40_000, (case.batch, case.seq), generator=torch.Generator().manual_seed(0))
            return {"input_ids": ids, "labels": ids}
        reviews = [review for review in assets.read_reviews(self.reviews) if review.source == case.data]
        rows = training_rows(split(reviews, 100)[0], 0, case.batch, 0)
        return Task(self.tokenizer, case.seq).batch(rows)._asdict()

    def model(self, case: Case, provider: str, dtype: torch.dtype) -> Any:
        """A PEFT model in training mode, patched unless ``provider`` is PEFT."""
        base = AutoModelForCausalLM.from_pretrained(self.source.path, dtype=dtype).train()
        config = PromptTuningConfig if case.method == "prompt" else PrefixTuningConfig
        model = get_peft_model(base, config(task_type="CAUSAL_LM", num_virtual_tokens=case.length))
        # prompts as large as token embeddings, keys and values as large as those of text
        std = base.get_input_embeddings().weight.std().item() if case.method == "prompt" else 0.3
        prefix_of(model).data.normal_(std=std, generator=torch.Generator().manual_seed(1))
        if provider != "PEFT":
            peftkern.patch(model, logits="labelled" if provider == "labelled" else "all")
        return model


def compare(bench: Workbench, case: Case, batch: dict[str, Tensor]) -> tuple[float, float, float]:
    """PEFT's loss in fp32, and the relative differences of our loss and gradient to PEFT's."""
    losses, gradients = [], []
    for provider in ("PEFT", case.ours):
        model = bench.model(case, provider, torch.float32)
        losses.append(step(model, batch))
        gradients.append(prefix_of(model).grad)
        del model
        gc.collect()
    loss, gradient = abs(losses[1] - losses[0]) / losses[0], gradients[1] - gradients[0]
    return losses[0], loss, (gradient.norm() / gradients[0].norm()).item()


def serve(order: Row) -> float | None:
    """Peak memory of a second step, in bytes."""
    torch.set_num_threads(order["threads"])
    bench, case = Workbench(order["model"], order["cache"], order["data"]), CASES[order["index"]]
    model, batch = bench.model(case, order["provider"], DTYPES[order["dtype"]]), bench.batch(case)
    step(model, batch)
    gc.collect()
    return memory.peak_bytes(lambda: step(model, batch))


def peak_ratio(case: Case, order: Row) -> float | None:
    """Peak memory of the reference relative to ours, measured by :func:`serve` in other processes."""
    reference, ours = (
        memory.in_own_process(["-m", __name__], order | {"provider": name}) for name in (case.reference, case.ours)
    )
    return reference / ours if reference and ours else None


def measure(bench: Workbench, index: int, dtype: str, options: argparse.Namespace) -> Row:
    """One row of the table."""
    case = CASES[index]
    batch = bench.batch(case)
    true_loss, loss_difference, gradient_difference = compare(bench, case, batch)
    assert loss_difference < 1e-5, f"{case}: losses differ by {loss_difference:.1e}"
    assert gradient_difference < 1e-4, f"{case}: gradients differ by {gradient_difference:.1e}"

    steps: dict[str, Callable[[], float]] = {}
    for provider in (case.reference, case.ours):
        model = bench.model(case, provider, DTYPES[dtype])
        steps[provider] = lambda model=model: step(model, batch)  # type: ignore[misc]
    reference_error, our_error = (abs(run() - true_loss) / true_loss for run in steps.values())
    allowed = 2 * reference_error + max(1e-5, torch.finfo(DTYPES[dtype]).eps)
    errors = f"{our_error:.1e}, {case.reference}'s by {reference_error:.1e}"
    assert our_error < allowed, f"{case} {dtype}: the loss of {case.ours} errs by {errors}"
    clock = time.process_time if options.cpu_time else time.perf_counter
    times = take_turns(steps, options.seconds, options.at_least, by(clock))
    reference, ours = (times[name] for name in (case.reference, case.ours))

    samples, columns = batch["input_ids"].shape
    rows, ratio = ratio_of_rows(case, batch), reference.median / ours.median
    bar = 0.95 * rows if case.bar is None else case.bar
    order = {name: getattr(options, name) for name in ("model", "data", "threads")}
    order |= {"cache": options.cache and str(options.cache), "index": index, "dtype": dtype}
    values = (
        case.title, case.method, samples, case.length, columns, dtype, torch.get_num_threads(), rows,
        reference.median, ours.median, reference.spread, ours.spread, ratio, bar, ratio >= bar,
        peak_ratio(case, order) if options.memory else None, loss_difference, gradient_difference,
    )  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True)) | stamp()


def ratio_of_rows(case: Case, batch: dict[str, Tensor]) -> float:
    """Rows that PEFT runs through the model relative to those that peftkern runs: prompts and padding repeat."""
    if case.reference != "PEFT":
        return 1.0
    samples, columns = batch["input_ids"].shape
    mask = batch.get("attention_mask")
    tokens = samples * columns if mask is None else int(mask.sum())
    prompt = case.length if case.method == "prompt" else 0
    return samples * (prompt + columns) / (prompt + tokens)


def show_rows(rows: list[Row], title: str) -> None:
    """Print the table."""
    columns = ("case", "B,P,S", "dtype", "thr", "reference s", "ours s", "spread", "rows", "ratio", "bar", "peak",
               "loss", "gradient")  # fmt: skip

    def line(r: Row) -> list[str]:
        return [
            r["case"], f"{r['B']},{r['P']},{r['S']}", r["dtype"], str(r["threads"]), f"{r['reference_s']:.3f}",
            f"{r['ours_s']:.3f}", f"{r['spread_reference']:.0%} {r['spread_ours']:.0%}", f"{r['rows']:.2f}",
            f"{r['ratio']:.2f}", f"{r['bar']:.2f}{'' if r['reached'] else ' missed'}",
            "-" if r["peak_ratio"] is None else f"{r['peak_ratio']:.2f}", f"{r['loss_difference']:.0e}",
            f"{r['gradient_difference']:.0e}",
        ]  # fmt: skip

    show(f"training step, {title}", columns, map(line, rows))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_model_options(parser)
    parser.add_argument("--data", help="CSV of reviews with the sources imdb and rotten_tomatoes")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16"], help="default %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default %(default)s")
    parser.add_argument("--only", type=int, nargs="+", help="indices of the rows to run")
    parser.add_argument("--seconds", type=float, default=30.0, help="time per row (default %(default)s)")
    parser.add_argument("--at-least", type=int, default=5, help="steps of each provider (default %(default)s)")
    parser.add_argument("--cpu-time", action="store_true", help="measure processor time, on one thread")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peaks")
    parser.add_argument("--output", type=Path, default=RESULTS / "packing.csv", help="CSV file")


def run(options: argparse.Namespace) -> None:
    """Measure, print, write."""
    if options.cpu_time:
        options.threads = 1
    torch.set_num_threads(options.threads)
    bench = Workbench(options.model, options.cache, options.data)
    chosen = range(len(CASES)) if options.only is None else options.only
    rows = []
    for dtype in options.dtypes:
        for index in chosen:
            rows.append(measure(bench, index, dtype, options))
            write(rows, options.output)
            gc.collect()
    show_rows(rows, bench.source.title)


if __name__ == "__main__":
    memory.return_freed_memory()
    print(json.dumps(serve(json.load(sys.stdin))))
