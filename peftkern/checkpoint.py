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
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .argument_types import MODEL_OR_CONFIG, checks_arguments
from .callers import caller_level
from .checkpoint_config import PrefixConfig, PromptConfig, TensorShape, check_shape, geometry_of, read_origin
from .checkpoint_files import (
    CONFIG_NAME,
    FORMAT_VERSION,
    WEIGHTS_NAME,
    Checkpoint,
    foreign,
    open_checkpoint,
    weights_metadata,
)
from .files import replace_files
from .integrations.cartridge_file import WEIGHTS_NAME as CARTRIDGE_NAME
from .integrations.cartridge_file import read_cartridge
from .integrations.kv_file import KVFile, read_kv
from .model_info import Origin
from .modules import PrefixKV, SoftPrompt
from .recurrent_state import RecurrentState
from .strict_json import shown

__all__ = ["load_prefix", "save_prefix"]

#: The tensor of keys and values, or embeddings, that PEFT reads, and what the names of our own tensors begin with.
FLAT, OWN = "prompt_embeddings", "peftkern."

#: Subfolders in which a patched model with other adapters saves its prefix or prompt, and names of these submodules.
PREFIX_NAME, PROMPT_NAME = "peftkern_prefix", "peftkern_prompt"

_PREFIX_TYPES = ("PREFIX_TUNING", "CARTRIDGE", "PEFTKERN_PREFIX")
_PROMPT_TYPES = ("PROMPT_TUNING", "P_TUNING", "PEFTKERN_PROMPT")


@checks_arguments()
def save_prefix(prefix: PrefixKV | SoftPrompt, folder: str | os.PathLike[str]) -> None:
    """Saves a prefix for :func:`load_prefix` and, if PEFT can represent it, for PEFT.

    Both files are written under temporary names, flushed to disk, and then renamed, the weights first. If this is
    interrupted at any point, :func:`load_prefix` finds either the complete old prefix or the complete new one.
    Between the two renames it finds the new one, and warns that the config file is the old one. The next save removes
    temporary files that a killed process has left.

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
    text = json.dumps(public, indent=2, sort_keys=True).encode()
    weights = save(tensors, weights_metadata(folder, full, text))
    replace_files(folder, {WEIGHTS_NAME: weights, CONFIG_NAME: text})


@checks_arguments(model=MODEL_OR_CONFIG)
def load_prefix(
    folder: str | os.PathLike[str], trainable: bool = True, *, model: Any = None
) -> PrefixKV | SoftPrompt:
    """Loads a prefix that :func:`save_prefix` or PEFT's ``save_pretrained`` has saved, for inference or training.

    PEFT's PREFIX_TUNING and CARTRIDGE become a :class:`PrefixKV`, PROMPT_TUNING and P_TUNING a :class:`SoftPrompt`.
    A folder of HazyResearch's Cartridges (``cartridge.pt``) and the ``kv`` file of :func:`export` become a
    :class:`PrefixKV`, too. No file can run code.
    PEFT saves the output of a projection or prompt encoder without its MLP, so training continues on flat parameters.
    Tensors of other modules (``modules_to_save``) are not loaded; a warning names them. If the weights contain their
    config and the config file says something else, a warning says which is used: the model and the task of an edited
    file, otherwise the weights' own config.

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
    with open_checkpoint(_holding(Path(folder))) as file:
        peft_type = file.config.values.get("peft_type")
        if peft_type not in _PREFIX_TYPES + _PROMPT_TYPES:
            known = ", ".join(_PREFIX_TYPES + _PROMPT_TYPES)
            raise ValueError(f"{file.source}: expected peft_type to be one of {known}, got {shown(peft_type)}")
        build = _build_prefix if peft_type in _PREFIX_TYPES else _build_prompt
        prefix, dtype = build(file, model)
        with _naming(file.source):
            prefix.origin = read_origin(file.config)
        path, others, note = file.weights, foreign(file.shapes), file.note
    prefix = _placed(prefix, trainable, model, path)
    if note is not None:
        warnings.warn(note, stacklevel=caller_level())
    if others:
        warnings.warn(f"{path}: expected a prefix alone; not loaded: {others}", stacklevel=caller_level())
    return prefix, dtype


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Complete the message of a ValueError with the path of a file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


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


def _build_prefix(file: Checkpoint, model: Any) -> tuple[PrefixKV, torch.dtype]:
    """The prefix of a checkpoint, whose config and header are compared before anything is built."""
    with _naming(file.source):
        geometry = geometry_of(file.config)
        if "head_dim" not in file.config.values and model is not None:
            geometry = _geometry_in(model, geometry)
        config = PrefixConfig.read(file.config, geometry)
    state, dtype = _state(file, config)
    prefix = PrefixKV(
        None, list(config.lengths), **config.geometry, num_prefixes=config.num_prefixes,
        num_frozen_tokens=config.num_frozen_tokens, projection=config.projection, init="zero", device="meta",
        peft_seq2seq_layout=config.peft_seq2seq_layout, learn_length=config.learn_length, positions=config.positions,
        state=False if config.state is None else RecurrentState(config.state, device="meta"),
    )  # fmt: skip
    prefix.load_state_dict(state, assign=True)
    return prefix, dtype


def _state(file: Checkpoint, config: PrefixConfig) -> tuple[dict[str, Tensor], torch.dtype]:
    """The entries of a prefix's ``state_dict``, whose floats have one dtype, and the dtype of those in the file."""
    stored = {name.removeprefix(OWN): found for name, found in file.shapes.items() if name.startswith(OWN)}
    expected, flat, num_frozen = config.tensors(), config.flat_shape, config.num_frozen_tokens
    if flat is not None and (not stored or FLAT in file.shapes):
        _check_flat(file, flat)
    if not stored and expected.keys() <= {"trainable.0", "frozen.0"} and flat is not None:
        x = file.tensors([FLAT])[FLAT]
        pieces = {"trainable.0": x[num_frozen:]} | ({"frozen.0": x[:num_frozen]} if num_frozen else {})
        return {name: _master(x, x.dtype) for name, x in pieces.items()}, x.dtype
    missing, more = ([name for name in a if name not in b] for a, b in ((expected, stored), (stored, expected)))
    if missing or more:
        got = "none" if missing else f"also {OWN}{more[0]:.80}"
        wanted = [OWN + name for name in (missing[:1] or expected)]
        raise ValueError(f"expected {shown(wanted)} in the weights, got {got}")
    for name, shape in expected.items():
        check_shape(OWN + name, stored[name], shape)
    tensors = file.tensors(OWN + name for name in expected)
    lens = tensors.get(f"{OWN}prefix_lens")
    if lens is not None and not bool(((lens >= 0) & (lens <= max(config.lengths))).all()):
        raise ValueError(
            f"{OWN}prefix_lens: expected from 0 to {max(config.lengths)} tokens, got {shown(lens.tolist())}"
        )
    dtypes = [x.dtype for x in tensors.values() if x.is_floating_point()]
    dtype = reduce(torch.promote_types, dtypes) if dtypes else torch.float32
    return {name.removeprefix(OWN): _master(x, dtype) for name, x in tensors.items()}, dtype


def _check_flat(file: Checkpoint, shape: list[int]) -> None:
    if FLAT not in file.shapes:
        raise ValueError(f"expected {FLAT!r} in the weights, got {shown(sorted(file.shapes))}")
    check_shape(FLAT, file.shapes[FLAT], TensorShape(shape))


def _geometry_in(model: Any, geometry: dict[str, Any]) -> dict[str, Any]:
    """The geometry of a prefix in PEFT's layout, with the model's own widths where its layers differ in width."""
    wanted = PrefixKV(model, 1, device="meta")
    largest = {name: getattr(wanted, name) for name in geometry}
    return wanted.geometry if wanted.shares_parameter and largest == geometry else geometry


def _build_prompt(file: Checkpoint, model: Any) -> tuple[SoftPrompt, torch.dtype]:
    """PEFT stores num_virtual_tokens rows per transformer submodule, and uses only those of the first."""
    with _naming(file.source):
        config = PromptConfig.read(file.config)
    own = [name for name in file.shapes if name.startswith(OWN)]
    if own:
        raise ValueError(f"expected {FLAT!r} alone in the weights of a prompt, got also {shown(own)}")
    _check_flat(file, config.flat_shape)
    stored = file.tensors([FLAT])[FLAT]
    weight = _master(stored[..., : config.length, :], stored.dtype)
    options: dict[str, Any] = {"num_prompts": config.num_prompts, "embed_dim": config.embed_dim}
    return SoftPrompt(None, config.length, **options, init=weight, dtype=weight.dtype), stored.dtype


def _master(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy, of floats in ``dtype`` or fp32; tensors that safetensors has read are mapped from the file."""
    if not x.is_floating_point():
        return x.clone()
    return x.to(torch.promote_types(dtype, torch.float32), copy=True)


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
        others = foreign(file.keys())
        if others:
            raise ValueError(f"{path}: expected to replace a prefix alone, got also {others}; save to another folder")


def _holding(folder: Path) -> Path:
    """The folder itself if it contains a prefix, else the one beside its other adapters."""
    beside = [folder / name for name in (PREFIX_NAME, PROMPT_NAME) if (folder / name / WEIGHTS_NAME).is_file()]
    if not beside:
        return folder
    with contextlib.suppress(ValueError), open_checkpoint(folder) as file:
        if file.config.values.get("peft_type") in _PREFIX_TYPES + _PROMPT_TYPES:
            return folder
    if len(beside) > 1:
        names = " and ".join(path.name for path in beside)
        raise ValueError(
            f"{folder}: expected one prefix or prompt beside the adapters, got {names}; name one of them"
        )
    return beside[0]
