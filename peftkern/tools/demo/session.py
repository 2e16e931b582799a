# SPDX-License-Identifier: Apache-2.0
"""One run of the demo from the command line to the report."""

from __future__ import annotations

import argparse
import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from ... import __version__
from . import checkpoint
from .assets import ModelSource, Review, cache_folder, find_model, read_reviews
from .checkpoint import Progress
from .measuring import Measured, measure
from .options import DemoError, Options, resolve
from .report import Findings, duration, headline, setting, table, write_files
from .reviews import Batch, Task, split, training_rows
from .training import ARMS, Arm, Pair, build_arms, evaluate, load_base, train_pair

_SAVE_EVERY = 50
_TELL_EVERY = 10


def run_session(args: argparse.Namespace) -> int:
    """See :func:`peftkern.tools.demo.run`.

    Raises:
        DemoError: for what the user can put right.
    """
    console = Console(highlight=False, soft_wrap=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers and peft to each other
        try:
            return _run(args, console)
        except KeyboardInterrupt:
            return _stopped(args, console)


def _run(args: argparse.Namespace, console: Console) -> int:
    folder = _open_out(args)
    state = checkpoint.read(folder) if folder else None
    options = resolve(args, state and state["options"])
    threads = args.threads or (state and state["threads"]) or torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.manual_seed(options.seed)
    _quiet_libraries()

    with console.status("reading the reviews"):
        train, held_out = split(read_reviews(options.data), options.eval_rows)
    with console.status("loading the model (converted at first use, about 20 s)"):
        source = find_model(options.model, cache_folder(args.cache))
        base, task = load_base(source, options)
        arms = build_arms(base, task, options)
    progress = Progress(options, threads)
    if folder and state:
        checkpoint.restore(folder, state, arms, progress)
        console.print(f"Going on from {folder}, {progress.done} of {options.steps} steps done.")
    batch = task.batch(training_rows(train, 0, options.batch_size, options.seed))
    backend = _backend(base, options, batch)
    console.print(f"[bold]{source.title}[/], stock PEFT beside PEFT + peftkern")
    console.print(f"[dim]{setting(options, threads, backend)}[/]")

    if (load := _load()) > 0.5 * (cores := os.cpu_count() or 1):
        console.print(
            f"[yellow]The machine is busy (load {load:.1f} on {cores} cores): times will spread, and fewer --threads "
            "may be faster.[/]"
        )

    columns = (
        TextColumn("{task.description:<16}"), BarColumn(12), MofNCompleteColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Bars(*columns, console=console) as bars:
        models = {name: arm.model for name, arm in arms.items()}
        _measure_accuracy("zero-shot", {"stock": base}, task, held_out, progress, bars)
        _measure_accuracy("untrained", models, task, held_out, progress, bars)
        finished = _train(arms, task, train, progress, bars, args.out)
        if finished:
            _measure_accuracy("final", models, task, held_out, progress, bars)
    if not finished:
        return _stopped(args, console)

    with console.status("measuring memory and rounding in a process of their own"):
        measured, trouble = _measure(source, options, batch, threads)
    versions = {"peftkern": __version__} | {name: version(name) for name in ("torch", "transformers", "peft")}
    found = (progress.pairs, progress.accuracy, measured)
    findings = Findings(options, source.title, backend, threads, versions, *found)
    files = write_files(findings, args.out)
    console.print("", table(findings), "", sep="\n")
    if trouble:
        console.print(f"[yellow]{trouble}[/]")
    if backend == "reference":
        console.print("[yellow]peftkern ran its eager reference, no kernel: see `peftkern doctor`.[/]")
    console.print(f"[bold]{headline(findings)}.[/]")
    console.print(f"Saved in {args.out}: {', '.join(path.name for path in files)}, checkpoint-{progress.done}")
    return 0


def _open_out(args: argparse.Namespace) -> Path | None:
    """Make ``--out``; the checkpoint to resume from, if that is asked for.

    Raises:
        DemoError: if there is nothing to resume, or something that a fresh run would destroy.
    """
    if args.threads is not None and args.threads < 1:
        raise DemoError(f"--threads: expected at least 1, got {args.threads}")
    found = checkpoint.latest(args.out)
    if args.resume:
        if found is None:
            raise DemoError(f"--resume: there is no checkpoint in {args.out}. Which --out did the run have?")
        return found
    if found is not None:
        state = checkpoint.read(found)
        done, steps = len(state["pairs"]), state["options"]["steps"]
        if done < steps:
            raise DemoError(
                f"--out {args.out} holds an unfinished run ({done} of {steps} steps). Go on with --resume, remove "
                f"{found}, or choose another --out."
            )
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / ".writable").touch()
        (args.out / ".writable").unlink()
    except OSError as error:
        raise DemoError(f"--out {args.out}: no folder that can be written ({error.strerror})") from error
    return None


def _measure_accuracy(
    moment: str, models: dict[str, Any], task: Task, held_out: Sequence[Review], progress: Progress, bars: Bars
) -> None:
    """Unless a resumed run knows it already."""
    if moment in progress.accuracy:
        return
    title = {"zero-shot": "zero-shot", "untrained": "prefix untrained", "final": "after training"}[moment]
    bar = bars.add_task(title, total=len(held_out) * len(models), note="")
    found = {name: evaluate(model, task, held_out, lambda n: bars.advance(bar, n)) for name, model in models.items()}
    bars.update(bar, note="accuracy " + "  ".join(f"{a.value:.1%}" for a in found.values()))
    progress.accuracy[moment] = found


def _train(
    arms: dict[str, Arm], task: Task, train: Sequence[Review], progress: Progress, bars: Bars, out: Path
) -> bool:
    """Take the steps that are left and save; false if Ctrl-C came before the end."""
    steps = progress.options.steps
    bar = bars.add_task("training", total=steps, completed=progress.done, note="")
    with _deferred_interrupt() as interrupted:
        while progress.done < steps and not interrupted:
            pair = train_pair(arms, task, train, progress.done, progress.options)
            progress.pairs.append(pair)
            bars.update(bar, advance=1, note=_note(pair))
            if not bars.console.is_terminal and progress.done % _TELL_EVERY == 0:  # a log file shows no bar
                bars.console.print(f"step {progress.done} of {steps}: {_note(pair)}")
            if progress.done % _SAVE_EVERY == 0 and progress.done < steps:
                checkpoint.save(out, arms, progress)
        checkpoint.save(out, arms, progress)
    return progress.done == steps


@contextmanager
def _deferred_interrupt() -> Iterator[list[int]]:
    """A list that the first Ctrl-C makes non-empty, so that the step at hand can end; a second one interrupts."""
    interrupted: list[int] = []

    def note(number: int, _: Any) -> None:
        interrupted.append(number)
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)


def _stopped(args: argparse.Namespace, console: Console) -> int:
    saved = checkpoint.latest(args.out)
    if saved is None:
        console.print("Stopped before training; there is nothing to keep.")
    else:
        console.print(f"Stopped. Saved: {saved}, whose folders {' and '.join(ARMS)} PeftModel.from_pretrained loads.")
        cache = f" --cache {args.cache}" if args.cache else ""
        console.print(f"Go on with: [bold]peftkern demo --resume --out {args.out}{cache}[/]")
    return 130


def _measure(source: ModelSource, options: Options, batch: Batch, threads: int) -> tuple[dict[str, Measured], str]:
    """What was measured, or nothing and why: a run's other results outlive this."""
    try:
        return measure(source, options, batch, threads), ""
    except DemoError as error:
        return {}, str(error)


def _backend(base: Any, options: Options, batch: Batch) -> str:
    """The backend that the training steps take."""
    from ... import backends

    config = base.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rows, tokens = batch.input_ids.shape
    q = (rows, config.num_attention_heads, tokens, head_dim)
    kv = (rows, config.num_key_value_heads, tokens, head_dim)
    prefix = (config.num_key_value_heads, options.length, head_dim)
    dtypes = (base.dtype, torch.float32)
    return backends.resolve(
        backends.Call("prefix_attention", base.device, *dtypes, q, kv, prefix, ("key_mask",), needs_grad=True)
    )


def _note(pair: Pair) -> str:
    losses = "  ".join(f"{pair.loss[arm]:.3f}" for arm in ARMS)
    seconds = "  ".join(duration(pair.seconds[arm]) for arm in ARMS)
    return f"loss {losses} · {seconds}"


def _load() -> float:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def _quiet_libraries() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
