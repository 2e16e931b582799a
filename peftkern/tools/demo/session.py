# SPDX-License-Identifier: Apache-2.0
"""One run of the demo from the command line to the report."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress as Bars

from ... import __version__
from ...huggingface.patch import explain
from . import checkpoint
from .assets import ModelSource, Review, cache_folder, find_model, read_reviews
from .checkpoint import Progress
from .files import write_files
from .frame import check_threads, make_folder, quiet_libraries, run_framed
from .interrupts import deferred_interrupt
from .measuring import Measured, measure
from .options import DemoError, Options, resolve
from .progress import LogTicker, minutes, new_bars
from .report import Findings, duration, headline, setting, table
from .reviews import Batch, Task, split, training_rows
from .training import ARMS, Arm, Pair, build_arms, evaluate, faster_dtype, load_base, train_pair

_SAVE_EVERY = 50
_TELL_EVERY = 10


def run_session(args: argparse.Namespace) -> int:
    """See :func:`peftkern.tools.demo.run`.

    Raises:
        DemoError: for errors that the user can correct.
    """
    return run_framed(args, _run, _stopped)


def _run(args: argparse.Namespace, console: Console, ticker: LogTicker) -> int:
    folder = _open_out(args)
    state = checkpoint.read(folder) if folder else None
    threads = args.threads or (state and state["threads"]) or torch.get_num_threads()
    torch.set_num_threads(threads)
    if state is None and args.dtype is None:
        args.dtype, reason = faster_dtype()
        console.print(f"[dim]--dtype {args.dtype}: {reason}[/]")
    options = resolve(args, state and state["options"])
    torch.manual_seed(options.seed)
    quiet_libraries()

    ticker.stage = "reading the reviews"
    with console.status(ticker.stage):
        train, held_out = split(read_reviews(options.data), options.eval_rows)
    ticker.stage = "loading the model (the first run converts it, about 20 s)"
    with console.status(ticker.stage):
        source = find_model(options.model, cache_folder(args.cache))
        base, task = load_base(source, options)
        arms = build_arms(base, task, options)
    progress = Progress(options, threads)
    if folder and state:
        checkpoint.restore(folder, state, arms, progress)
        console.print(f"Continuing from {folder}: {progress.done} of {options.steps} steps are done.")
    batch = task.batch(training_rows(train, 0, options.batch_size, options.seed))
    backend = _backend(base, options, batch)
    console.print(f"[bold]{source.title}[/], stock PEFT and PEFT + peftkern")
    console.print(f"[dim]{setting(options, threads, backend)}[/]")
    console.print(f"[dim]peftkern: {explain(arms['peftkern'].model)}[/]")
    _warn_if_busy(console)

    with new_bars(console) as bars:
        ticker.bars = bars
        models = {name: arm.model for name, arm in arms.items()}
        _measure_accuracy("zero-shot", {"stock": base}, task, held_out, progress, bars)
        _measure_accuracy("untrained", models, task, held_out, progress, bars)
        finished = _train(arms, task, train, progress, bars, args.out, ticker)
        if finished:
            _measure_accuracy("final", models, task, held_out, progress, bars)
    if not finished:
        raise KeyboardInterrupt

    ticker.stage = "measuring memory and rounding in a process of their own"
    with console.status(ticker.stage):
        measured, trouble = _measure(source, options, batch, threads)
    versions = {"peftkern": __version__} | {name: version(name) for name in ("torch", "transformers", "peft")}
    found = (progress.pairs, progress.accuracy, measured)
    _report(Findings(options, source.title, backend, threads, versions, *found), trouble, args.out, console)
    return 0


def _report(findings: Findings, trouble: str, out: Path, console: Console) -> None:
    """Write the files and print the table."""
    files = write_files(findings, out)
    console.print("", table(findings), "", sep="\n")
    if trouble:
        console.print(f"[yellow]{trouble}[/]")
    if findings.backend == "reference":
        console.print("[yellow]peftkern ran its eager reference, not a kernel: see `peftkern doctor`.[/]")
    console.print(f"[bold]{headline(findings)}.[/]")
    console.print(f"Saved in {out}: {', '.join(path.name for path in files)}, checkpoint-{len(findings.pairs)}")


def _warn_if_busy(console: Console) -> None:
    load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    if load > 0.5 * cores:
        console.print(
            f"[yellow]The machine is busy (load {load:.1f} on {cores} cores): times will spread, and fewer --threads "
            "may be faster.[/]"
        )


def _open_out(args: argparse.Namespace) -> Path | None:
    """Make ``--out``. With ``--resume``, return the checkpoint to resume from.

    Raises:
        DemoError: if there is no checkpoint to resume, or a fresh run would destroy an unfinished one.
    """
    check_threads(args.threads)
    found = checkpoint.latest(args.out)
    if args.resume:
        if found is None:
            raise DemoError(f"--resume: there is no checkpoint in {args.out}. Use the --out of the interrupted run.")
        return found
    if found is not None:
        state = checkpoint.read(found)
        done, steps = len(state["pairs"]), state["options"]["steps"]
        if done < steps:
            raise DemoError(
                f"--out {args.out} holds an unfinished run ({done} of {steps} steps). Continue with --resume, remove "
                f"{found}, or choose another --out."
            )
    make_folder(args.out)
    return None


def _measure_accuracy(
    moment: str, models: dict[str, Any], task: Task, held_out: Sequence[Review], progress: Progress, bars: Bars
) -> None:
    """Evaluate ``models`` on the held-out reviews, unless a resumed run has the result already."""
    if moment in progress.accuracy:
        return
    title = {"zero-shot": "zero-shot", "untrained": "prefix untrained", "final": "after training"}[moment]
    bar = bars.add_task(title, total=len(held_out) * len(models), note="")
    found = {name: evaluate(model, task, held_out, lambda n: bars.advance(bar, n)) for name, model in models.items()}
    bars.update(bar, note="accuracy " + "  ".join(f"{a.value:.1%}" for a in found.values()))
    progress.accuracy[moment] = found


def _train(
    arms: dict[str, Arm],
    task: Task,
    train: Sequence[Review],
    progress: Progress,
    bars: Bars,
    out: Path,
    ticker: LogTicker,
) -> bool:
    """Take the remaining steps and save; false if Ctrl-C came before the end."""
    steps, first = progress.options.steps, progress.done
    bar = bars.add_task("training", total=steps, completed=progress.done, note="")
    with deferred_interrupt() as interrupted:
        while progress.done < steps and not interrupted:
            pair = train_pair(arms, task, train, progress.done, progress.options)
            progress.pairs.append(pair)
            if progress.done == first + 1:
                left = sum(pair.seconds.values()) * _pairs_left(progress)
                whole = minutes(ticker.elapsed + left)
                bars.console.print(f"about {minutes(left)} to go, {whole} in all, judging by the first step")
            bars.update(bar, advance=1, note=_note(pair))
            if not bars.console.is_terminal and progress.done % _TELL_EVERY == 0:  # a log file shows no bars
                bars.console.print(f"step {progress.done} of {steps}: {_note(pair)}")
            if progress.done % _SAVE_EVERY == 0 and progress.done < steps:
                checkpoint.save(out, arms, progress)
        checkpoint.save(out, arms, progress)
    return progress.done == steps


def _pairs_left(progress: Progress) -> float:
    """The rest of the run in units of a pair of training steps.

    A step costs about three forward passes of its rows. The measurements at the end cost about five pairs.
    """
    options = progress.options
    return options.steps - progress.done + options.eval_rows / (3 * options.batch_size) + 5


def _stopped(args: argparse.Namespace, console: Console) -> None:
    saved = checkpoint.latest(args.out)
    if saved is None:
        console.print("Stopped before training; nothing was saved.")
    else:
        console.print(f"Stopped. Saved: {saved}. PeftModel.from_pretrained loads its folders {' and '.join(ARMS)}.")
        cache = f" --cache {args.cache}" if args.cache else ""
        console.print(f"Continue with: [bold]peftkern demo --resume --out {args.out}{cache}[/]")


def _measure(source: ModelSource, options: Options, batch: Batch, threads: int) -> tuple[dict[str, Measured], str]:
    """The measurements, or none and the reason. A failure here must not cost the run's other results."""
    try:
        return measure(source, options, batch, threads), ""
    except DemoError as error:
        return {}, str(error)


def _backend(base: Any, options: Options, batch: Batch) -> str:
    """Name of the backend that runs the training steps."""
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
