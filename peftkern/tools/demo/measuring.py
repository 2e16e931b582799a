# SPDX-License-Identifier: Apache-2.0
"""Measure memory and rounding of one training step of each arm, in a process of its own.

*Peak* is the growth of the process's resident memory during a step (forward, backward, update). It excludes model,
prefix and optimizer and includes the kernels' workspaces. It is the operating system's high-water mark, not a sample.
*Saved* are the bytes that the forward pass saves for backward
(:func:`~peftkern.tools.demo.training.saved_bytes`). *Rounding* is the error of the loss in the run's dtype
(:func:`~peftkern.tools.demo.training.rounding_error`), a scale for the difference of two loss curves.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from ..bench import memory
from .options import DemoError, Options, as_dict

#: "peak" and "saved" in bytes, "rounding" in units of the loss; None if the system does not report it.
Measured = dict[str, float | None]


def measure(source: Any, options: Options, batch: Any, threads: int) -> dict[str, Measured]:
    """Measure a step on ``batch`` for each arm.

    Raises:
        DemoError: if the measuring process fails, with the last line of its errors.
    """
    order = {"source": source, "options": as_dict(options), "batch": [t.tolist() for t in batch], "threads": threads}
    try:
        result: dict[str, Measured] = memory.in_own_process(["-m", __name__], order)
    except RuntimeError as error:
        raise DemoError(f"memory and rounding could not be measured: {error}") from error
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
        peak = memory.peak_bytes(lambda arm=arm: arm.train_step(batch, options.lr))  # type: ignore[misc]
        result[name] = {"peak": peak, "saved": saved_bytes(arm.model, batch), "rounding": rounding[name]}
    return result


if __name__ == "__main__":
    memory.return_freed_memory()
    print(json.dumps(_serve(json.load(sys.stdin))))
