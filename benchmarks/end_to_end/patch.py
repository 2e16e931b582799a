# SPDX-License-Identifier: Apache-2.0
"""Training steps, the longest sequence that fits into memory, and generation behind a prefix.

`smollm2` is SmolLM2-135M (as `peftkern demo` finds it) with its weights. Other models have random weights and the
named sizes, cut to --layers layers and to the same share of their vocabulary. All are prefix-tuned. The arms are
stock PEFT, `patch` (peftkern.patch without packing), `patch + gc` (with gradient checkpointing, which PEFT refuses)
and `patch + packing` (padding is skipped, the default of peftkern.patch).

step      Forward and backward on a full batch and on one whose sequences have --seq / 4 to --seq tokens. Tokens/s
          count tokens without padding. Loss and prefix gradient of each arm are first compared with PEFT's in fp32.
          Peak memory is the growth of a process during a step, in a process of its own.
longest   The longest S of one sample whose step succeeds with --budget MB in addition to the model, within one part
          in eight.
generate  Prefill of --prompt tokens and greedy decoding of --tokens, by the same loop over the base model. PEFT's
          cache holds the prefix expanded over the batch. The tokens are compared first, in fp32. A run that needs
          more than --budget-generate MB in addition to the model is "out of memory". The default prompt has one
          token: for the last of several tokens, torch's CPU kernels copy the output layer's weights once per row.

Writes results/end_to_end.csv. Rows of other parts, models and processors stay in the file.
"""

from __future__ import annotations

import argparse
import functools
import gc
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from transformers import AutoConfig

from peftkern.tools.bench.measuring import stamp, take_turns
from peftkern.tools.bench.shapes import MODELS
from peftkern.tools.demo import assets

from ..common import Row, add_model_options, add_options, output_of, progress, show, write
from .models import ARMS, REAL, config_of, load, make_batch, prefix_of, step
from .workers import ask, generate, prompt_of

PARTS = ("step", "longest", "generate")
COLUMNS = ("part", "model", "layers", "vocab", "data", "arm", "dtype", "threads", "B", "S", "P", "new_tokens",
           "median_s", "spread", "tokens_per_s", "over_peft", "peak_mb", "peak_over_peft", "longest_S", "budget_mb",
           "status", "loss_difference", "gradient_difference")  # fmt: skip


def compare(order: Row, arms: list[str], batch: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Relative differences of loss and prefix gradient to PEFT's, in fp32.

    Raises:
        AssertionError: if a loss differs by more than rounding explains, or if a gradient is too far from PEFT's in
            fp64: more than three times as far as PEFT's in fp32, with or without one rounding of the prefix.
    """

    def run(arm: str, dtype: str, rounding: float = 0.0) -> tuple[float, Tensor]:
        model = load(order, arm, dtype, order["P"])
        weight = prefix_of(model)
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
        weight.data.mul_(1 + rounding * noise)
        loss = step(model, batch)
        gradient = weight.grad.double()
        del model
        gc.collect()
        return loss, gradient

    true = run("PEFT", "fp64")[1]

    def apart(x: Tensor, y: Tensor) -> float:
        return ((x - y).norm() / true.norm()).item()

    moved = run("PEFT", "fp32", torch.finfo(torch.float32).eps / 2)[1]
    results = {arm: run(arm, "fp32") for arm in arms}
    stock_loss, stock = results["PEFT"]
    allowed = 3 * max(apart(stock, true), apart(moved, true))
    differences = {}
    for arm, (loss, gradient) in results.items():
        off, error = abs(loss - stock_loss) / abs(stock_loss), apart(gradient, true)
        who = f"{order['model']}, {arm}"
        assert off < 1e-5, f"{who}: losses differ by {off:.1e} of {stock_loss:.2f}"
        assert error <= allowed, f"{who}: prefix gradients err by {error:.1e}, allowed {allowed:.1e}"
        differences[arm] = off, apart(gradient, stock)
    return differences


def measure_step(order: Row, seconds: float, with_memory: bool) -> list[Row]:
    """A row per arm."""
    torch.set_num_threads(order["threads"])
    padded = order["data"] == "padded"
    arms = [arm for arm in ARMS if padded or arm != "patch + packing"]
    batch = make_batch(order["vocab"], order["B"], order["S"], padded)
    differences = compare(order, arms, batch)
    models = {arm: load(order, arm, order["dtype"], order["P"]) for arm in arms}
    steps: dict[str, Callable[[], object]] = {arm: functools.partial(step, m, batch) for arm, m in models.items()}
    times = take_turns(steps, seconds, at_least=3)
    del models, steps
    gc.collect()
    tokens = int((batch["labels"] != -100).sum())
    rows = []
    for arm in arms:
        peak = ask(order | {"arm": arm}) if with_memory else None
        rows.append(
            {"arm": arm, "median_s": times[arm].median, "spread": times[arm].spread, "status": "ok",
             "tokens_per_s": tokens / times[arm].median, "over_peft": times["PEFT"].median / times[arm].median,
             "peak_mb": peak and peak / 1e6, "loss_difference": differences[arm][0],
             "gradient_difference": differences[arm][1]}
        )  # fmt: skip
        if peak and rows[0]["peak_mb"]:
            rows[-1]["peak_over_peft"] = rows[0]["peak_mb"] / rows[-1]["peak_mb"]
    return [_row(order, row) for row in rows]


def measure_longest(order: Row) -> list[Row]:
    """A row per arm that does not need padding."""
    rows = [{"arm": arm, "longest_S": ask(order | {"arm": arm})} for arm in ("PEFT", "patch", "patch + gc")]
    for row in rows:
        row |= {"status": "the longest tried" if row["longest_S"] == order["most"] else "ok"}
        row |= {} if row["longest_S"] else {"status": "out of memory"}
        if row["status"] == rows[0]["status"] == "ok":
            row["over_peft"] = row["longest_S"] / rows[0]["longest_S"]
    return [_row(order, row) for row in rows]


def measure_generate(order: Row, seconds: float) -> list[Row]:
    """A row per arm.

    Whether an arm fits is asked in a process of its own, since a memory limit leaves traces in torch's caches.
    """
    torch.set_num_threads(order["threads"])
    ids, arms = prompt_of(order), ("PEFT", "patch")

    def calls(dtype: str, ids: Tensor, arms: Iterable[str]) -> dict[str, Callable[[], Any]]:
        models = {arm: load(order, arm, dtype, order["P"]).eval() for arm in arms}
        return {
            arm: functools.partial(generate, model, ids, order["P"], order["new_tokens"])
            for arm, model in models.items()
        }

    few = calls("fp32", ids[:2], arms)
    stock, ours = (few[arm]() for arm in arms)
    assert torch.equal(stock, ours), f"{order['model']}: generated tokens differ from PEFT's"
    del few
    gc.collect()
    fitting = [arm for arm in arms if ask(order | {"arm": arm})]
    times = take_turns(calls(order["dtype"], ids, fitting), seconds, at_least=3)
    rows = []
    for arm in arms:
        row: Row = {"arm": arm, "status": "ok" if arm in times else "out of memory"}
        if arm in times:
            row |= {"median_s": times[arm].median, "spread": times[arm].spread,
                    "tokens_per_s": order["B"] * order["new_tokens"] / times[arm].median}  # fmt: skip
            row |= {"over_peft": times["PEFT"].median / times[arm].median} if "PEFT" in times else {}
        rows.append(_row(order, row))
    return rows


def _row(order: Row, measured: Row) -> Row:
    row = order | measured
    return {name: row.get(name) for name in COLUMNS} | stamp()


def tasks_of(options: argparse.Namespace, path: str | None) -> list[tuple[str, Callable[[], list[Row]]]]:
    """A description and a measurement for each row that the options ask for."""
    tasks: list[tuple[str, Callable[[], list[Row]]]] = []
    for threads in options.threads:
        for dtype in options.dtypes:
            for model in options.models:
                real = path if model == REAL else None
                config = AutoConfig.from_pretrained(real) if real else config_of(model, options.layers)
                order: Row = {"model": model, "path": real, "layers": config.num_hidden_layers, "dtype": dtype,
                              "vocab": config.vocab_size, "threads": threads, "P": options.prefix}  # fmt: skip
                about = f"{model}, {dtype}, threads={threads}"
                if "step" in options.part:
                    for data in ("full", "padded"):
                        one = order | {"part": "step", "B": options.batch, "S": options.seq, "data": data}
                        call = functools.partial(measure_step, one, options.seconds, options.memory)
                        tasks.append((f"step, {data} batch, {about}", call))
                if "longest" in options.part and (model == REAL or options.quick):
                    one = order | {"part": "longest", "B": 1, "data": "full", "budget_mb": options.budget,
                                   "least": options.shortest, "most": options.longest}  # fmt: skip
                    tasks.append((f"longest, {about}", functools.partial(measure_longest, one)))
                for B, P in options.generate if "generate" in options.part else ():
                    one = order | {"part": "generate", "B": B, "S": options.prompt, "P": P, "data": "full",
                                   "new_tokens": options.tokens, "budget_mb": options.budget_generate}  # fmt: skip
                    call = functools.partial(measure_generate, one, options.seconds)
                    tasks.append((f"generate B={B} P={P}, {about}", call))
    return tasks


def kept(path: Path, rows: list[Row]) -> list[Row]:
    """Rows of a file that differ from all ``rows`` in part, model, dtype, threads or processor."""
    if not path.exists():
        return []
    keys = ("part", "model", "dtype", "threads", "cpu")
    measured = {tuple(str(row[name]) for name in keys) for row in rows}
    there = pd.read_csv(path, keep_default_na=False).to_dict("records")
    return [row for row in there if tuple(str(row[name]) for name in keys) not in measured]


def show_rows(rows: list[Row]) -> None:
    """A table per part."""

    def text(value: Any, form: str = ".3g") -> str:
        return "-" if value is None else f"{value:{form}}" if isinstance(value, float) else str(value)

    parts = {
        "step": ("model", "layers", "data", "B", "S", "P", "arm", "threads", "median_s", "spread", "tokens_per_s",
                 "over_peft", "peak_mb", "peak_over_peft", "loss_difference", "gradient_difference"),
        "longest": ("model", "layers", "P", "arm", "threads", "budget_mb", "longest_S", "over_peft", "status"),
        "generate": ("model", "layers", "B", "P", "S", "new_tokens", "arm", "threads", "median_s", "spread",
                     "tokens_per_s", "over_peft", "status"),
    }  # fmt: skip
    for part, columns in parts.items():
        if found := [row for row in rows if row["part"] == part]:
            show(part, columns, ([text(row[name]) for name in columns] for row in found))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_options(parser, seconds=6.0, threads=[torch.get_num_threads()])
    add_model_options(parser)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", choices=[REAL, *MODELS, "tiny"], default=[REAL, "llama-3.2-1b"])
    parser.add_argument("--layers", type=int, default=2, help="layers of a random model (default %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="samples of a step (default %(default)s)")
    parser.add_argument("--seq", type=int, default=256, help="tokens of a sample (default %(default)s)")
    parser.add_argument(
        "--prefix", type=int, default=32, help="prefix tokens of step and longest (default %(default)s)"
    )
    parser.add_argument(
        "--memory", action=argparse.BooleanOptionalAction, default=True, help="measure the peaks of step"
    )
    parser.add_argument("--budget", type=int, default=2000, help="MB for longest (default %(default)s)")
    parser.add_argument(
        "--shortest", type=int, default=256, help="smallest S that longest tries (default %(default)s)"
    )
    parser.add_argument(
        "--longest", type=int, default=8192, help="largest S that longest tries (default %(default)s)"
    )
    parser.add_argument("--budget-generate", type=int, default=6000, help="MB for generate (default %(default)s)")
    parser.add_argument("--prompt", type=int, default=1, help="tokens before generated ones (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=16, help="tokens to generate (default %(default)s)")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 16, 128], help="batch sizes of generate (default %(default)s)"
    )
    parser.add_argument("--prefixes", type=int, nargs="+", default=[64, 1024, 8192], help="prefix tokens of generate")


def run(options: argparse.Namespace) -> None:
    """Check, measure, print, write."""
    if options.quick:
        small = {"models": ["tiny"], "seq": 24, "prefix": 5, "seconds": 0.0, "budget": 16, "shortest": 64,
                 "longest": 2048, "budget_generate": 500, "prompt": 5, "tokens": 3, "batches": [1, 3],
                 "prefixes": [4, 40]}  # fmt: skip
        vars(options).update(small)
    options.generate = [(B, P) for P in options.prefixes for B in options.batches]
    path = None
    if REAL in options.models:
        path = assets.find_model(options.model, assets.cache_folder(options.cache)).path
    output = output_of(options, "end_to_end.csv")
    rows: list[Row] = []
    try:
        for row in progress(tasks_of(options, path)):
            rows.append(row)
            if output:
                write(kept(output, rows) + rows, output)
    except KeyboardInterrupt:
        print("stopped; the rows that were measured are kept", file=sys.stderr)
    finally:
        show_rows(rows)
