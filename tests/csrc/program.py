# SPDX-License-Identifier: Apache-2.0
"""Builds ``replay.cpp`` and the CPU library beside it, and runs it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


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


def mutated(folder: Path, *faults: tuple[str, str, str]) -> Path:
    """A copy of the native sources in which (file, text, replacement) are planted."""
    folder.mkdir()
    for name in ("CMakeLists.txt", "csrc", "tests/csrc"):
        source, target = ROOT / name, folder / name
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    for name, text, replacement in faults:
        path = folder / "csrc" / "cpu" / name
        content = path.read_text()
        assert content.count(text) == 1, f"{name} does not have {text!r} once: plant the fault elsewhere"
        path.write_text(content.replace(text, replacement))
    return folder
