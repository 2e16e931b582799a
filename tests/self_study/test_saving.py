# SPDX-License-Identifier: Apache-2.0
"""A signal or a full disk, between and during saves, leaves files from which a run continues."""

from __future__ import annotations

import errno
import io
import itertools
import os
import signal
from pathlib import Path

import pytest

from .runs import FILES, end_at, leave, run

#: The line that a resumed run tells first for each place where another one ended: what is saved is not made again.
#: Saves 1 to 4 are of the conversations, save 5 of the targets, and saves from 6 of training, every second step.
RESUMED = {
    "made 4": "made 4",
    "step 3": "made 10",
    "save 1": "made 0",
    "save 3": "made 8",
    "save 5": "made 10",
    "save 8": "made 10",
}
#: The step that follows the saved ones.
STEPS = {"step 3": "step 3", "save 8": "step 3"}
#: A signal with its handler, and the exit code of the process.
SIGNALS = {
    "SIGKILL": (signal.SIGKILL, signal.SIG_DFL, -signal.SIGKILL),
    "SIGTERM": (signal.SIGTERM, signal.SIG_DFL, -signal.SIGTERM),
    "SIGTERM that raises SystemExit": (signal.SIGTERM, leave, 143),
}
#: The others take more than ten seconds together.
COMMON = {
    *(("SIGTERM", mark) for mark in ("made 4", "step 3", "save 3", "save 8")),
    *(("SIGTERM that raises SystemExit", mark) for mark in ("save 3", "save 5", "save 8")),
    ("SIGKILL", "save 8"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, lambda line: None)
    return folder


def assert_same_files(folder: Path, whole: Path) -> None:
    for name in FILES:
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("name", "mark"),
    [
        pytest.param(name, mark, marks=() if (name, mark) in COMMON else pytest.mark.slow)
        for name in SIGNALS
        for mark in RESUMED
    ],
)
def test_a_signal_between_and_during_saves_costs_what_is_not_saved(name, mark, whole, tmp_path):
    number, handler, code = SIGNALS[name]
    assert end_at(mark, tmp_path, number, handler) == code
    if name == "SIGTERM that raises SystemExit":
        assert {path.name for path in tmp_path.iterdir()} <= set(FILES), "a temporary file is left"
    lines = []
    run(tmp_path, lines.append)
    assert lines[0] == RESUMED[mark]
    assert next(line for line in lines if line.startswith("step")) == STEPS.get(mark, "step 1")
    assert_same_files(tmp_path, whole)


class _Torn(io.BufferedWriter):
    """A file that has room for half of what is written."""

    def write(self, data):
        super().write(data[: len(data) // 2])
        raise full()


def full(*names) -> OSError:
    """The error of a full disk; only a rename knows names."""
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *names)


def fill_disk(monkeypatch, name: str, number: int, place: str) -> None:
    """Make the disk full at one place of the save ``number`` of a file, from 1: "write", "flush" or "rename"."""
    real_open, real_replace, real_fsync = Path.open, os.replace, os.fsync
    saves, at = itertools.count(1), {"write": False, "flush": False, "rename": False}

    def open_file(path, mode="r", *arguments, **options):
        if mode in ("xb", "ab") and name in path.name:
            at[place] = next(saves) == number
            if at["write"]:
                return _Torn(io.FileIO(path, mode[0]))
        return real_open(path, mode, *arguments, **options)

    def fsync(file):
        if at["flush"]:
            raise full()
        real_fsync(file)

    def replace(path, target):
        if at["rename"] and name in Path(path).name:
            raise full(str(path), None, str(target))
        return real_replace(path, target)

    monkeypatch.setattr(Path, "open", open_file)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize(
    ("name", "number", "place", "earlier"),
    [
        ("train.jsonl", 1, "flush", None),
        ("train.jsonl", 3, "write", "made 4"),
        ("train.jsonl", 3, "flush", "made 4"),
        ("targets.safetensors", 1, "write", None),
        ("targets.safetensors", 1, "flush", None),
        ("targets.safetensors", 1, "rename", None),
        ("checkpoint.safetensors", 3, "write", "step 3"),
        ("checkpoint.safetensors", 3, "flush", "step 3"),
        ("checkpoint.safetensors", 3, "rename", "step 3"),
    ],
)
def test_a_full_disk_leaves_the_earlier_file(name, number, place, earlier, whole, tmp_path, monkeypatch):
    """``earlier`` is the last line of the run after which the file was complete."""
    path, found = tmp_path / name, {}

    def tell(line):
        found[line] = path.read_bytes() if path.exists() else None

    with monkeypatch.context() as patched:
        fill_disk(patched, name, number, place)
        with pytest.raises(OSError, match="No space left on device") as error:
            run(tmp_path, tell)
    assert error.value.errno == errno.ENOSPC
    assert str(path) in str(error.value), "the error names the file"
    if name == "train.jsonl" and earlier:
        assert path.read_bytes().startswith(found[earlier]), "whole batches stay in front of what is torn"
    else:
        assert (path.read_bytes() if path.exists() else None) == (found[earlier] if earlier else None)
    assert {left.name for left in tmp_path.iterdir()} <= set(FILES), "a temporary file is left"
    lines = []
    run(tmp_path, lines.append)
    assert_same_files(tmp_path, whole)
    assert ("step 1" in lines) == (name != "checkpoint.safetensors"), "training continues behind the checkpoint"
