# SPDX-License-Identifier: Apache-2.0
"""Build a wheel with CUDA kernels for chosen GPUs, in a checkout.

`peftkern build-wheel --arch 8.0 --arch 9.0+PTX` runs `pip wheel . --no-deps` with PEFTKERN_BUILD=all and
TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX". It needs neither torch nor a GPU. Without --arch it builds for the GPUs of this
machine.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``peftkern build-wheel``."""
    parser.add_argument("--arch", action="append", metavar="X.Y[+PTX]", help="compute capability; may be repeated")
    parser.add_argument("--no-cpu", action="store_true", help="leave the CPU library out")
    parser.add_argument("--output", default="dist", help="folder for the wheel (default: %(default)s)")
    parser.add_argument("--source", default=".", help="the checkout (default: the current folder)")


def run(options: argparse.Namespace) -> int:
    """Build the wheel; returns pip's exit status, or 2 without a checkout or without a GPU to build for."""
    if not Path(options.source, "csrc", "cuda", "CMakeLists.txt").exists():
        print(
            f"{options.source}: not a checkout of peftkern; clone the repository and run this command in it",
            file=sys.stderr,
        )
        return 2
    architectures = options.arch or _of_this_machine()
    if not architectures:
        print("torch finds no GPU here: name the GPUs with --arch, for example --arch 9.0", file=sys.stderr)
        return 2
    environment = {
        **os.environ,
        "PEFTKERN_BUILD": "cuda" if options.no_cpu else "all",
        "TORCH_CUDA_ARCH_LIST": ";".join(architectures),
    }
    command = [sys.executable, "-m", "pip", "wheel", options.source, "--no-deps", "--wheel-dir", options.output]
    return subprocess.run(command, env=environment).returncode


def _of_this_machine() -> list[str]:
    import torch

    count = torch.cuda.device_count() if torch.version.cuda else 0
    return sorted({"{}.{}".format(*torch.cuda.get_device_capability(i)) for i in range(count)})
