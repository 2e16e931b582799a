# SPDX-License-Identifier: Apache-2.0
"""Prefixes on disk, in PEFT's folder format: ``adapter_model.safetensors`` and ``adapter_config.json``.

PEFT reads ``prompt_embeddings`` and the config. Parameters that these do not determine (the MLP of a projection) are
stored under keys ``peftkern.*``, which PEFT ignores. The header of the weights repeats the config, so the weights
alone are a complete checkpoint, which a single rename replaces. A prefix that PEFT cannot represent (one length per
layer, values narrower than keys, a bank, gates, states, an encoder-decoder model's encoder or natural layer order)
has a ``peft_type`` that PEFT rejects.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .files import replace_files
from .integrations.cartridge_file import WEIGHTS_NAME as CARTRIDGE_NAME
from .integrations.cartridge_file import read_cartridge
from .integrations.kv_file import KVFile, read_kv
from .model_info import Origin
from .modules import PrefixKV, SoftPrompt
from .recurrent_state import RecurrentState

__all__ = ["load_prefix", "save_prefix"]

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
FORMAT_VERSION = 1

#: Subfolders in which a patched model with other adapters saves its prefix or prompt, and names of these submodules.
PREFIX_NAME, PROMPT_NAME = "peftkern_prefix", "peftkern_prompt"

_PREFIX_TYPES = ("PREFIX_TUNING", "CARTRIDGE", "PEFTKERN_PREFIX")
_PROMPT_TYPES = ("PROMPT_TUNING", "P_TUNING", "PEFTKERN_PROMPT")


def save_prefix(prefix: PrefixKV | SoftPrompt, folder: str | os.PathLike[str]) -> None:
    """Saves a prefix for :func:`load_prefix` and, if PEFT can represent it, for PEFT.

    Both files are written under temporary names, flushed to disk, and then renamed, the weights first. If this is
    interrupted at any point, :func:`load_prefix` finds either the complete old prefix or the complete new one.

    Args:
        prefix: the module to save.
        folder: created if it does not exist. Its ``adapter_model.safetensors`` and ``adapter_config.json`` are
            replaced.

    Raises:
        ValueError: if the folder's weights also contain other tensors (a classifier that PEFT saved with its prefix),
            which would be lost.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> save_prefix(PrefixKV(None, [3, 0, 5], num_layers=3, num_kv_heads=2, head_dim=16), folder)
    >>> load_prefix(folder)
    PrefixKV(num_layers=3, num_kv_heads=2, head_dim=16, lengths=[3, 0, 5])
    """
    if isinstance(prefix, PrefixKV):
        config, own, tensors = _describe_prefix(prefix)
    elif isinstance(prefix, SoftPrompt):
        config, own, tensors = _describe_prompt(prefix)
    else:
        raise ValueError(f"prefix: expected a PrefixKV or SoftPrompt, got {type(prefix).__name__}")
    config = {"inference_mode": True, **prefix.origin._asdict(), **config}
    full = {**config, **own, "peftkern_format": FORMAT_VERSION}
    # PEFT warns about fields that it does not know.
    public = full if config["peft_type"].startswith("PEFTKERN") else config

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _check_nothing_lost(folder / WEIGHTS_NAME)
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    metadata = {"format": "pt", "peftkern": json.dumps(full, sort_keys=True)}
    weights, text = save(tensors, metadata), json.dumps(public, indent=2, sort_keys=True)
    replace_files(folder, {WEIGHTS_NAME: weights, CONFIG_NAME: text.encode()})


def load_prefix(
    folder: str | os.PathLike[str], trainable: bool = True, *, model: Any = None
) -> PrefixKV | SoftPrompt:
    """Loads a prefix that :func:`save_prefix` or PEFT's ``save_pretrained`` has saved, for inference or training.

    PEFT's PREFIX_TUNING and CARTRIDGE become a :class:`PrefixKV`, PROMPT_TUNING and P_TUNING a :class:`SoftPrompt`.
    A folder of HazyResearch's Cartridges (``cartridge.pt``) and the ``kv`` file of :func:`export` become a
    :class:`PrefixKV`, too. No file can run code.
    PEFT saves the output of a projection or prompt encoder without its MLP, so training continues on flat parameters.
    Tensors of other modules (``modules_to_save``) are not loaded; a warning names them.

    Args:
        folder: a local folder with the two files, or one in which a patched model with other adapters (LoRA) has
            saved its prefix beside them. The config may be missing if :func:`save_prefix` wrote the weights. Also
            the folder or ``.pt`` file of a cartridge, or a ``kv`` file.
        trainable: False clears ``requires_grad``.
        model: a Hugging Face model or config that the prefix must fit. A model also determines the device. PEFT's
            file for a model whose layers differ in width (Gemma 4) does not say how wide each layer is, so it needs
            the model.

    Returns:
        The prefix in the stored dtype; half precision is converted to fp32.

    Raises:
        ValueError: naming the file and the problem: missing, truncated, a pickle, another format, another type of
            adapter, shapes that do not fit the config, or a prefix for another model.
    """
    return load_with_dtype(folder, trainable, model)[0]


def load_with_dtype(
    folder: str | os.PathLike[str], trainable: bool, model: Any = None
) -> tuple[PrefixKV | SoftPrompt, torch.dtype]:
    """What :func:`load_prefix` returns, and the dtype in which it is stored."""
    contents = _foreign_contents(Path(folder))
    if contents is not None:
        return _placed(_prefix_of(contents, Path(folder)), trainable, model, Path(folder)), contents.dtype
    folder = _holding(Path(folder))
    path = folder / WEIGHTS_NAME
    tensors, config = _read(folder)
    peft_type = config.get("peft_type")
    if peft_type not in _PREFIX_TYPES + _PROMPT_TYPES:
        known = ", ".join(_PREFIX_TYPES + _PROMPT_TYPES)
        raise ValueError(f"{folder / CONFIG_NAME}: expected peft_type to be one of {known}, got {peft_type!r}")
    try:
        if peft_type in _PREFIX_TYPES:
            prefix: PrefixKV | SoftPrompt = _build_prefix(config, tensors, model)
        else:
            prefix = _build_prompt(config, tensors)
        prefix.origin = Origin(*(config.get(name) or default for name, default in Origin._field_defaults.items()))
    except KeyError as error:
        raise ValueError(f"{path}: expected {error} in the weights or their config, got neither") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    prefix = _placed(prefix, trainable, model, path)
    foreign = _foreign(tensors)
    if foreign:
        warnings.warn(f"{path}: expected a prefix alone; not loaded: {foreign}", stacklevel=3)
    dtypes = [x.dtype for name, x in tensors.items() if name not in foreign and x.is_floating_point()]
    return prefix, reduce(torch.promote_types, dtypes)


def _placed(prefix: PrefixKV | SoftPrompt, trainable: bool, model: Any, path: Path) -> PrefixKV | SoftPrompt:
    """The prefix on the model's device, which it must fit."""
    if model is not None:
        _check_fits(prefix, model, path)
        device = getattr(model, "device", None)
        prefix = prefix if device is None else prefix.to(device)
    return prefix.requires_grad_(False) if not trainable else prefix


def _foreign_contents(path: Path) -> KVFile | None:
    """The keys and values in a file or folder of another program's format; None for a folder of PEFT's."""
    if path.is_dir():
        is_cartridge = os.path.lexists(path / CARTRIDGE_NAME) and not os.path.lexists(path / WEIGHTS_NAME)
        return read_cartridge(path) if is_cartridge else None
    readers = {".safetensors": read_kv, Path(CARTRIDGE_NAME).suffix: read_cartridge}
    return readers[path.suffix](path) if path.suffix in readers and os.path.lexists(path) else None


def _prefix_of(contents: KVFile, path: Path) -> PrefixKV:
    if contents.positions < max(contents.lengths):
        raise ValueError(
            f"{path}: positions: expected those of the prefix's tokens, got 0; it was exported with "
            "shift_positions=False, so load the prefix as it was saved"
        )
    layers = [None if pair is None else tuple(x.transpose(0, 1) for x in pair) for pair in contents.layers]
    prefix: PrefixKV = PrefixKV.from_cache(
        layers, contents.lengths, num_frozen_tokens=contents.num_frozen_tokens, positions=contents.positions
    )
    names = {name: getattr(contents, name) for name in Origin._fields}
    prefix.origin = Origin(**{name: value for name, value in names.items() if value is not None})
    return prefix


def _describe_prefix(prefix: PrefixKV) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """PEFT's config fields, our own fields, and the tensors."""
    is_flat = prefix.shares_parameter and prefix.num_prefixes is None and prefix.state is None
    config: dict[str, Any] = {
        "peft_type": "PEFTKERN_PREFIX",
        "num_virtual_tokens": max(prefix.lengths),
        "num_layers": prefix.num_layers,
        "num_attention_heads": prefix.num_kv_heads,
        "token_dim": prefix.token_dim,
        "num_transformer_submodules": 2 if prefix.peft_seq2seq_layout else 1,
    }
    if (
        is_flat
        and not prefix.learn_length
        and prefix.positions == max(prefix.lengths)
        and "parts" not in prefix.geometry
        and (prefix.origin.task_type == "SEQ_2_SEQ_LM") == prefix.peft_seq2seq_layout
    ):
        if prefix.num_frozen_tokens:
            config |= {"peft_type": "CARTRIDGE", "num_frozen_tokens": prefix.num_frozen_tokens}
        else:
            config |= {"peft_type": "PREFIX_TUNING", "prefix_projection": prefix.projection is not None}
            config |= {"encoder_hidden_size": prefix.projection or prefix.token_dim}
    names = ("lengths", "num_frozen_tokens", "projection", "num_prefixes", "learn_length", "positions")
    own = {**prefix.geometry, **{name: getattr(prefix, name) for name in names}}
    own |= {} if prefix.state is None else {"state": prefix.state.shapes}
    tensors = {"prompt_embeddings": prefix.flat_values()} if is_flat and not prefix.learn_length else {}
    if not tensors or prefix.projection is not None:
        tensors |= {f"peftkern.{name}": x for name, x in prefix.state_dict().items()}
    return config, own, tensors


def _describe_prompt(prompt: SoftPrompt) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    bank = prompt.weight.dim() == 3
    config = {
        "peft_type": "PEFTKERN_PROMPT" if bank else "PROMPT_TUNING",
        "num_virtual_tokens": prompt.length,
        "token_dim": prompt.embed_dim,
        "num_transformer_submodules": 1,
    }
    return config, {"num_prompts": prompt.weight.shape[0] if bank else None}, {"prompt_embeddings": prompt.weight}


def _build_prefix(config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: Any) -> PrefixKV:
    """Compares shapes with a module on the meta device, so that nothing is allocated unless they fit."""
    names = ("num_layers", "num_attention_heads", "token_dim", "num_virtual_tokens")
    num_layers, num_kv_heads, token_dim, length = (_size(config, name) for name in names)
    if token_dim % num_kv_heads:
        raise ValueError(f"token_dim: expected a multiple of {num_kv_heads} heads, got {token_dim}")
    num_frozen = config.get("num_frozen_tokens") or 0
    state = {name.removeprefix("peftkern."): x for name, x in tensors.items() if name.startswith("peftkern.")}
    if not state:
        flat = tensors["prompt_embeddings"]
        _check_shape("prompt_embeddings", flat, [length, num_layers * 2 * token_dim])
        state = {"trainable.0": flat[num_frozen:]} | ({"frozen.0": flat[:num_frozen]} if num_frozen else {})
    geometry: dict[str, Any] = {
        "num_layers": num_layers,
        "num_kv_heads": num_kv_heads,
        "head_dim": token_dim // num_kv_heads,
    }
    if "head_dim" in config:
        names = ("num_kv_heads", "head_dim", "value_head_dim", "parts")
        geometry |= {name: config[name] for name in names if name in config}
    elif model is not None:
        geometry = _geometry_in(model, geometry)
    prefix = PrefixKV(
        None, config.get("lengths", length), **geometry, num_prefixes=config.get("num_prefixes"),
        num_frozen_tokens=num_frozen, projection=config.get("projection"), init="zero", device="meta",
        peft_seq2seq_layout=config.get("num_transformer_submodules") == 2,
        learn_length=config.get("learn_length", False), positions=config.get("positions"),
        state=RecurrentState(config["state"], device="meta") if "state" in config else False,
    )  # fmt: skip
    for name, x in prefix.state_dict().items():
        _check_shape(f"peftkern.{name}", state[name], list(x.shape), floats=x.is_floating_point())
    prefix.load_state_dict({name: _master(x) for name, x in state.items()}, assign=True)
    return prefix


def _geometry_in(model: Any, geometry: dict[str, Any]) -> dict[str, Any]:
    """The geometry of a prefix in PEFT's layout, with the model's own widths where its layers differ in width."""
    wanted = PrefixKV(model, 1, device="meta")
    largest = {name: getattr(wanted, name) for name in geometry}
    return wanted.geometry if wanted.shares_parameter and largest == geometry else geometry


def _build_prompt(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SoftPrompt:
    """PEFT stores num_virtual_tokens rows per transformer submodule, and uses only those of the first."""
    length, embed_dim = _size(config, "num_virtual_tokens"), _size(config, "token_dim")
    num_prompts, weight = config.get("num_prompts"), tensors["prompt_embeddings"]
    bank = [] if num_prompts is None else [num_prompts]
    rows = length * (config.get("num_transformer_submodules") or 1)
    _check_shape("prompt_embeddings", weight, [*bank, rows, embed_dim])
    weight = _master(weight[..., :length, :])
    return SoftPrompt(None, length, num_prompts=num_prompts, embed_dim=embed_dim, init=weight, dtype=weight.dtype)


def _size(config: Mapping[str, Any], name: str) -> int:
    size = config[name]
    if not isinstance(size, int) or size < (name != "num_virtual_tokens"):
        raise ValueError(f"{name}: expected a positive int, got {size!r}")
    return size


def _check_shape(name: str, x: Tensor, expected: list[int], floats: bool = True) -> None:
    if list(x.shape) != expected or x.is_floating_point() != floats:
        kind = "floats" if floats else "integers"
        raise ValueError(f"{name}: expected {kind} {expected}, got {x.dtype} {list(x.shape)}")


def _master(x: Tensor) -> Tensor:
    """A copy, of floats in at least fp32; tensors that safetensors has read are mapped from the file."""
    if not x.is_floating_point():
        return x.clone()
    return x.to(torch.promote_types(x.dtype, torch.float32), copy=True)


def _check_fits(prefix: PrefixKV | SoftPrompt, model: Any, path: Path) -> None:
    if isinstance(prefix, PrefixKV):
        expected, got = PrefixKV(model, 0, device="meta", parts=tuple(prefix.parts)).geometry, prefix.geometry
    else:
        expected, got = ({"embed_dim": x.embed_dim} for x in (SoftPrompt(model, 0), prefix))
    if expected != got:
        raise ValueError(
            f"{path}: expected a prefix for the model's {expected}, got one for {got} "
            f"({prefix.origin.base_model_name_or_path or 'model unnamed'})"
        )


def _check_nothing_lost(path: Path) -> None:
    """Raise ValueError if replacing the file would lose other tensors. An unreadable file has nothing to lose."""
    with contextlib.suppress(FileNotFoundError, SafetensorError), safe_open(path, framework="pt") as file:
        foreign = _foreign(file.keys())
        if foreign:
            raise ValueError(
                f"{path}: expected to replace a prefix alone, got also {foreign}; save to another folder"
            )


def _foreign(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name != "prompt_embeddings" and not name.startswith("peftkern."))


def _holding(folder: Path) -> Path:
    """The folder itself if it contains a prefix, else the one beside its other adapters."""
    beside = [folder / name for name in (PREFIX_NAME, PROMPT_NAME) if (folder / name / WEIGHTS_NAME).is_file()]
    if not beside:
        return folder
    with contextlib.suppress(ValueError):
        if _read(folder)[1].get("peft_type") in _PREFIX_TYPES + _PROMPT_TYPES:
            return folder
    if len(beside) > 1:
        names = " and ".join(path.name for path in beside)
        raise ValueError(
            f"{folder}: expected one prefix or prompt beside the adapters, got {names}; name one of them"
        )
    return beside[0]


def _read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and config.

    Our weights contain their config. Only the origin is then read from the config file, because that file may have
    been edited, or belong to the previous prefix.
    """
    weights, config_path = folder / WEIGHTS_NAME, folder / CONFIG_NAME
    if not weights.is_file():
        pickle = " (adapter_model.bin is a pickle, which is not read: save it as safetensors)"
        hint = pickle if (folder / "adapter_model.bin").exists() else ""
        raise ValueError(f"{weights}: expected a safetensors file, got none{hint}")
    tensors, metadata = _read_weights(weights)
    try:
        config = json.loads(config_path.read_bytes())
        if not isinstance(config, dict):
            raise ValueError(f"a JSON {type(config).__name__}")
    except (OSError, ValueError) as error:
        config = {}
        if "peftkern" not in metadata:
            raise ValueError(f"{config_path}: expected PEFT's config, a JSON object, got {error}") from error
    if "peftkern" not in metadata:
        return tensors, config
    own = json.loads(metadata["peftkern"])
    if own.get("peftkern_format") != FORMAT_VERSION:
        raise ValueError(
            f"{weights}: expected peftkern_format {FORMAT_VERSION}, got {own.get('peftkern_format')}; "
            "a newer peftkern wrote it"
        )
    return tensors, {**own, **{name: config[name] for name in Origin._fields if name in config}}


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        with path.open("rb") as raw:
            head = raw.read(2)
        pickled = head == b"PK" or head[:1] == b"\x80"
        kind = "a pickle, which is not read" if pickled else f"a truncated or foreign file ({error})"
        raise ValueError(f"{path}: expected a safetensors file, got {kind}") from error
