# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: two adapter folders that PEFT can load, and the state for --resume. No pickle."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .options import DemoError, Options, as_dict

_FORMAT = 1
_STATE, _TENSORS = "state.json", "state.safetensors"


@dataclass
class Progress:
    """The results of a run so far. ``accuracy`` maps "zero-shot", "untrained" and "final" to {arm: Accuracy}."""

    options: Options
    threads: int
    pairs: list[Any] = field(default_factory=list)
    accuracy: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def done(self) -> int:
        """Number of finished steps."""
        return len(self.pairs)


def latest(out: Path) -> Path | None:
    """The checkpoint in ``out`` with the most steps."""
    found = [(int(p.name.partition("-")[2]), p) for p in out.glob("checkpoint-*") if (p / _STATE).is_file()]
    return max(found)[1] if found else None


def save(out: Path, arms: dict[str, Any], progress: Progress) -> Path:
    """Write ``out/checkpoint-<steps>`` and remove older ones.

    Everything is written to a temporary folder, which is renamed at the end, so that a crash, a full disk or a second
    Ctrl-C leaves the previous checkpoint intact.
    """
    import torch
    from safetensors.torch import save_file

    target = out / f"checkpoint-{progress.done}"
    scratch = Path(tempfile.mkdtemp(prefix=".checkpoint-", dir=out))
    try:
        tensors = {"rng": torch.get_rng_state()}
        for name, arm in arms.items():
            arm.model.save_pretrained(scratch / name)
            tensors |= {f"{name}/{key}": p.detach().clone() for key, p in arm.prefix.items()}
            for key, p in arm.prefix.items():
                tensors |= {f"{name}/{key}/{slot}": t for slot, t in arm.optimizer.state.get(p, {}).items()}
        save_file(tensors, scratch / _TENSORS)
        state = {
            "format": _FORMAT,
            "options": as_dict(progress.options),
            "threads": progress.threads,
            "accuracy": progress.accuracy,
            "pairs": [pair._asdict() for pair in progress.pairs],
        }
        (scratch / _STATE).write_text(json.dumps(state, indent=1))
        for file in scratch.rglob("*"):
            if file.is_file():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
        scratch.chmod(0o755)
        if target.exists():  # from a finished run with as many steps
            shutil.rmtree(target)
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for old in out.glob("checkpoint-*"):
        if old != target:
            shutil.rmtree(old)
    return target


def read(folder: Path) -> dict[str, Any]:
    """The checkpoint's state without its tensors.

    Raises:
        DemoError: if the checkpoint is damaged or from another version.
    """
    try:
        state: dict[str, Any] = json.loads((folder / _STATE).read_text())
    except (OSError, ValueError) as error:
        raise DemoError(f"{folder / _STATE} cannot be read ({error}); remove {folder} to start again") from error
    if state.get("format") != _FORMAT:
        raise DemoError(f"{folder}: expected checkpoint format {_FORMAT}, got {state.get('format')}")
    return state


def restore(folder: Path, state: dict[str, Any], arms: dict[str, Any], progress: Progress) -> None:
    """Load the checkpoint's prefixes, optimizer states and history into ``arms`` and ``progress``.

    Raises:
        DemoError: if the tensors are missing, damaged or from another model.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from .training import Accuracy, Pair

    try:
        tensors = load_file(folder / _TENSORS)
    except (OSError, SafetensorError) as error:
        raise DemoError(f"{folder / _TENSORS} cannot be read ({error}); remove {folder} to start again") from error
    for name, arm in arms.items():
        for key, p in arm.prefix.items():
            value = tensors.get(f"{name}/{key}")
            if value is None or value.shape != p.shape:
                came = None if value is None else list(value.shape)
                raise DemoError(f"{folder}: expected {key} of shape {list(p.shape)} for {name}, got {came}")
            with torch.no_grad():
                p.copy_(value)
            slots = {k.rpartition("/")[2]: t for k, t in tensors.items() if k.startswith(f"{name}/{key}/")}
            if slots:
                arm.optimizer.state[p] = slots
    torch.set_rng_state(tensors["rng"])
    progress.pairs = [Pair(**pair) for pair in state["pairs"]]
    progress.accuracy = {
        moment: {arm: Accuracy(*share) for arm, share in shares.items()}
        for moment, shares in state["accuracy"].items()
    }
