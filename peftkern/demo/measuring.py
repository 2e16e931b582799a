# SPDX-License-Identifier: Apache-2.0
"""Memory and rounding of one training step of each arm, measured in a process of its own: nothing else is counted.

*Peak* is how far the process's resident memory rises during a step (forward, backward, update) above what it holds
between steps: model, prefix and optimizer are excluded, kernels' own workspaces are included. It is the kernel's
high-water mark and not a sampled value. *Saved* is what the forward pass keeps for backward
(:func:`~peftkern.demo.training.saved_bytes`). *Rounding* is what the dtype does to the loss
(:func:`~peftkern.demo.training.rounding_error`), the scale on which to read a difference of two curves.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from .options import DemoError, Options, as_dict

_M_MMAP_THRESHOLD = -3  # malloc.h

#: "peak" and "saved" in bytes, "rounding" in units of the loss; None where the system does not tell.
Measured = dict[str, float | None]


def measure(source: Any, options: Options, batch: Any, threads: int) -> dict[str, Measured]:
    """What a step on ``batch`` needs, for each arm.

    Raises:
        DemoError: with the last words of the measuring process.
    """
    order = {"source": source, "options": as_dict(options), "batch": [t.tolist() for t in batch], "threads": threads}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", __name__], input=json.dumps(order), capture_output=True, text=True, env=environment
    )
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise DemoError(f"memory and rounding could not be measured: {words[-1]}")
    result: dict[str, Measured] = json.loads(done.stdout.splitlines()[-1])
    return result


def _serve(order: dict[str, Any]) -> dict[str, Measured]:
    import torch

    from .assets import ModelSource
    from .reviews import Batch
    from .training import build_arms, load_base, rounding_error, saved_bytes

    torch.set_num_threads(order["threads"])
    options = Options(**order["options"])
    arms = build_arms(*load_base(ModelSource(*order["source"]), options), options)
    batch = Batch(*(torch.tensor(t) for t in order["batch"]))
    rounding = rounding_error(arms, batch)
    result: dict[str, Measured] = {}
    for name, arm in arms.items():
        arm.train_step(batch, options.lr)  # creates the optimizer's state
        gc.collect()
        before = _resident("VmRSS") if _reset_peak() else None
        arm.train_step(batch, options.lr)
        after = _resident("VmHWM")
        peak = None if before is None or after is None else after - before
        result[name] = {"peak": peak, "saved": saved_bytes(arm.model, batch), "rounding": rounding[name]}
    return result


def _return_freed_memory() -> None:
    """Have glibc give each large block back when it is freed, or the first arm's leftovers would serve the second."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 16)


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident(key: str) -> int | None:
    try:
        found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


if __name__ == "__main__":
    _return_freed_memory()
    print(json.dumps(_serve(json.load(sys.stdin))))
