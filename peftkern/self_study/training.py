# SPDX-License-Identifier: Apache-2.0
"""A cartridge, or several that are composed, learns from the targets of its teachers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..distillation import Objective
from ..files import replace_file
from ..huggingface.distilling import distil
from ..huggingface.fingerprint import fingerprint
from ..huggingface.switch import packing, switched
from ..modules import PrefixKV
from .batches import check_batches, check_positions, longest_of, packed_batch, padded_batch
from .identity import digest_of, digest_of_conversations, digest_of_tensors
from .targets import Targets

__all__ = ["Study", "Training", "train"]

FORMAT_VERSION = 1
#: The logarithm of a probability of 1 may be this large.
_ROUNDING = 1e-3


@dataclass(frozen=True)
class Study:
    """What one kind of batch reads and learns.

    Attributes:
        targets: of the teacher.
        prefix_ids: the cartridges of a bank that each sample reads, all at once; None for a single cartridge.
    """

    targets: Targets
    prefix_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Training:
    """How a cartridge is trained.

    Attributes:
        steps: of Adam.
        batch_size: conversations in a step.
        lr: the largest learning rate, after a linear warm-up over a tenth of the steps; it then falls linearly to a
            tenth. Keys and values need a large one.
        seed: of the order of the conversations.
        clip: the largest norm of the gradient.
        objective: of :func:`peftkern.distillation_loss`. ``"kl_with_tail"`` also learns how likely all other tokens
            are together. ``"cross_entropy"``, as in Cartridges, learns that they are impossible, which is close to
            the truth only for a teacher that is sure of most tokens.
        save_every: steps between two checkpoints.
    """

    steps: int = 200
    batch_size: int = 8
    lr: float = 1e-2
    seed: int = 0
    clip: float = 1.0
    objective: Objective = "kl_with_tail"
    save_every: int = 20

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if self.objective not in get_args(Objective):
            raise ValueError(f"objective: expected one of {get_args(Objective)}, got {self.objective!r}")

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        warm = min(1.0, (step + 1) / max(1, self.steps // 10))
        return self.lr * warm * (1 - 0.9 * step / self.steps)

    def numbers(self, step: int, count: int) -> list[int]:
        """The conversations of a step among ``count``: every epoch has another order."""
        found = []
        for place in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, index = divmod(place, count)
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            found.append(int(torch.randperm(count, generator=generator)[index]))
        return found


def train(
    model: Any,
    cartridge: PrefixKV,
    studies: Study | Sequence[Study],
    path: str | os.PathLike[str],
    options: Training | None = None,
    *,
    progress: Callable[[int, float], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> list[float]:
    """Train a cartridge by distillation: its predictions at the tokens of the answers approach the teacher's.

    The loss is :func:`peftkern.distillation_loss` over the teacher's most likely tokens. Batches are packed, so that
    no padding is computed, unless the model cannot run packed rows. With several studies, steps take turns.
    Cartridges of a bank that are trained alone and together do not spoil each other::

        bank = PrefixKV.stack([a, b])
        train(model, bank, [Study(of_a, (0,)), Study(of_b, (1,)), Study(of_both, (0, 1))], path)

    The parameters, the optimizer's state and the losses are saved in one file, which a rename replaces. After an
    interruption at any point the same call continues from it, and gives bitwise equal results. That is so in another
    process, which makes the cartridge anew, and in the same one: an exception sets the cartridge back to the file.

    Args:
        model: patched with a :class:`peftkern.PrefixKV` for the same layers, a bank if the cartridge is one. Its own
            parameters should be frozen.
        cartridge: trained in place.
        studies: one or more.
        path: of the checkpoint, a safetensors file.
        options: steps, learning rate and so on.
        progress: called after each step with the number of steps done, and the loss.
        stop: asked after each step; if it returns True, the state is saved and training ends early.

    Returns:
        The loss of each step, in nats per token.

    Raises:
        ValueError: for a checkpoint of another run, conversations beyond the model's positions, or a model whose
            logits do not follow from its output layer.
    """
    options = options or Training()
    studies = [studies] if isinstance(studies, Study) else list(studies)
    _check(model, cartridge, studies)
    made_with = {
        "options": asdict(options), "studies": [_describe(study) for study in studies], "model": fingerprint(model),
    }  # fmt: skip
    state = _State(Path(path), cartridge, made_with, options)
    example = packed_batch(studies[0].targets.conversations[:1], model.device)
    with switched(model, cartridge), packing(model, example.inputs) as packs, state.kept():
        batch_of = packed_batch if packs else padded_batch
        while (done := len(state.losses)) < options.steps:
            study = studies[done % len(studies)]
            numbers = options.numbers(done // len(studies), len(study.targets))
            batch = batch_of([study.targets.conversations[number] for number in numbers], model.device)
            ids, log_probs = (x.to(model.device) for x in study.targets.rows(numbers))
            inputs = batch.reading(study.prefix_ids)
            with _seeded(options.seed * 1_000_003 + done, model.device):
                loss = distil(model, inputs, ids, log_probs, rows=batch.rows, objective=options.objective)
                state.step(options.rate(done), loss)
            if progress is not None:
                progress(done + 1, state.losses[-1])
            if (ends := stop()) or (done + 1) % options.save_every == 0 or done + 1 == options.steps:
                state.save()
            if ends:
                break
    return state.losses


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers of a step, of dropout for example, which do not depend on those before it."""
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(seed)
        yield


class _State:
    """Everything that a step changes, and its file."""

    def __init__(self, path: Path, cartridge: PrefixKV, made_with: dict[str, Any], options: Training) -> None:
        self.path, self.cartridge, self.made_with, self.options = path, cartridge, made_with, options
        self.start = digest_of(cartridge)
        self.losses: list[float] = []
        self.parameters = {name: p for name, p in cartridge.named_parameters() if p.requires_grad and p.numel()}
        self.optimizer = torch.optim.Adam(self.parameters.values())
        if path.exists():
            self._load()
        else:
            self.save()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Set the cartridge back to the file if the block raises an exception."""
        try:
            yield
        except BaseException:
            self._load()
            raise

    def step(self, rate: float, loss: Tensor) -> None:
        """One update."""
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.options.clip)
        self.optimizer.step()
        self.losses.append(float(loss.detach()))

    def save(self) -> None:
        """Write the file."""
        tensors = {name: p.detach() for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            tensors |= {f"{name}/{slot}": x for slot, x in self.optimizer.state[p].items()}
        metadata = {
            "format": FORMAT_VERSION, "losses": self.losses, "start": self.start, "now": digest_of(self.cartridge),
            **self.made_with,
        }  # fmt: skip
        tensors = {name: x.cpu().contiguous() for name, x in tensors.items()}
        replace_file(self.path, save(tensors, {"peftkern_training": json.dumps(metadata, sort_keys=True)}))

    @torch.no_grad()
    def _load(self) -> None:
        try:
            with safe_open(self.path, "pt") as file:
                found = json.loads((file.metadata() or {}).get("peftkern_training", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"path: expected a checkpoint in {self.path}, got {error}; remove it to start again"
            ) from error
        losses, start, now = (found.pop(name, None) for name in ("losses", "start", "now"))
        expected = json.loads(json.dumps({"format": FORMAT_VERSION, **self.made_with}))
        names = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        if self.start not in (start, now):
            names.append("start")
        if names:
            raise ValueError(
                f"path: expected a checkpoint of the same run, got {self.path} with other {', '.join(names)}; remove "
                "it, or choose another path"
            )
        self.start = start
        for name, p in self.parameters.items():
            p.copy_(tensors[name])
            slots = {key.rpartition("/")[2]: x for key, x in tensors.items() if key.startswith(f"{name}/")}
            self.optimizer.state[p] = {slot: x if slot == "step" else x.to(p.device) for slot, x in slots.items()}
        self.losses = losses


def _check(model: Any, cartridge: PrefixKV, studies: Sequence[Study]) -> None:
    """Raise ValueError for studies that do not fit the cartridge."""
    if not studies:
        raise ValueError("studies: expected at least one, got none")
    for index, study in enumerate(studies):
        ids, count = study.prefix_ids, cartridge.num_prefixes
        if (ids is None) != (count is None):
            expected = "None, because the cartridge is no bank" if count is None else "the numbers of its cartridges"
            raise ValueError(f"studies[{index}].prefix_ids: expected {expected}, got {ids}")
        if ids is not None and count is not None and not _selects(ids, count):
            raise ValueError(
                f"studies[{index}].prefix_ids: expected ints from 0 to {count - 1}, and -1 for none beside them, got "
                f"{ids}"
            )
        _check_targets(model, study.targets, f"studies[{index}].targets")
        conversations = study.targets.conversations
        check_positions(model, cartridge, longest_of(conversations), f"studies[{index}].targets", ids)
    if not any(p.requires_grad and p.numel() for p in cartridge.parameters()):
        raise ValueError("cartridge: expected one with parameters that require gradients, got none")


def _selects(ids: Sequence[int], count: int) -> bool:
    """Whether these are numbers of ``count`` cartridges, -1 for none, and of at least one."""
    ints = all(isinstance(number, int) and not isinstance(number, bool) for number in ids)
    return ints and all(-1 <= number < count for number in ids) and any(number >= 0 for number in ids)


def _check_targets(model: Any, targets: Targets, name: str) -> None:
    """Raise ValueError for targets that are not those of their conversations."""
    check_batches(model, targets.conversations, name=f"{name}.conversations")
    ids, log_probs = targets.ids, targets.log_probs
    tokens = sum(len(conversation.answer_ids) for conversation in targets.conversations)
    for field, x in (("ids", ids), ("log_probs", log_probs)):
        if x.dim() != 2 or x.shape[0] != tokens or not x.shape[1] or x.shape != ids.shape:
            raise ValueError(
                f"{name}.{field}: expected [{tokens}, K], one row per token of the answers, got {list(x.shape)}"
            )
    if not bool((log_probs < _ROUNDING).all()):
        raise ValueError(f"{name}.log_probs: expected no number above 0, got {float(log_probs.max())}")
    count = model.get_input_embeddings().weight.shape[0]
    if not 0 <= int(ids.min()) <= int(ids.max()) < count:
        raise ValueError(
            f"{name}.ids: expected tokens from 0 to {count - 1}, got {int(ids.min())} to {int(ids.max())}"
        )


def _describe(study: Study) -> dict[str, Any]:
    """What identifies the data of a study."""
    targets = study.targets
    return {
        "prefix_ids": study.prefix_ids,
        "conversations": digest_of_conversations(targets.conversations),
        "targets": digest_of_tensors({"ids": targets.ids, "log_probs": targets.log_probs}),
    }
