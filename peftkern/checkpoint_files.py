# SPDX-License-Identifier: Apache-2.0
"""The files of a checkpoint: the weights, whose header has shapes and metadata, and the config."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .checkpoint_config import Fields, TensorShape
from .model_info import Origin
from .strict_json import json_object, read_bytes, shown

__all__ = [
    "CONFIG_NAME", "FORMAT_VERSION", "WEIGHTS_NAME", "Checkpoint", "foreign", "open_checkpoint", "weights_metadata",
]  # fmt: skip

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
FORMAT_VERSION = 1

#: The entry of the header's metadata that repeats the config.
METADATA = "peftkern"
#: The entry with the digest of the config file that a save replaces after the weights.
_REPLACES = "peftkern_replaces"


class Checkpoint:
    """An open checkpoint, of which only the header and the config have been read.

    Attributes:
        weights: the path of the weights.
        shapes: the shape and dtype of each tensor.
        config: the config.
        source: the file that the config comes from.
        note: what does not agree between the two files, and which is used; None if they agree.
    """

    def __init__(self, weights: Path, file: Any) -> None:
        self.weights = weights
        self._file = file
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        self.shapes = {name: TensorShape(list(x.get_shape()), x.get_dtype()) for name, x in slices.items()}
        self.source, self.config, self.note = _config(weights, file.metadata() or {})

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors, which are mapped from the file."""
        return {name: self._file.get_tensor(name) for name in names}


@contextlib.contextmanager
def open_checkpoint(folder: Path) -> Iterator[Checkpoint]:
    """Open the checkpoint in a folder.

    Raises:
        ValueError: naming the file and what was found. Also for every ValueError in the block, whose message it
            completes with the path of the weights, unless it names a file.
    """
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        pickle = " (adapter_model.bin is a pickle, which is not read: save it as safetensors)"
        hint = pickle if (folder / "adapter_model.bin").exists() else ""
        raise ValueError(f"{weights}: expected a safetensors file, got none{hint}")
    try:
        with safe_open(weights, framework="pt") as file:
            yield Checkpoint(weights, file)
    except ValueError as error:
        if str(error).startswith(str(folder)):
            raise
        raise ValueError(f"{weights}: {error}") from error
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{weights}: expected a safetensors file, got {_kind(weights, error)}") from error


def foreign(names: Iterable[str]) -> list[str]:
    """The names of tensors that belong to no prefix or prompt."""
    return sorted(name for name in names if name != "prompt_embeddings" and not name.startswith("peftkern."))


def _kind(path: Path, error: Exception) -> str:
    """What a file is that safetensors does not read."""
    try:
        with path.open("rb") as raw:
            head = raw.read(2)
    except OSError:
        head = b""
    pickled = head == b"PK" or head[:1] == b"\x80"
    return "a pickle, which is not read" if pickled else f"a truncated or foreign file ({error!s:.200})"


def weights_metadata(folder: Path, config: Mapping[str, Any], text: bytes) -> dict[str, str]:
    """The metadata of weights that will be saved in a folder with a config, whose file will contain ``text``.

    It names the config that is there, so that a save that ends between the two renames is recognised.
    """
    metadata = {"format": "pt", METADATA: json.dumps(config, sort_keys=True)}
    with contextlib.suppress(OSError, ValueError):
        before = read_bytes(folder / CONFIG_NAME)
        metadata |= {_REPLACES: _digest(before)} if before != text else {}
    return metadata


def _config(weights: Path, metadata: Mapping[str, str]) -> tuple[Path, Fields, str | None]:
    """The config, the file that it comes from, and what to say about files that do not agree.

    Our weights contain their config, which is the one that counts. The config file may belong to another prefix, or
    its origin may have been edited, and then that origin counts.
    """
    path = weights.with_name(CONFIG_NAME)
    data, config, problem = b"", None, None
    try:
        data = read_bytes(path)
        config = json_object(data)
    except (OSError, ValueError) as error:
        got = "none" if isinstance(error, FileNotFoundError) else error
        problem = f"{path}: expected PEFT's config, a JSON object, got {got}"
        if METADATA not in metadata:
            raise ValueError(problem) from error
    if METADATA not in metadata:
        return path, Fields(config or {}), None
    own = _own_config(weights, metadata[METADATA])
    ours = f"the config in {weights.name} is used"
    if config is None:
        return weights, Fields(own), f"{problem}; {ours}" if path.exists() else None
    if _digest(data) == metadata.get(_REPLACES):
        note = f"{path}: expected the config of the weights, got that of the checkpoint before, because saving was"
        return weights, Fields(own), f"{note} interrupted; {ours}"
    changed = [name for name in sorted(own.keys() & config.keys()) if config[name] != own[name]]
    differences = {
        name: f"{path}: {name}: expected {shown(own[name])}, as in the weights, got {shown(config[name])}"
        for name in changed
        if name != "inference_mode"
    }
    for name, note in differences.items():
        if name not in Origin._fields:
            return weights, Fields(own), f"{note}; {ours}"
    if not differences:
        return weights, Fields(own), None
    edited = {name: config[name] for name in differences}
    return path, Fields({**own, **edited}), f"{'; '.join(differences.values())}, which is used"


def _own_config(weights: Path, text: str) -> dict[str, Any]:
    """The config in our weights."""
    try:
        own = json_object(text)
    except ValueError as error:
        raise ValueError(f"{weights}: metadata: expected the prefix's config, a JSON object, got {error}") from error
    version = own.get("peftkern_format")
    if type(version) is not int or version != FORMAT_VERSION:
        newer = "; a newer peftkern wrote it" if type(version) is int and version > FORMAT_VERSION else ""
        raise ValueError(f"{weights}: expected peftkern_format {FORMAT_VERSION}, got {shown(version)}{newer}")
    return own


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
