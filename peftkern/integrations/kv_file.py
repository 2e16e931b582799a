# SPDX-License-Identifier: Apache-2.0
"""The neutral file of a prefix: the keys and values of each layer, in safetensors.

Tensors ``layers.{i}.key`` [P_i, Hkv, D], after rotary embedding, and ``layers.{i}.value`` [P_i, Hkv, D_v], all in one
of float32, bfloat16 and float16. Layers without keys have none. Metadata (strings):

``format``                     ``peftkern.kv``
``version``                    ``1``
``num_layers``                 layers of the model, including those without keys
``positions``                  position of the first token after the prefix: at least the largest P_i, or 0 for a
                               prefix that takes no positions
``num_frozen_tokens``          first tokens that training keeps; 0 if it is missing
``base_model_name_or_path``    the model, if it is known; also ``revision`` and ``task_type`` (PEFT's)
``sha256``                     of the bytes of all tensors, in the order of their names; not compared if missing

A server's folder contains one file ``NAME.safetensors`` for each prefix. This module needs only torch and
safetensors.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..files import replace_files

__all__ = [
    "DTYPES", "FORMAT", "VERSION", "KVFile", "check_finite", "kv_bytes", "kv_path", "plain_name", "read_kv",
    "write_kv",
]  # fmt: skip

FORMAT, VERSION = "peftkern.kv", "1"

#: Layers that a file may have, which bounds what a reader allocates for a number in the metadata.
MAX_LAYERS = 1 << 16
#: dtypes by their names in safetensors.
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

_ORIGIN = ("base_model_name_or_path", "revision", "task_type")
_TENSOR = re.compile(r"layers\.(0|[1-9][0-9]{0,5})\.(key|value)", re.ASCII)
#: File systems allow 255 bytes, of which suffixes and the names of temporary files need some.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}", re.ASCII)
_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}", re.ASCII)


@dataclass(frozen=True)
class KVFile:
    """The contents of a file.

    Attributes:
        layers: (key [P_i, Hkv, D], value [P_i, Hkv, D_v]) of each layer; None for a layer without keys.
        positions: position of the first token after the prefix; 0 if the prefix takes no positions.
        num_frozen_tokens: first tokens that training keeps.
        base_model_name_or_path, revision, task_type: the model and PEFT's name of its task, if they are known.
    """

    layers: Sequence[tuple[Tensor, Tensor] | None]
    positions: int
    num_frozen_tokens: int = 0
    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None

    @property
    def num_layers(self) -> int:
        """Layers of the model, including those without keys."""
        return len(self.layers)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each layer; 0 for a layer without keys."""
        return [0 if pair is None else pair[0].shape[0] for pair in self.layers]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all tensors."""
        return next(pair[0].dtype for pair in self.layers if pair is not None)


def kv_path(folder: str | os.PathLike[str], name: str) -> Path:
    """The file of a prefix in a folder, which need not exist.

    Raises:
        ValueError: for a name that is no plain one, such as ``../secret`` or ``.hidden``. Names come from requests.
    """
    return Path(folder) / f"{plain_name(name)}.safetensors"


def plain_name(name: str) -> str:
    """The name, if it can be that of a file in a folder. Otherwise raise ValueError."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            "name: expected at most 200 letters, digits and any of _ . + - (not first: . + -), "
            f"got {str(name)[:80]!r}"
        )
    return name


def write_kv(path: str | os.PathLike[str], contents: KVFile) -> None:
    """Write a file. It appears complete, or not at all.

    Args:
        path: its folder is created if it does not exist. A file that is there is replaced.
        contents: tensors on any device, of any strides.

    Raises:
        ValueError: naming the tensor or field that the format does not allow.
    """
    path = Path(path)
    try:
        data = kv_bytes(contents)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_files(path.parent, {path.name: data})


def kv_bytes(contents: KVFile) -> bytes:
    """What :func:`write_kv` writes."""
    tensors = {
        f"layers.{layer}.{part}": x.detach().cpu().contiguous()
        for layer, pair in enumerate(contents.layers)
        if pair is not None
        for part, x in zip(("key", "value"), pair, strict=True)
    }
    metadata = {"format": FORMAT, "version": VERSION, "num_layers": str(contents.num_layers)}
    metadata |= {name: str(getattr(contents, name)) for name in ("positions", "num_frozen_tokens")}
    metadata |= {name: value for name in _ORIGIN if (value := getattr(contents, name)) is not None}
    names = {dtype: name for name, dtype in DTYPES.items()}
    _check({name: (list(x.shape), names.get(x.dtype, str(x.dtype))) for name, x in tensors.items()}, metadata)
    for name, x in tensors.items():
        check_finite(name, x)
    # safetensors refuses tensors that share memory.
    owners = {x.untyped_storage().data_ptr(): name for name, x in tensors.items()}
    tensors = {
        name: x if owners[x.untyped_storage().data_ptr()] == name else x.clone() for name, x in tensors.items()
    }
    data: bytes = save(tensors, {**metadata, "sha256": _sha256(tensors)})
    return data


def read_kv(path: str | os.PathLike[str]) -> KVFile:
    """Read a file on the CPU.

    Names, shapes and dtypes are checked before a tensor is built.

    Raises:
        ValueError: naming the file, the tensor or field, what was expected and what was found.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise ValueError(f"expected a safetensors file, got {'a folder' if path.is_dir() else 'none'}")
        with safe_open(path, framework="pt") as file:
            names, metadata = list(file.keys()), file.metadata() or {}
            slices = {name: file.get_slice(name) for name in names}
            num_layers = _check({n: (list(x.get_shape()), x.get_dtype()) for n, x in slices.items()}, metadata)
            # Clones, because the file's pages may disappear.
            tensors = {name: file.get_tensor(name).clone() for name in names}
        if metadata.get("sha256") not in (None, _sha256(tensors)):
            raise ValueError("sha256: expected that of the tensors in the metadata, got another; the file is damaged")
        for name, x in tensors.items():
            check_finite(name, x)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: expected a safetensors file, got a damaged or foreign one ({error})") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    keys = [(f"layers.{layer}.key", f"layers.{layer}.value") for layer in range(num_layers)]
    return KVFile(
        [(tensors[key], tensors[value]) if key in tensors else None for key, value in keys],
        int(metadata["positions"]),
        int(metadata.get("num_frozen_tokens", "0")),
        **{name: metadata.get(name) for name in _ORIGIN},
    )


def _check(tensors: Mapping[str, tuple[list[int], str]], metadata: Mapping[str, str]) -> int:
    """Raise ValueError unless shapes, dtypes and metadata form one prefix. Return the number of layers."""
    if metadata.get("format") != FORMAT:
        raise ValueError(f"format: expected {FORMAT!r} in the metadata, got {metadata.get('format')!r}")
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"version: expected {VERSION!r}, got {metadata.get('version')!r}; another version of peftkern wrote it"
        )
    num_layers = _number(metadata, "num_layers", 1, MAX_LAYERS)
    if not tensors:
        raise ValueError("layers: expected keys and values of at least one layer, got none")
    layers = set()
    for name in tensors:
        match = _TENSOR.fullmatch(name)
        if match is None or int(match[1]) >= num_layers:
            raise ValueError(f"{name}: expected a tensor 'layers.i.key' or 'layers.i.value' with i < {num_layers}")
        layers.add(int(match[1]))
    dtype = next(iter(tensors.values()))[1]
    if dtype not in DTYPES:
        raise ValueError(f"{next(iter(tensors))}: expected one of {', '.join(DTYPES)}, got {dtype}")
    lengths = [_check_layer(layer, tensors, dtype) for layer in sorted(layers)]
    longest = max(lengths)
    if metadata.get("positions") != "0":
        _number(metadata, "positions", longest, 10**9)
    if "num_frozen_tokens" in metadata:
        _number(metadata, "num_frozen_tokens", 0, longest)
    return num_layers


def _check_layer(layer: int, tensors: Mapping[str, tuple[list[int], str]], dtype: str) -> int:
    """Raise ValueError unless a layer has a key and a value that belong together. Return the number of tokens."""
    shapes = []
    for part in ("key", "value"):
        name = f"layers.{layer}.{part}"
        if name not in tensors:
            raise ValueError(f"{name}: expected a tensor, because the layer has the other one, got none")
        shape, own = tensors[name]
        if own != dtype:
            raise ValueError(f"{name}: expected {dtype}, as the first tensor, got {own}")
        if len(shape) != 3 or 0 in shape[1:]:
            raise ValueError(f"{name}: expected [tokens, at least 1 head, at least 1], got {shape}")
        shapes.append(shape)
    if shapes[0][:2] != shapes[1][:2]:
        raise ValueError(
            f"layers.{layer}.value: expected the tokens and heads of the key, {shapes[0][:2]}, got {shapes[1][:2]}"
        )
    return shapes[0][0]


def _number(metadata: Mapping[str, str], name: str, least: int, most: int) -> int:
    text = metadata.get(name)
    if text is None or not _NUMBER.fullmatch(text) or not least <= int(text) <= most:
        raise ValueError(f"{name}: expected an integer from {least} to {most} in the metadata, got {text!r}")
    return int(text)


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_finite(name: str, x: Tensor) -> None:
    """Raise ValueError, naming the tensor, for one with NaN or infinity."""
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
