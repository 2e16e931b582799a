# SPDX-License-Identifier: Apache-2.0
"""One run of the cartridge demo from the command line to the report."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress as Bars

from .... import __version__
from ....checkpoint import save_prefix
from ....huggingface.patch import patch
from ....modules import PrefixKV
from ....self_study import Comparison
from ..assets import cache_folder, find_model
from ..frame import check_threads, make_folder, quiet_libraries, run_framed
from ..interrupts import deferred_interrupt
from ..options import DemoError
from ..progress import LogTicker, new_bars
from . import options as run_options
from .documents import Document, read_documents
from .options import Options
from .plot import save_plot
from .report import Findings, Row, as_json, headline, table
from .study import Lab, Lesson, compose, read, study

__all__ = ["run_session"]

_RESULT = "result.json"
_TELL_EVERY = 10


def run_session(args: argparse.Namespace) -> int:
    """See :func:`peftkern.tools.demo.run`.

    Raises:
        DemoError: for errors that the user can correct.
    """
    with deferred_interrupt() as interrupted:
        return run_framed(args, partial(_run, stop=lambda: bool(interrupted)), _stopped)


def _stopped(args: argparse.Namespace, console: Console) -> None:
    cache = f" --cache {args.cache}" if args.cache else ""
    console.print(
        "Stopped; what is done is saved. Continue with: [bold]peftkern demo --method cartridge --resume "
        f"--out {args.out}{cache}[/]"
    )


def _run(args: argparse.Namespace, console: Console, ticker: LogTicker, *, stop: Callable[[], bool]) -> int:
    options = _open_out(args)
    threads = args.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    began = time.process_time()
    documents = read_documents(options.data, 2 if options.compose else 1)
    ticker.stage = "loading the model (the first run converts it, about 20 s)"
    with console.status(ticker.stage):
        title, model, tokenizer = _load(args, options)
    lab = Lab(model, tokenizer, options, args.out, lambda *_: lambda *_: None, stop)
    ticker.stage = "reading the document"
    with console.status(ticker.stage):
        prefixes = [read(lab, document) for document in documents]
        both = _read_both(lab, documents) if options.compose else None
        starts = [start for _, start in prefixes]
        patch(model, PrefixKV.stack(starts) if options.compose else starts[0], freeze=True)
    console.print(f"[bold]{title}[/] · {documents[0].title}")
    with new_bars(console) as bars:
        ticker.bars, lab.bars = bars, _shown(bars)
        bank: PrefixKV | None = None
        composed: dict[str, Comparison] = {}
        try:
            lesson = study(lab, documents[0], *prefixes[0])
            if both is not None:
                bank, composed = compose(lab, lesson, documents[1], *prefixes[1], both)
        except ValueError as error:  # for example a damaged file in --out, or a model without an output layer
            raise DemoError(str(error)) from error
    versions = {"peftkern": __version__} | {name: version(name) for name in ("torch", "transformers")}
    rows, more = _rows(lesson), _composed_rows(composed, starts)
    found = Findings(
        options, title, threads, documents[0].title, versions, rows, lesson.losses, more, time.process_time() - began
    )
    _report(found, lesson, bank, args, console)
    return 0


def _open_out(args: argparse.Namespace) -> Options:
    """Make ``--out``, and return the options of the run.

    Raises:
        DemoError: if there is no run to resume, or a fresh one would destroy an unfinished one.
    """
    check_threads(args.threads)
    made_with = run_options.saved(args.out)
    if args.resume:
        if made_with is None:
            raise DemoError(f"--resume: there is no run in {args.out}. Use the --out of the interrupted run.")
        return run_options.resolve(args, made_with)
    if made_with is not None:
        raise DemoError(
            f"--out {args.out} holds a run already. Continue with --resume, remove {args.out}, or choose another "
            "--out."
        )
    options = run_options.resolve(args)
    make_folder(args.out)
    run_options.write(args.out, options)
    return options


def _load(args: argparse.Namespace, options: Options) -> tuple[str, Any, Any]:
    """(title, frozen model in fp32, tokenizer)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quiet_libraries()
    source = find_model(options.model, cache_folder(args.cache))
    try:
        model = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
        return source.title, model.eval().requires_grad_(False), AutoTokenizer.from_pretrained(source.path)
    except (OSError, ValueError) as error:
        raise DemoError(f"{source.title} at {source.path} cannot be loaded: {error}") from error


def _read_both(lab: Lab, documents: list[Document]) -> PrefixKV:
    """The prefix of all documents, one after the other."""
    return read(lab, Document("both documents", "\n\n".join(document.text for document in documents)))[0]


def _shown(bars: Bars) -> Callable[[str, int], Callable[[int, str], None]]:
    """Steps as bars; a log file gets a line now and then."""

    def begin(title: str, total: int) -> Callable[[int, str], None]:
        bar = bars.add_task(title, total=total, note="")
        lines: set[int] = set()

        def tell(done: int, note: str) -> None:
            bars.update(bar, completed=done, note=note)
            is_due = (done % _TELL_EVERY == 0 or done == total) and done not in lines
            if is_due and note and not bars.console.is_terminal:
                lines.add(done)
                bars.console.print(f"{title}: {done} of {total}, {note}")

        return tell

    return begin


def _rows(lesson: Lesson) -> list[Row]:
    width = _bytes_per_token(lesson.prefix)
    length, whole = max(lesson.start.lengths), max(lesson.prefix.lengths)
    trained = [lesson.compared[f"trained {run}"] for run in range(len(lesson.trained))]
    return [
        Row.of("no document", 0, width, [lesson.compared["no document"]]),
        # The start of a cartridge is nothing but the keys and values of the truncated document.
        Row.of("truncated text (start)", length, width, [lesson.compared["start"]]),
        Row.of("trained cartridge", length, width, trained),
        Row.of("whole document", whole, width, [lesson.compared["whole document"]]),
    ]


def _composed_rows(composed: dict[str, Comparison], starts: list[PrefixKV]) -> list[Row]:
    if not composed:
        return []
    first, second = (max(start.lengths) for start in starts)
    lengths = {"no document": 0, "first alone": first, "second alone": second, "both": first + second}
    width = _bytes_per_token(starts[0])
    names = {
        "first alone": "first cartridge alone",
        "second alone": "second cartridge alone",
        "both": "both cartridges",
    }
    return [Row.of(names.get(name, name), lengths[name], width, [composed[name]]) for name in lengths]


def _bytes_per_token(prefix: PrefixKV) -> int:
    return sum(x[:, :1].numel() * x.element_size() for pair in prefix.layer_kv() if pair for x in pair)


def _report(
    findings: Findings, lesson: Lesson, bank: PrefixKV | None, args: argparse.Namespace, console: Console
) -> None:
    """Write the files and print the table."""
    out = args.out
    save_prefix(lesson.trained[0], out / "cartridge")
    names = ["cartridge.png", _RESULT, "cartridge"]
    if bank is not None:
        save_prefix(bank, out / "both")
        names.append("both")
    (out / _RESULT).write_text(json.dumps(as_json(findings), indent=1) + "\n")
    save_plot(findings, out / names[0])
    console.print("", table(findings), "", sep="\n")
    console.print(f"[bold]{headline(findings)}.[/]")
    console.print("[dim]Intervals: 95 %, by bootstrap over the held-out questions.[/]")
    console.print(f"Saved in {out}: {', '.join(names)}; what the teacher was asked: first-questions.jsonl")
