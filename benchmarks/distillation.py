# SPDX-License-Identifier: Apache-2.0
"""Distillation: memory and time of the loss, and of a teacher that has read its document once.

    python -m benchmarks.distillation             writes results/distillation.csv
    python -m benchmarks.distillation --quick     tiny sizes, to see that it runs

The loss is compared with the eager way of PEFT's example (examples/cartridge_self_study): logits [N, V] of teacher
and student, a log-softmax of both, and the K largest of the teacher. "student" is forward and backward of the loss
alone, for which both ways have the teacher's K tokens. "eager, fp32" multiplies copies in fp32, which is faster than
bf16 on CPUs without bf16 instructions. The teacher's document is a prefix, or stands before every question.

Runs alternate in one process; times are medians. `--cpu-time` measures processor time, for a machine with other work.
Memory is the most that torch's allocator holds beyond the inputs.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import peftkern
from peftkern.distillation import top_k_log_probs
from peftkern.tools.bench.measuring import stamp
from peftkern.tools.bench.memory import allocated_bytes
from peftkern.tools.bench.providers import DTYPES

from .common import Row, add_options, output_of, progress, show, write
from .end_to_end.models import smollm2_config

#: Rows for which the eager way multiplies in bf16: without instructions for it, more would take many minutes.
SLOW_ROWS = 128
#: Share of the logits' bytes that the loss may take, and how many times as fast a teacher behind a prefix must be.
MOST_MEMORY, LEAST_SPEEDUP, LEAST_ROWS = 0.05, 5.0, 8.0


@dataclass
class Loss:
    """One distillation: hidden states [N, E] of student and teacher, and the output layer [V, E]."""

    student: Tensor
    teacher: Tensor
    lm_head: Tensor
    k: int

    @classmethod
    def random(cls, N: int, V: int, E: int, K: int, dtype: torch.dtype) -> Loss:
        """Random numbers, with logits of standard deviation 2."""
        generator = torch.Generator().manual_seed(0)
        teacher, noise = (torch.randn(N, E, generator=generator) for _ in range(2))
        lm_head = torch.randn(V, E, generator=generator) * (2 / E**0.5)
        student = (teacher + 0.3 * noise).to(dtype).requires_grad_()
        return cls(student, teacher.to(dtype), lm_head.to(dtype), K)

    def rows(self, count: int) -> Loss:
        """The same of fewer rows."""
        return Loss(self.student.detach()[:count].requires_grad_(), self.teacher[:count], self.lm_head, self.k)

    def eager_teacher(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(ids, log-probabilities), from logits [N, V]."""
        with torch.no_grad():
            logits = self.teacher.to(dtype) @ self.lm_head.to(dtype).t()
            ids = logits.topk(self.k).indices
            return ids, logits.log_softmax(-1).gather(-1, ids)

    def eager_student(self, ids: Tensor, log_probs: Tensor, dtype: torch.dtype) -> Tensor:
        """The loss, after backward, from logits [N, V]."""
        self.student.grad = None
        logits = self.student.to(dtype) @ self.lm_head.to(dtype).t()
        loss = -(log_probs.exp() * logits.log_softmax(-1).gather(-1, ids)).sum(-1).mean()
        loss.backward()
        return loss.detach()

    def fused_teacher(self) -> tuple[Tensor, Tensor]:
        """(ids, log-probabilities)."""
        return top_k_log_probs(self.teacher, self.lm_head, self.k)

    def fused_student(self, ids: Tensor, log_probs: Tensor) -> Tensor:
        """The loss, after backward."""
        self.student.grad = None
        loss = peftkern.distillation_loss(self.student, self.lm_head, ids, log_probs)
        loss.backward()
        return loss.detach()


@dataclass
class Measured:
    """Median seconds of a run, and its last result."""

    seconds: float
    result: Any


def measure(runs: dict[str, Callable[[], Any]], options: argparse.Namespace) -> dict[str, Measured]:
    """Time runs that alternate."""
    clock = time.process_time if options.cpu_time else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in runs}
    results: dict[str, Any] = {}
    for _ in range(options.repeats):
        for name, run in runs.items():
            begin = clock()
            results[name] = run()
            times[name].append(clock() - begin)
    return {name: Measured(statistics.median(times[name]), results[name]) for name in runs}


def memory_rows(name: str, loss: Loss, top_k: list[tuple[Tensor, Tensor]]) -> Iterator[Row]:
    """The peak of the teacher's K tokens, which are appended to ``top_k``, and of the loss with its gradient."""
    logits = len(loss.student) * len(loss.lm_head) * loss.student.itemsize
    for case, run in (
        ("teacher", lambda: top_k.append(loss.fused_teacher())),
        ("student", lambda: loss.fused_student(*top_k[0])),
    ):
        peak = allocated_bytes(run)
        share = peak / logits
        yield {
            "part": "memory", "case": case, "dtype": name, "N": len(loss.student), "peak_bytes": peak,
            "logits_bytes": logits, "ratio": share, "bar": f"<= {MOST_MEMORY}", "reached": share <= MOST_MEMORY,
        }  # fmt: skip


def time_rows(
    name: str, loss: Loss, top_k: tuple[Tensor, Tensor], dtype: torch.dtype, options: argparse.Namespace
) -> Iterator[Row]:
    """Both ways of the student alone, and of teacher and student. ``dtype``: of the eager way's products."""
    ids, log_probs = (x[: len(loss.student)] for x in top_k)
    runs = measure(
        {
            "eager student": lambda: loss.eager_student(ids, log_probs.to(dtype), dtype),
            "student": lambda: loss.fused_student(ids, log_probs),
            "eager teacher": lambda: loss.eager_teacher(dtype),
            "teacher": loss.fused_teacher,
        },
        options,
    )
    got, want = runs["student"].result, runs["eager student"].result
    eager = "eager" if dtype == loss.student.dtype else "eager, fp32"
    for case, parts in (("student", ["student"]), ("teacher and student", ["teacher", "student"])):
        ours, theirs = (sum(runs[way + x].seconds for x in parts) for way in ("", "eager "))
        yield {
            "part": "time", "case": f"{case} / {eager}", "dtype": name, "N": len(loss.student),
            "peftkern_s": ours, "other_s": theirs, "ratio": theirs / ours, "bar": ">= 1", "reached": theirs >= ours,
            "difference": float((got - want).abs() / want.abs()),
        }  # fmt: skip


def loss_rows(options: argparse.Namespace) -> Iterator[Row]:
    """Memory and time of the loss."""
    N, V, E, K = (64, 4096, 32, 20) if options.quick else (4096, 49152, 576, 20)
    for name in options.dtypes:
        dtype = DTYPES[name]
        loss = Loss.random(N, V, E, K, dtype)
        top_k: list[tuple[Tensor, Tensor]] = []
        yield from memory_rows(name, loss, top_k)
        if dtype != torch.float32:
            yield from time_rows(name, loss.rows(min(N, SLOW_ROWS)), top_k[0], dtype, options)
        yield from time_rows(name, loss, top_k[0], torch.float32, options)


def teacher_rows(options: argparse.Namespace) -> Iterator[Row]:
    """Steps of a teacher: the document as a prefix, against the document before each question."""
    batch, document, question, k = (2, 64, 8, 20) if options.quick else (8, 2048, 64, 20)
    torch.manual_seed(0)
    config = smollm2_config(options.quick)
    model: Any = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    text = torch.randint(0, config.vocab_size, (1, document))
    ids = torch.randint(0, config.vocab_size, (batch, question))
    whole = {"input_ids": torch.cat([text.expand(batch, -1), ids], 1)}
    rows = torch.zeros(batch, document + question, dtype=torch.bool)
    rows[:, document:] = True
    with torch.no_grad():
        cache = model.model(input_ids=text, use_cache=True).past_key_values
        prefix = peftkern.PrefixKV.from_cache(cache, model_or_config=model).requires_grad_(False)
    reader = peftkern.patch(copy.deepcopy(model), prefix)
    runs = measure(
        {
            "prefix": lambda: peftkern.capture_top_k(reader, {"input_ids": ids}, k),
            "reread": lambda: peftkern.capture_top_k(model, whole, k, rows=rows),
        },
        options,
    )
    got, want = runs["prefix"].result, runs["reread"].result
    agree = float((got.ids == want.ids).float().mean())
    common = {"part": "teacher", "dtype": "fp32", "N": ids.numel(), "difference":
              float((got.log_probs - want.log_probs).abs().max())}  # fmt: skip
    before, after = whole["input_ids"].numel(), ids.numel()
    yield common | {
        "case": "token rows", "ratio": before / after, "bar": f">= {LEAST_ROWS:g}",
        "reached": before / after >= LEAST_ROWS,
    }  # fmt: skip
    fast, slow = runs["prefix"].seconds, runs["reread"].seconds
    yield common | {
        "case": f"time of a step, {agree:.0%} of the ids equal",
        "peftkern_s": fast, "other_s": slow, "ratio": slow / fast, "bar": f">= {LEAST_SPEEDUP:g}",
        "reached": slow / fast >= LEAST_SPEEDUP,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Run, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, seconds=0, threads=[torch.get_num_threads()])
    parser.set_defaults(dtypes=["fp32", "bf16"])
    parser.add_argument("--repeats", type=int, default=3, help="runs of each way (default %(default)s)")
    parser.add_argument("--cpu-time", action="store_true", help="measure processor time; use one thread")
    parser.add_argument("--parts", nargs="+", choices=("loss", "teacher"), default=["loss", "teacher"])
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads[0])
    parts = {"loss": loss_rows, "teacher": teacher_rows}
    tasks: list[tuple[str, Callable[[], list[Row]]]] = [
        (part, partial(_listed, parts[part], options)) for part in options.parts
    ]
    rows = [row | {"threads": torch.get_num_threads()} | stamp() for row in progress(tasks)]
    output = output_of(options, "distillation.csv")
    if output is not None:
        write(rows, output)
    shown = ("part", "case", "dtype", "N", "peftkern_s", "other_s", "ratio", "bar", "reached", "difference")
    show("Distillation", shown, ([_cell(row.get(name)) for name in shown] for row in rows))
    return rows


def _listed(measure: Callable[[argparse.Namespace], Iterator[Row]], options: argparse.Namespace) -> list[Row]:
    return list(measure(options))


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
