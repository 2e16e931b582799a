# SPDX-License-Identifier: Apache-2.0
"""Whole runs of self-study, and processes that end in the middle of one."""

from __future__ import annotations

import copy
import itertools
import json
import multiprocessing
import os
import signal
import stat
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from peftkern.self_study import Study, capture, train

from .lab import TRAINING, Lab

#: What a run writes.
FILES = ("result.json", "train.jsonl", "checkpoint.safetensors", "targets.safetensors")

#: Makes processes from one that has imported everything and holds little memory, unlike the process of the tests.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload([__name__])


def run(folder: Path, tell) -> None:
    """A whole run in ``folder``, which tells what it does."""
    lab = Lab()
    made = lab.synthesise(folder / "train.jsonl", progress=lambda done, count: tell(f"made {done}"))
    targets = capture(lab.model, lab.document, made, 8, folder / "targets.safetensors")
    cartridge = copy.deepcopy(lab.cartridge)
    path = folder / "checkpoint.safetensors"
    losses = train(
        lab.model, cartridge, Study(targets), path, TRAINING, progress=lambda done, loss: tell(f"step {done}")
    )
    (folder / "result.json").write_text(json.dumps([losses, cartridge.flat_values().tolist()]))


def end_at(mark: str, folder: Path, number: int, handler=signal.SIG_DFL) -> int:
    """Send a signal to a process with a run in ``folder`` that has come to ``mark``. Returns its exit code.

    The marks are what :func:`run` tells, and ``save N``: the data of the N-th save is flushed to the disk. A file
    that is replaced is not renamed then; conversations are in their file, but the run does not know it.

    Args:
        handler: of the process for SIGTERM.
    """
    told, teller = _FORKS.Pipe(duplex=False)
    process = _FORKS.Process(target=_run_until, args=(mark, folder, teller, handler))
    process.start()
    teller.close()
    assert told.recv() == mark, "the run comes to its mark"
    os.kill(process.pid, number)
    process.join()
    return process.exitcode


def leave(number: int, frame: object) -> None:
    """A handler that ends the process in order, after blocks that clean up."""
    sys.exit(143)


def _run_until(mark: str, folder: Path, teller: Connection, handler) -> None:
    """Run until the mark, tell it, and wait there."""
    signal.signal(signal.SIGTERM, handler)
    torch.set_num_threads(1)
    fsync, saves = os.fsync, itertools.count(1)

    def tell(line: str) -> None:
        if line == mark:
            teller.send(line)
            time.sleep(60)

    def flush(file: int) -> None:
        fsync(file)
        if stat.S_ISREG(os.fstat(file).st_mode):  # not the folder of a file that has been renamed
            tell(f"save {next(saves)}")

    os.fsync = flush
    run(folder, tell)
