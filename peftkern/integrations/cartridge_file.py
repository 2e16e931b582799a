# SPDX-License-Identifier: Apache-2.0
"""The folder of a cartridge in the format of HazyResearch's Cartridges, which Tokasaurus serves.

``cartridge.pt`` is a dict that ``torch.save`` wrote, of lists with one tensor [1, Hkv, T, D] per layer:
``trainable_keys`` and ``trainable_values``, and the tokens before them as ``frozen_keys`` and ``frozen_values``
(Cartridges) or ``fixed_keys`` and ``fixed_values`` (Tokasaurus). ``config.yaml`` names the model. Keys are stored
after rotary embedding, and the text starts at the position after the last token.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .kv_file import DTYPES, KVFile, check_finite
from .torch_file import TorchFile, open_torch_file

__all__ = ["CONFIG_NAME", "WEIGHTS_NAME", "cartridge_bytes", "read_cartridge"]

WEIGHTS_NAME, CONFIG_NAME = "cartridge.pt", "config.yaml"

#: The names under which programs look for the tokens that are not trained.
_FROZEN = ("frozen", "fixed")
_PARTS = ("keys", "values")
_NAMES = [f"{kind}_{part}" for kind in ("trainable", *_FROZEN) for part in _PARTS]
_MAX_CONFIG, _MAX_BRACKETS = 1 << 16, 500


def cartridge_bytes(contents: KVFile) -> dict[str, bytes]:
    """``cartridge.pt`` and ``config.yaml``, with both names of the tokens that are not trained.

    Args:
        contents: all layers of one shape and length, with values as wide as keys.

    Raises:
        ValueError: naming what the format has no room for.
    """
    import yaml

    state = _state(contents)
    for name in _NAMES:
        for layer, x in enumerate(state[name]):
            check_finite(f"{name}[{layer}]", x)
    weights = io.BytesIO()
    torch.save(state, weights)
    config: dict[str, Any] = {"kv_cache_initializer": {"max_tokens": contents.positions}}
    if contents.base_model_name_or_path is not None:
        config["model"] = {"pretrained_model_name_or_path": contents.base_model_name_or_path}
    return {CONFIG_NAME: yaml.safe_dump(config).encode(), WEIGHTS_NAME: weights.getvalue()}


def _state(contents: KVFile) -> dict[str, list[Tensor]]:
    """The lists of tensors. Where nothing is frozen, they have tensors of 0 tokens, whose shape readers need."""
    first = next(pair for pair in contents.layers if pair is not None)[0].shape
    for layer, pair in enumerate(contents.layers):
        if pair is None or not pair[0].shape == pair[1].shape == first:
            got = "no keys" if pair is None else " and ".join(str(list(x.shape)) for x in pair)
            raise ValueError(
                f"layer {layer}: expected keys and values [tokens, heads, dims] of one shape in all layers, "
                f"{list(first)}, got {got}"
            )
    if contents.positions != first[0]:
        raise ValueError(
            f"positions: expected {first[0]}, the number of tokens, after which the text starts, got "
            f"{contents.positions}"
        )
    state: dict[str, list[Tensor]] = {}
    for index, part in enumerate(_PARTS):
        tensors = [pair[index].detach().cpu().transpose(0, 1)[None] for pair in contents.layers if pair is not None]
        cuts = [x.tensor_split([contents.num_frozen_tokens], 2) for x in tensors]
        frozen, trainable = (
            [x.clone(memory_format=torch.contiguous_format) for x in xs] for xs in zip(*cuts, strict=True)
        )
        state |= {f"trainable_{part}": trainable} | {f"{kind}_{part}": frozen for kind in _FROZEN}
    return state


def read_cartridge(path: str | os.PathLike[str]) -> KVFile:
    """Read a cartridge on the CPU.

    Args:
        path: the folder, or the file with the tensors. A ``config.yaml`` beside it may be missing.

    Raises:
        ValueError: naming the file, the tensor or field, what was expected and what was found.
    """
    path = Path(path)
    path = path / WEIGHTS_NAME if path.is_dir() else path
    with open_torch_file(path) as file:
        lists = _lists(file)
        kinds = ["trainable", *(kind for kind in _FROZEN if any(lists.get(f"{kind}_{part}") for part in _PARTS))]
        tokens = _check_tensors(lists, kinds, file)
        tensors = {name: [file.read(x) for x in lists[name]] for name in _NAMES if name.rpartition("_")[0] in kinds}
        for name, values in tensors.items():
            for layer, x in enumerate(values):
                check_finite(f"{name}[{layer}]", x)
        _check_frozen(tensors)
    order = [*kinds[1:2], "trainable"]
    keys, values = (
        [
            torch.cat(pieces, 2)[0].transpose(0, 1)
            for pieces in zip(*(tensors[f"{kind}_{part}"] for kind in order), strict=True)
        ]
        for part in _PARTS
    )
    num_frozen = tokens[order[0]] if len(order) > 1 else 0
    model = _model_name(path.parent / CONFIG_NAME)
    return KVFile(list(zip(keys, values, strict=True)), keys[0].shape[0], num_frozen, model)


def _lists(file: TorchFile) -> dict[str, list[Any]]:
    """The lists in a file, which has no others."""
    if type(file.state) is not dict:
        raise ValueError(f"expected a dict of lists, got a {type(file.state).__name__}")
    unknown = [name if type(name) is str else type(name).__name__ for name in file.state if name not in _NAMES]
    if unknown:
        raise ValueError(f"expected only the lists {', '.join(_NAMES)}, got also {', '.join(unknown):.80}")
    lists = {name: file.items(name, value) for name, value in file.state.items()}
    for name in ("trainable_keys", "trainable_values"):
        if not lists.get(name):
            raise ValueError(f"{name}: expected a tensor per layer, got none")
    return lists


def _check_tensors(lists: Mapping[str, Sequence[Any]], kinds: Sequence[str], file: TorchFile) -> dict[str, int]:
    """Raise ValueError unless all tensors fit together, before one is built. Return the tokens of each kind."""
    num_layers, total = len(lists["trainable_keys"]), 0
    expected: dict[str, tuple[list[int], torch.dtype]] = {}
    for kind in kinds:
        for name in (f"{kind}_{part}" for part in _PARTS):
            tensors = lists.get(name, ())
            if len(tensors) != num_layers:
                raise ValueError(f"{name}: expected {num_layers} tensors, as in trainable_keys, got {len(tensors)}")
            for layer, x in enumerate(tensors):
                file.check(f"{name}[{layer}]", x)
                _check_shape(f"{name}[{layer}]", x, expected, kind)
                total += x.numel() * x.itemsize
    if total > 2 * file.size:  # frozen tokens may have two names
        raise ValueError(f"expected tensors of at most {2 * file.size} bytes, got {total}, in which tensors repeat")
    return {kind: shape[2] for kind, (shape, _) in expected.items()}


def _check_shape(name: str, x: Tensor, expected: dict[str, tuple[list[int], torch.dtype]], kind: str) -> None:
    """Raise ValueError unless ``x`` fits the first tensor of its kind, or is the first and fits those before."""
    shape = list(x.shape)
    if len(shape) != 4 or shape[0] != 1 or 0 in (shape[1], shape[3]) or x.dtype not in DTYPES.values():
        raise ValueError(
            f"{name}: expected [1, heads, tokens, dims] in float32, bfloat16 or float16, got {shape} in {x.dtype}"
        )
    first, dtype = next(iter(expected.values()), (shape, x.dtype))
    wanted, _ = expected.setdefault(kind, ([1, first[1], shape[2], first[3]], dtype))
    if shape != wanted or x.dtype != dtype:
        raise ValueError(f"{name}: expected {wanted} in {dtype}, as others have, got {shape} in {x.dtype}")


def _check_frozen(tensors: Mapping[str, Sequence[Tensor]]) -> None:
    """Raise ValueError if a file has two kinds of frozen tokens that differ."""
    for part in _PARTS:
        pairs = zip(tensors.get(f"frozen_{part}", ()), tensors.get(f"fixed_{part}", ()), strict=False)
        if not all(torch.equal(*pair) for pair in pairs):
            raise ValueError(f"fixed_{part}: expected what frozen_{part} contains, got other numbers")


def _model_name(path: Path) -> str | None:
    """The name of the model in a config; None without a config or a name.

    The config is composed, which makes a tree of its text and constructs no objects.
    """
    import yaml

    if not os.path.lexists(path):
        return None
    if not path.is_file():
        raise ValueError(f"{path}: expected YAML, got something that is not a file")
    try:
        if path.stat().st_size > _MAX_CONFIG:
            raise ValueError(f"more than {_MAX_CONFIG} bytes")
        data = path.read_bytes()
        if data.count(b"[") + data.count(b"{") > _MAX_BRACKETS:  # open ones take quadratic time
            raise ValueError(f"more than {_MAX_BRACKETS} brackets")
        config = yaml.compose(data, Loader=yaml.SafeLoader)
    except (OSError, RecursionError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: expected YAML, got {type(error).__name__}: {error!s:.200}") from error
    if not isinstance(config, yaml.MappingNode):
        raise ValueError(f"{path}: expected a mapping, got {'nothing' if config is None else config.id}")
    model = _child(config, "model")
    # Runs that Weights & Biases recorded have their settings below "value".
    name = _child(_child(model, "value") or model, "pretrained_model_name_or_path")
    if name is None or name.tag == "tag:yaml.org,2002:null":
        return None
    if not isinstance(name, yaml.ScalarNode):
        raise ValueError(f"{path}: pretrained_model_name_or_path: expected a name, got a {name.id}")
    return str(name.value)


def _child(node: Any, name: str) -> Any:
    """The value of a key in a node of a YAML tree; None if there is none."""
    pairs = node.value if getattr(node, "id", None) == "mapping" else ()
    return next((value for key, value in pairs if key.value == name), None)
