# SPDX-License-Identifier: Apache-2.0
"""Memory and rounding of one training step of each arm, measured in a process of its own: nothing else is counted.

*Peak* is how far the process's resident memory rises during a step (forward, backward, update) above what it holds
between steps: model, prefix and optimizer are excluded, kernels' own workspaces are included. It is the kernel's
high-water mark and not a sampled value. *Saved* is what the forward pass keeps for backward
(:func:`~peftkern.tools.demo.training.saved_bytes`). *Rounding* is what the dtype does to the loss
(:func:`~peftkern.tools.demo.training.rounding_error`), the scale on which to read a difference of two curves.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from ..bench import memory
from .options import DemoError, Options, as_dict

#: "peak" and "saved" in bytes, "rounding" in units of the loss; None where the system does not tell.
Measured = dict[str, float | None]


def measure(source: Any, options: Options, batch: Any, threads: int) -> dict[str, Measured]:
    """What a step on ``batch`` needs, for each arm.

    Raises:
        DemoError: with the last words of the measuring process.
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
