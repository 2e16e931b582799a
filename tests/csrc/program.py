# SPDX-License-Identifier: Apache-2.0
"""Builds ``replay.cpp`` and the CPU library beside it, and runs it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from .. import faults

ROOT = Path(__file__).parents[2]

#: Faults by their markers in csrc/cpu: what the marked line contains, and what replaces it.
FAULTS = {
    "prompt-read-past-its-end": ("a.dim * size);", "a.dim * size + 1);"),
    "rows-cleared-past-their-end": (
        "(block.vectors * kLanes - block.count) * dim.padded);", "(kBlockM - block.count) * dim.padded + 1);",
    ),
    "tile-read-past-its-end": ("k < sum.end;", "k < sum.end + kTileWords;"),
    "prefix-read-before-it-is-packed": ("schedule(static)", "schedule(static) nowait"),
    "partial-sums-read-early": ("schedule(dynamic, 1)", "schedule(dynamic, 1) nowait"),
}  # fmt: skip


def build(folder: Path, *options: str, source: Path = ROOT) -> Path:
    """Configures and builds in ``folder``; ``options`` are CMake's. Returns the program."""
    run(
        "cmake", "-S", source, "-B", folder, "-G", "Ninja", "-DPEFTKERN_REPLAY=ON", f"-DPEFTKERN_OUTPUT_DIR={folder}",
        *options,
    )  # fmt: skip
    jobs = os.environ.get("MAX_JOBS")
    run("cmake", "--build", folder, *(["-j", jobs] if jobs else []))
    return folder / "peftkern_replay"


def run(*command: str | Path) -> str:
    """What ``command`` prints. A failure shows all of it."""
    done = attempt(*command)
    assert done.returncode == 0, f"{' '.join(map(str, command))} failed with {done.returncode}:\n{done.stdout}"
    return done.stdout


def attempt(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """``command``'s status, and its output and errors together."""
    return subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )


def mutated(folder: Path, *names: str) -> Path:
    """A copy of the native sources in which faults are planted; ``names`` are keys of :data:`FAULTS`."""
    folder.mkdir()
    for name in ("CMakeLists.txt", "csrc", "tests/csrc"):
        source, target = ROOT / name, folder / name
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    texts = cpu_sources()
    for name in names:
        texts = faults.plant(texts, name, *FAULTS[name])
    for name, text in texts.items():
        (folder / "csrc" / "cpu" / name).write_text(text)
    return folder


def cpu_sources() -> dict[str, str]:
    """The texts of csrc/cpu by their paths below it."""
    return faults.read(ROOT / "csrc" / "cpu", ".cpp", ".h")
