# SPDX-License-Identifier: Apache-2.0
"""Where the time of a whole training step goes: stock PEFT beside peftkern, part by part.

    python -m benchmarks.step_parts          writes results/step_parts.csv and, with matplotlib, step_parts.png

A model of SmolLM2-135M's shape with random weights (or --model) behind a prefix, on padded rows of random tokens
with one label each, as in `peftkern demo`, or with a label on each token (--labels all). Forward, backward and
AdamW's step on the prefix. The losses of all arms are compared before anything is timed.

The parts are timed in the running step, without a profiler. Forward: a stack of clocks that hooks of the modules
switch, so that a moment counts for the innermost part. Backward: hooks of each node of the graph; a node belongs to
the part whose forward created it. What no clock covers counts as the rest. The arms take turns. `step_s` is the step
without clocks, and `clocks` how much longer the step with clocks takes.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import functools
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PrefixTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

import peftkern
from peftkern.tools.bench.measuring import stamp
from peftkern.tools.bench.providers import DTYPES
from peftkern.tools.demo.training import sharing_copy

from .alternation import alternate
from .common import Row, add_options, output_of, progress, show, write
from .end_to_end.models import make_batch, prefix_of, smollm2_config

LINEAR, ATTENTION, HEAD, OPTIMIZER, REST = (
    "linear layers", "attention", "output layer and loss", "optimizer", "norms, rotary, rest"
)  # fmt: skip
PARTS = (LINEAR, ATTENTION, HEAD, REST, OPTIMIZER)
#: Arguments of peftkern.patch by arm, None for stock PEFT.
ARMS: dict[str, dict[str, Any] | None] = {
    "PEFT": None, "patch, with padding": {"packing": False}, "patch": {},
    "patch, labelled logits": {"logits": "labelled"},
}  # fmt: skip


class Clocks:
    """Divides the time of a step of a Llama among :data:`PARTS`.

    Attributes:
        seconds: by (part, "forward" or "backward").
    """

    def __init__(self, model: Any) -> None:
        base = model.get_base_model()
        self.seconds: dict[tuple[str, str], float] = {}
        self._head = base.get_output_embeddings()
        self._parts: dict[nn.Module, str] = {base: REST, self._head: HEAD}
        for module in base.model.modules():
            if isinstance(module, nn.Linear):
                self._parts[module] = LINEAR
            elif isinstance(module, modeling_llama.LlamaAttention):
                self._parts[module] = ATTENTION
            elif module not in self._parts and not isinstance(module, nn.ModuleList):
                self._parts[module] = REST
        self._stack: list[str] = [REST]
        self._since = 0.0
        self._changes: list[tuple[int, str]] = []  # (number of the next node of the graph, part that creates it)

    def _switch(self) -> None:
        """Charge the time since the last switch to the current part."""
        now = time.perf_counter()
        key = self._stack[-1], "forward"
        self.seconds[key] = self.seconds.get(key, 0.0) + now - self._since
        self._since = now

    def _enter(self, part: str) -> None:
        self._switch()
        self._stack.append(part)
        self._changes.append((torch._C._autograd._get_sequence_nr(), part))

    def _leave(self) -> None:
        self._switch()
        self._stack.pop()
        self._changes.append((torch._C._autograd._get_sequence_nr(), self._stack[-1]))

    def _before(self, module: nn.Module, args: Any) -> None:
        if module in self._parts:
            if module is self._head:  # what follows it in the base model's forward is the loss
                self._stack[-1] = HEAD
            self._enter(self._parts[module])

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if module in self._parts:
            self._leave()

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Time what runs inside."""
        rotary = modeling_llama.apply_rotary_pos_emb

        def timed_rotary(*args: Any, **kwargs: Any) -> Any:
            self._enter(REST)
            try:
                return rotary(*args, **kwargs)
            finally:
                self._leave()

        handles = (register_module_forward_pre_hook(self._before), register_module_forward_hook(self._after))
        modeling_llama.apply_rotary_pos_emb = timed_rotary
        self._stack, self._changes, self._since = [REST], [(0, REST)], time.perf_counter()
        try:
            yield
            self._switch()
        finally:
            modeling_llama.apply_rotary_pos_emb = rotary
            for handle in handles:
                handle.remove()

    def watch(self, loss: Tensor) -> None:
        """Time the nodes that the backward of ``loss`` will run."""
        starts: dict[Any, float] = {}
        numbers, parts = zip(*self._changes, strict=True)
        found, left = set(), [loss.grad_fn]
        while left:
            node = left.pop()
            if node is None or node in found:
                continue
            found.add(node)
            left += [after for after, _ in node.next_functions]
            number = node._sequence_nr()
            is_leaf = number >= 2**63  # accumulates a gradient
            part = REST if is_leaf else parts[bisect.bisect_right(numbers, number) - 1]
            node.register_prehook(functools.partial(self._node_starts, starts, node))
            node.register_hook(functools.partial(self._node_ends, starts, node, part))

    def _node_starts(self, starts: dict[Any, float], node: Any, *gradients: Any) -> None:
        starts[node] = time.perf_counter()

    def _node_ends(self, starts: dict[Any, float], node: Any, part: str, *gradients: Any) -> None:
        key = part, "backward"
        self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - starts.pop(node)


class Arm:
    """A model with its optimizer, on one batch."""

    def __init__(self, base: Any, name: str, prefix: int, batch: dict[str, Tensor]) -> None:
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=prefix)
        self.model = get_peft_model(sharing_copy(base), config)
        prefix_of(self.model).data.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
        options = ARMS[name]
        if options is not None:
            peftkern.patch(self.model, **options)
        self.model.train()
        self.batch = batch
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.0)  # the prefix stays, so that all steps are alike

    def loss(self) -> Tensor:
        """The loss of the batch."""
        return self.model(**self.batch).loss  # type: ignore[no-any-return]

    def step(self) -> None:
        """A step without clocks."""
        self.loss().backward()
        self._update()

    def _update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def timed_step(self) -> dict[tuple[str, str], float]:
        """A step with clocks: seconds by (part, phase), with what no clock covers in the rest."""
        clocks, start = Clocks(self.model), time.perf_counter()
        with clocks.forward():
            loss = self.loss()
        watching = time.perf_counter()
        clocks.watch(loss)
        begin = time.perf_counter()
        loss.backward()
        middle = time.perf_counter()
        self._update()
        end = time.perf_counter()
        found = clocks.seconds
        for phase, whole in (("forward", watching - start), ("backward", middle - begin)):
            key = REST, phase
            covered = sum(x for (_, name), x in found.items() if name == phase)
            found[key] = found.get(key, 0.0) + whole - covered
        found[OPTIMIZER, "update"] = end - middle
        return found


def one_label(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with a label on the last token of each row only."""
    last = batch["attention_mask"].sum(1, keepdim=True) - 1
    labels = torch.full_like(batch["labels"], -100).scatter_(1, last, batch["input_ids"].gather(1, last))
    return {**batch, "labels": labels}


def check(arms: dict[str, Arm], tolerance: float) -> dict[str, float]:
    """Relative difference of each arm's loss to PEFT's.

    Raises:
        AssertionError: for a difference above the tolerance.
    """
    losses = {name: float(arm.loss().item()) for name, arm in arms.items()}
    apart = {name: abs(loss - losses["PEFT"]) / abs(losses["PEFT"]) for name, loss in losses.items()}
    for name, difference in apart.items():
        assert difference < tolerance, f"{name}: expected PEFT's loss {losses['PEFT']:.6g}, got {losses[name]:.6g}"
    return apart


def measure(dtype: str, threads: int, options: argparse.Namespace) -> list[Row]:
    """A row per arm and part."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if options.model is None:
        base = AutoModelForCausalLM.from_config(smollm2_config(options.quick), dtype=DTYPES[dtype])
    else:
        base = AutoModelForCausalLM.from_pretrained(options.model, dtype=DTYPES[dtype])
    batch = make_batch(base.config.vocab_size, options.batch, options.seq, True)
    if options.labels == "last":
        batch = one_label(batch)
    arms = {name: Arm(base, name, options.prefix, batch) for name in ARMS}
    apart = check(arms, 1e-5 if dtype == "fp32" else 1e-2)
    found: dict[str, list[dict[tuple[str, str], float]]] = {name: [] for name in arms}
    calls: dict[str, Callable[[], object]] = {}
    for name, arm in arms.items():
        calls[name] = arm.step
        calls[f"{name}, timed"] = functools.partial(lambda name, arm: found[name].append(arm.timed_step()), name, arm)
    times = alternate(calls, options.seconds, options.at_least)
    return [row for name in arms for row in rows_of(name, found[name], times, apart[name], dtype, threads, options)]


def rows_of(
    arm: str,
    steps: list[dict[tuple[str, str], float]],
    times: dict[str, list[float]],
    apart: float,
    dtype: str,
    threads: int,
    options: argparse.Namespace,
) -> list[Row]:
    """A row per part of one arm; ``seconds`` are medians over the steps."""
    steps = steps[-len(times[arm]) :]  # those before the rounds warmed up
    whole = statistics.median(times[arm])
    overhead = statistics.median(b / a for a, b in zip(times[arm], times[f"{arm}, timed"], strict=True)) - 1
    totals = {part: [sum(x for (name, _), x in step.items() if name == part) for step in steps] for part in PARTS}
    sums = sum(statistics.median(x) for x in totals.values())
    rows: list[Row] = []
    for part in PARTS:
        row: Row = {"arm": arm, "part": part, "seconds": statistics.median(totals[part])}
        first, median, third = statistics.quantiles(totals[part], n=4)
        row["spread"] = (third - first) / median if median else 0.0
        for phase in ("forward", "backward", "update"):
            row[f"{phase}_s"] = statistics.median(step.get((part, phase), 0.0) for step in steps)
        row |= {"share": row["seconds"] / sums, "step_s": whole, "clocks": overhead, "loss_difference": apart}
        row |= {"dtype": dtype, "threads": threads, "B": options.batch, "S": options.seq, "P": options.prefix}
        rows.append(row | {"labels": options.labels, "rounds": len(steps)} | stamp())
    return rows


def show_rows(rows: list[Row]) -> None:
    """Print a line per arm."""
    columns = ("arm", "dtype", "thr", "step s", "clocks", *PARTS, "loss diff.")
    lines = []
    for _, group in itertools.groupby(rows, key=lambda r: (r["arm"], r["dtype"], r["threads"])):
        found = list(group)
        r = found[0]
        cells = [f"{x['seconds']:.3f} ({x['share']:.0%})" for x in found]
        lines.append([r["arm"], r["dtype"], str(r["threads"]), f"{r['step_s']:.3f}", f"{r['clocks']:+.1%}", *cells,
                      f"{r['loss_difference']:.0e}"])  # fmt: skip
    show("parts of a training step, seconds (share)", columns, lines)


def main(arguments: list[str] | None = None) -> list[Row]:
    """Measure, print, write, draw, return the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, seconds=60.0, threads=[torch.get_num_threads()])
    parser.set_defaults(dtypes=["fp32"])
    parser.add_argument("--model", help="folder of a Llama; default SmolLM2-135M's shape, random weights")
    parser.add_argument("--batch", type=int, default=4, help="default %(default)s")
    parser.add_argument("--seq", type=int, default=256, help="longest row; default %(default)s")
    parser.add_argument("--prefix", type=int, default=32, help="default %(default)s")
    parser.add_argument("--labels", choices=["last", "all"], default="last", help="default %(default)s: one per row")
    parser.add_argument("--at-least", type=int, default=5, help="rounds (default %(default)s)")
    options = parser.parse_args(arguments)
    if options.quick:
        options.batch, options.seq, options.prefix, options.seconds, options.at_least = 4, 24, 5, 0.0, 2
    threads = torch.get_num_threads()
    output: Path | None = output_of(options, "step_parts.csv")
    tasks = [
        (f"{dtype}, threads={number}", functools.partial(measure, dtype, number, options))
        for dtype, number in itertools.product(options.dtypes, options.threads)
    ]
    try:
        rows = list(progress(tasks))
    finally:
        torch.set_num_threads(threads)
    show_rows(rows)
    if output is not None:
        write(rows, output)
        if importlib.util.find_spec("matplotlib"):
            from . import plot

            plot.main([str(output), "--format", "png"])
    return rows


if __name__ == "__main__":
    main()
