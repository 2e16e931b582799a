# SPDX-License-Identifier: Apache-2.0
"""The files of a checkpoint: the weights, whose header has shapes and metadata, and the config."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .checkpoint_config import Fields, TensorShape
from .model_info import Origin
from .strict_json import json_object, shown

__all__ = ["CONFIG_NAME", "FORMAT_VERSION", "METADATA", "WEIGHTS_NAME", "Checkpoint", "foreign", "open_checkpoint"]

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
FORMAT_VERSION = 1

#: The entry of the header's metadata that repeats the config.
METADATA = "peftkern"
#: Bytes of a config, of which one with thousands of layers takes less than one million.
_MAX_CONFIG = 1 << 24


class Checkpoint:
    """An open checkpoint, of which only the header and the config have been read.

    Attributes:
        weights: the path of the weights.
        shapes: the shape and dtype of each tensor.
        config: the config.
        source: the file that the config comes from.
    """

    def __init__(self, weights: Path, file: Any) -> None:
        self.weights = weights
        self._file = file
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        self.shapes = {name: TensorShape(list(x.get_shape()), x.get_dtype()) for name, x in slices.items()}
        self.source, self.config = _config(weights, file.metadata() or {})

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors, which are mapped from the file."""
        return {name: self._file.get_tensor(name) for name in names}


@contextmanager
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


def _config(weights: Path, metadata: Mapping[str, str]) -> tuple[Path, Fields]:
    """The config, and the file that it comes from.

    Our weights contain their config. Only the origin is then read from the config file, because that file may have
    been edited, or belong to the previous prefix.
    """
    path = weights.with_name(CONFIG_NAME)
    config: dict[str, Any] = {}
    try:
        config = _read_config(path)
    except ValueError:
        if METADATA not in metadata:
            raise
    if METADATA not in metadata:
        return path, Fields(config)
    try:
        own = json_object(metadata[METADATA])
    except ValueError as error:
        raise ValueError(f"{weights}: metadata: expected the prefix's config, a JSON object, got {error}") from error
    version = own.get("peftkern_format")
    if type(version) is not int or version != FORMAT_VERSION:
        newer = "; a newer peftkern wrote it" if type(version) is int and version > FORMAT_VERSION else ""
        raise ValueError(f"{weights}: expected peftkern_format {FORMAT_VERSION}, got {shown(version)}{newer}")
    return weights, Fields({**own, **{name: config[name] for name in Origin._fields if name in config}})


def _read_config(path: Path) -> dict[str, Any]:
    """The JSON object in a config file."""
    try:
        if not path.is_file():
            raise ValueError("no file" if not path.exists() else "something that is not a file")
        if path.stat().st_size > _MAX_CONFIG:
            raise ValueError(f"more than {_MAX_CONFIG} bytes")
        return json_object(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected PEFT's config, a JSON object, got {error}") from error
