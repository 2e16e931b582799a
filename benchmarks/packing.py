# SPDX-License-Identifier: Apache-2.0
"""Training steps whose prompts run once and whose padding is left out, beside stock PEFT on the same batches.

    python benchmarks/packing.py

SmolLM2-135M (as `peftkern demo` finds it), forward and backward, no optimizer step; random tokens with a loss on
every position, or movie reviews. The providers take turns in one process; medians and quartiles. The losses and the
gradients of prompt or prefix are compared first, in fp32; in the row's dtype our loss may lie twice as far from
PEFT's in fp32 as PEFT's own. "rows" is the ratio of rows that PEFT and peftkern run through the model; "bar" is what
a row must reach. "labelled" compares logits="labelled" with peftkern's default. Peak memory is how far a process
grows during a step, in a process of its own. Writes results/packing.csv, row by row.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

import peftkern
from peftkern.tools.bench import memory
from peftkern.tools.bench.measuring import stamp, take_turns
from peftkern.tools.bench.providers import DTYPES
from peftkern.tools.bench.show import write
from peftkern.tools.demo import assets
from peftkern.tools.demo.reviews import Task, split, training_rows

RESULTS = Path(__file__).parent / "results" / "packing.csv"
COLUMNS = ("case", "method", "B", "P", "S", "dtype", "threads", "rows", "reference_s", "ours_s",
           "spread_reference", "spread_ours", "ratio", "bar", "reached", "peak_ratio", "loss_difference",
           "gradient_difference")  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        data: ``random``, or the source of reviews cut to ``seq`` tokens.
        bar: the ratio to reach; None for 0.95 of the ratio of rows.
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
    """Models and batches of the cases."""

    def __init__(self, model: str | None, cache: Path | None, data: str | None) -> None:
        self.source = assets.find_model(model, assets.cache_folder(cache))
        self.reviews = data
        self.tokenizer = AutoTokenizer.from_pretrained(self.source.path)

    def batch(self, case: Case) -> dict[str, Tensor]:
        """What both providers train on."""
        if case.data == "random":
            ids = torch.randint(0, 40_000, (case.batch, case.seq), generator=torch.Generator().manual_seed(0))
            return {"input_ids": ids, "labels": ids}
        reviews = [review for review in assets.read_reviews(self.reviews) if review.source == case.data]
        rows = training_rows(split(reviews, 100)[0], 0, case.batch, 0)
        return Task(self.tokenizer, case.seq).batch(rows)._asdict()

    def model(self, case: Case, provider: str, dtype: torch.dtype) -> Any:
        """A PEFT model in training mode, patched unless the provider is PEFT."""
        base = AutoModelForCausalLM.from_pretrained(self.source.path, dtype=dtype).train()
        config = PromptTuningConfig if case.method == "prompt" else PrefixTuningConfig
        model = get_peft_model(base, config(task_type="CAUSAL_LM", num_virtual_tokens=case.length))
        weight = model.prompt_encoder["default"].embedding.weight.data
        # Prompts of the size of token embeddings, keys and values of that of a text's.
        std = base.get_input_embeddings().weight.std().item() if case.method == "prompt" else 0.3
        weight.normal_(std=std, generator=torch.Generator().manual_seed(1))
        if provider != "PEFT":
            peftkern.patch(model, logits="labelled" if provider == "labelled" else "all")
        return model


def step(model: Any, batch: dict[str, Tensor]) -> float:
    """Forward and backward; the loss."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item()  # type: ignore[no-any-return]


def compare(bench: Workbench, case: Case, batch: dict[str, Tensor]) -> tuple[float, float, float]:
    """PEFT's loss in fp32, and relative differences of loss and gradient between it and the case's provider."""
    losses, gradients = [], []
    for provider in ("PEFT", case.ours):
        model = bench.model(case, provider, torch.float32)
        losses.append(step(model, batch))
        gradients.append(model.prompt_encoder["default"].embedding.weight.grad)
        del model
        gc.collect()
    loss, gradient = abs(losses[1] - losses[0]) / losses[0], gradients[1] - gradients[0]
    return losses[0], loss, (gradient.norm() / gradients[0].norm()).item()


def peak(arguments: list[str], index: int, provider: str, dtype: str) -> float | None:
    """Bytes that a step needs beside the model, measured by :func:`serve_peak` in another process."""
    command = [sys.executable, __file__, *arguments, "--peak", str(index), provider, dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: float | None = json.loads(done.stdout.splitlines()[-1])
    return result


def serve_peak(bench: Workbench, case: Case, provider: str, dtype: torch.dtype) -> None:
    """Print the peak of a second step."""
    memory.return_freed_memory()
    model, batch = bench.model(case, provider, dtype), bench.batch(case)
    step(model, batch)
    gc.collect()
    print(json.dumps(memory.peak_bytes(lambda: step(model, batch))))


def measure(
    bench: Workbench, index: int, dtype: str, options: argparse.Namespace, passed: list[str]
) -> dict[str, Any]:
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
    times = take_turns(steps, options.seconds, options.at_least, clock)
    reference, ours = (times[name] for name in (case.reference, case.ours))

    mask = batch.get("attention_mask")
    samples, columns = batch["input_ids"].shape
    tokens = samples * columns if mask is None else int(mask.sum())
    prompt = case.length if case.method == "prompt" else 0
    rows = samples * (prompt + columns) / (prompt + tokens) if case.reference == "PEFT" else 1.0
    bar, ratio = 0.95 * rows if case.bar is None else case.bar, reference.median / ours.median
    peaks = [peak(passed, index, name, dtype) for name in (case.reference, case.ours)] if options.memory else []
    values = (
        case.title, case.method, samples, case.length, columns, dtype, torch.get_num_threads(), rows,
        reference.median, ours.median, reference.spread, ours.spread, ratio, bar, ratio >= bar,
        peaks[0] / peaks[1] if all(peaks) and peaks else None, loss_difference, gradient_difference,
    )  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True)) | stamp()


def show(rows: list[dict[str, Any]], title: str) -> None:
    """Print the table."""
    table = Table(title=f"training step, {title}", caption=f"torch {torch.__version__}")
    names = ("case", "B,P,S", "dtype", "thr", "reference s", "ours s", "spread", "rows", "ratio", "bar", "peak",
             "loss", "gradient")  # fmt: skip
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        mark = "" if row["reached"] else " missed"
        table.add_row(
            row["case"], f"{row['B']},{row['P']},{row['S']}", row["dtype"], str(row["threads"]),
            f"{row['reference_s']:.3f}", f"{row['ours_s']:.3f}",
            f"{row['spread_reference']:.0%} {row['spread_ours']:.0%}", f"{row['rows']:.2f}", f"{row['ratio']:.2f}",
            f"{row['bar']:.2f}{mark}", "-" if row["peak_ratio"] is None else f"{row['peak_ratio']:.2f}",
            f"{row['loss_difference']:.0e}", f"{row['gradient_difference']:.0e}",
        )  # fmt: skip
    Console(width=150).print(table)


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name; default SmolLM2-135M-Instruct")
    parser.add_argument("--cache", type=Path, help="where the converted model is kept")
    parser.add_argument("--data", help="CSV of reviews with the sources imdb and rotten_tomatoes")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", type=int, nargs="+", help="indices of the rows to run")
    parser.add_argument("--seconds", type=float, default=30.0, help="per row")
    parser.add_argument("--at-least", type=int, default=5, help="steps of each provider")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, of one thread")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peaks")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.set_verbosity_error()
    if options.cpu_time:
        options.threads = 1
    torch.set_num_threads(options.threads)
    bench = Workbench(options.model, options.cache, options.data)
    if options.peak:
        index, provider, dtype = options.peak
        serve_peak(bench, CASES[int(index)], provider, DTYPES[dtype])
        return
    passed = ["--threads", str(options.threads)]
    for name in ("model", "cache", "data"):
        if getattr(options, name) is not None:
            passed += [f"--{name}", str(getattr(options, name))]
    chosen = range(len(CASES)) if options.only is None else options.only
    rows = []
    for dtype in options.dtypes:
        for index in chosen:
            rows.append(measure(bench, index, dtype, options, passed))
            write(rows, options.output)
            gc.collect()
    show(rows, bench.source.title)


if __name__ == "__main__":
    main()
