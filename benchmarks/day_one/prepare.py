# SPDX-License-Identifier: Apache-2.0
"""Build the native libraries before the first minute on a GPU, on any machine with nvcc, and use them there.

Triton's kernels are not compiled here. A key of Triton's cache contains a hash of Triton's own library, which differs
between the builds for each version of Python, so a cache serves only the interpreter that filled it. The report
says how long each kernel took to compile.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: The compute capability of an H100 or H200, for which the libraries are built unless TORCH_CUDA_ARCH_LIST is set.
CAPABILITY = "9.0"


def prepare(folder: Path) -> int:
    """Build libpeftkern_cpu.so and, with nvcc, libpeftkern_cuda.so into ``folder``; 0 if both were built."""
    folder.mkdir(parents=True, exist_ok=True)
    has_nvcc = shutil.which("nvcc") is not None or "CUDA_HOME" in os.environ
    if shutil.which("cmake") is None:
        print("cmake is not on PATH: pip install cmake ninja")
        return 1
    environment = {"TORCH_CUDA_ARCH_LIST": CAPABILITY, **os.environ}
    build, out = folder / "build", folder / "out"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    options = [f"-DPEFTKERN_OUTPUT_DIR={out}", f"-DPEFTKERN_CUDA={'ON' if has_nvcc else 'OFF'}"]
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(build), *generator, *options],
        ["cmake", "--build", str(build), "--parallel", str(os.cpu_count() or 2)],
    ):
        done = subprocess.run(command, env=environment, check=False)
        if done.returncode:
            return done.returncode
    shutil.rmtree(build)
    built = sorted(file.name for file in out.iterdir())
    print(f"{out}: {', '.join(built)}{'' if has_nvcc else '; no CUDA library, since nvcc is not on PATH'}")
    return 0 if has_nvcc else 1


def use(folder: Path) -> None:
    """Copy the libraries that :func:`prepare` has built into the package.

    Raises:
        SystemExit: if there are none.
    """
    files = [*folder.glob("out/*.so"), *folder.glob("out/_build_info.json")]
    if not files:
        raise SystemExit(f"{folder}: no libraries; build them with --prepare {folder}")
    for file in files:
        partial = ROOT / "peftkern" / f".{file.name}"
        shutil.copy(file, partial)
        partial.replace(partial.with_name(file.name))
