# SPDX-License-Identifier: Apache-2.0
"""Writes prefixes and prompts in the formats of other programs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..argument_types import checks_arguments
from ..checkpoint import load_with_dtype
from ..files import replace_files
from ..model_info import Origin
from ..modules import PrefixKV, SoftPrompt
from .cartridge_file import WEIGHTS_NAME, cartridge_bytes
from .kv_file import KVFile, check_finite, kv_bytes, plain_name
from .llama_cpp import embd_bytes
from .prompt_embeds import prompt_embeds_bytes
from .tensorrt_llm import prompt_table_bytes

__all__ = ["FORMATS", "export", "kv_of"]

Module = PrefixKV | SoftPrompt
Source = Module | str | os.PathLike[str]
#: Paths in the folder, and what the files contain.
Files = dict[str, bytes]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@checks_arguments(prefix=None, name=None)
def export(
    prefix: Source | Sequence[Source],
    folder: str | os.PathLike[str],
    to: str,
    *,
    name: str | None = None,
    dtype: torch.dtype | None = None,
    shift_positions: bool = True,
    force: bool = False,
) -> list[Path]:
    """Write a prefix, cartridge or prompt in the format of another program.

    =================  ==========  ==================================================================================
    ``to``             of a        files in the folder
    =================  ==========  ==================================================================================
    ``kv``             PrefixKV    ``NAME.safetensors``, the neutral file of keys and values (vLLM)
    ``cartridges``     PrefixKV    ``NAME/cartridge.pt`` and ``NAME/config.yaml`` (Cartridges, Tokasaurus)
    ``prompt-embeds``  SoftPrompt  ``NAME.pt`` and ``NAME.safetensors``, rows [P, E] (vLLM)
    ``tensorrt-llm``   SoftPrompt  ``NAME.npy`` and ``NAME.tasks.json``, one table [tasks, P, E] of all prompts
    ``llama.cpp``      SoftPrompt  ``NAME.f32`` and ``NAME.f32.json``, rows [P, E] for ``llama_batch.embd``
    =================  ==========  ==================================================================================

    A bank becomes one file per prefix, NAME-0, NAME-1 and so on. A projection is replaced by its output. Nothing is
    written unless everything can be written; each file then appears complete or not at all.

    Args:
        prefix: a module, or a folder that :func:`load_prefix` reads, or several of them.
        folder: created if it does not exist.
        to: the format.
        name: NAME, of letters, digits and ``_.+-``. Default: the name of the source's folder, or ``prefix``. Several
            modules get NAME-0, NAME-1 and so on, and the table of several prompts ``prompts``. Several folders keep
            their own names, so that only their table can be given one.
        dtype: float32, bfloat16 or float16; default: the module's own, or that in which the folder or file stores it.
        shift_positions: False for a prefix that was trained with ``patch(shift_positions=False)``, which the prefix
            itself does not know. The file then says that the text starts at position 0, and a reader that would put
            it behind the prefix refuses the file. Only ``kv`` has room for it.
        force: replace files that exist.

    Returns:
        The files.

    Raises:
        ValueError: for a prefix for which the format has no room, naming what; for NaN; for files that exist; for
            a file where a folder is needed.
    """
    if to not in FORMATS:
        raise ValueError(f"to: expected one of {', '.join(FORMATS)}, got {to!r}")
    if dtype not in (None, *_DTYPES):
        raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
    kind, write = FORMATS[to]
    sources = _sources(prefix)
    if name is not None:
        plain_name(name)
        if len(sources) > 1 and write is not _prompt_table and not any(isinstance(x, Module) for x in sources):
            raise ValueError(f"name: expected None for several folders, which keep their own names, got {name!r}")
    if not shift_positions:
        if write is not _kv:
            raise ValueError(f"shift_positions: expected True for to={to!r}, got False")
        write = partial(write, shift_positions=False)
    named = _named(sources, name, dtype)
    singles = _singles(named)
    wrong = next((module for module in singles.values() if not isinstance(module, kind)), None)
    if wrong is not None:
        raise ValueError(f"prefix: expected a {kind.__name__} for to={to!r}, got a {type(wrong).__name__}")
    folder = Path(folder)
    if name is None:
        name = next(iter(named)) if len(named) == 1 else "prompts"
    contents = write(singles, dtype, name)
    paths = [folder / path for path in contents]
    _check_paths(paths, force)
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    replace_files(folder, contents)
    return paths


def kv_of(prefix: PrefixKV, dtype: torch.dtype | None = None, shift_positions: bool = True) -> KVFile:
    """The keys and values of a single prefix, with a projection replaced by its output.

    Args:
        prefix: the prefix.
        dtype: of the result; default: the prefix's own.
        shift_positions: False if the prefix takes no positions.

    Raises:
        ValueError: for what keys and values of a decoder's layers do not express.
    """
    no_room = {
        "num_prefixes": (prefix.num_prefixes, "a single prefix; select one of the bank"),
        "state": (prefix.state is not None, "no states of recurrent layers"),
        "learn_length": (prefix.learn_length, "no gates"),
        "peft_seq2seq_layout": (prefix.peft_seq2seq_layout, "the layers' own order, not PEFT's of encoder-decoders"),
        "parts": (tuple(prefix.parts) != ("decoder",) and tuple(prefix.parts), "the decoder alone"),
    }
    for name, (value, expected) in no_room.items():
        if value:
            raise ValueError(f"prefix: {name}: expected {expected}, got {value}")
    with torch.no_grad():
        layers = [pair and tuple(_cast(x, dtype).transpose(0, 1) for x in pair) for pair in prefix.layer_kv()]
    frozen = min(prefix.num_frozen_tokens, max(prefix.lengths))
    positions = prefix.positions if shift_positions else 0
    return KVFile(layers, positions, frozen, **prefix.origin._asdict())  # type: ignore[arg-type]


def _check_paths(paths: Sequence[Path], force: bool) -> None:
    """Raise ValueError if a file cannot get its name: a parent is no folder, or something has the name."""
    for path in paths:
        for parent in path.parents:
            if os.path.lexists(parent) and not parent.is_dir():
                raise ValueError(f"folder: expected a folder, or nothing yet, at {parent}, got something else")
        if path.is_dir() or (os.path.lexists(path) and not force):
            raise ValueError(f"{path}: expected no file of this name, or force=True, got one")


def _rows(prompt: SoftPrompt, dtype: torch.dtype | None) -> Tensor:
    rows = _cast(prompt.weight.detach(), dtype).cpu().contiguous()
    check_finite("prompt", rows)
    return rows


def _cast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None and x.dtype not in _DTYPES:
        raise ValueError(f"prefix: expected float32, bfloat16 or float16, or dtype, got {x.dtype}")
    return x.to(dtype or x.dtype)


def _sources(prefix: Source | Sequence[Source]) -> Sequence[Source]:
    several = isinstance(prefix, Sequence) and not isinstance(prefix, str)
    sources: Sequence[Source] = prefix if several else [prefix]  # type: ignore[assignment, list-item]
    if not sources:
        raise ValueError("prefix: expected at least one, got none")
    return sources


def _named(sources: Sequence[Source], name: str | None, dtype: torch.dtype | None) -> dict[str, Module]:
    """Modules by name, each in its own dtype if ``dtype`` is None."""
    named: dict[str, Module] = {}
    for index, source in enumerate(sources):
        if isinstance(source, PrefixKV | SoftPrompt):
            own, module = "prefix" if name is None else name, source
            own = f"{own}-{index}" if len(sources) > 1 else own
        elif isinstance(source, str | os.PathLike):
            own = _name_of(Path(source).resolve()) if name is None or len(sources) > 1 else name
            module, stored = load_with_dtype(source, trainable=False)
            module = module if dtype else module.to(stored)
        else:
            raise ValueError(f"prefix: expected a PrefixKV, SoftPrompt or folder, got {type(source).__name__}")
        if plain_name(own) in named:
            raise ValueError(f"prefix: expected sources of different names, got {own!r} twice")
        named[own] = module
    return named


def _name_of(path: Path) -> str:
    """The name of a folder, of a file without its suffix, or of a cartridge's folder."""
    if path.name == WEIGHTS_NAME:
        return path.parent.name
    return path.stem if path.is_file() else path.name


def _singles(named: Mapping[str, Module]) -> dict[str, Module]:
    """The prefixes, with each bank replaced by its own."""
    singles: dict[str, Module] = {}
    for name, module in named.items():
        rows = _rows_of_bank(module)
        names = [name] if rows[0] is module else [plain_name(f"{name}-{i}") for i in range(len(rows))]
        if twice := set(names) & set(singles):
            raise ValueError(f"prefix: expected sources of different names, got {min(twice)!r} twice")
        singles |= zip(names, rows, strict=True)
    return singles


def _rows_of_bank(module: Module) -> Sequence[Module]:
    """The prefixes of a bank; a single prefix itself."""
    if isinstance(module, PrefixKV):
        return [module] if module.num_prefixes is None else [module.select(i) for i in range(module.num_prefixes)]
    if module.weight.dim() == 2:
        return [module]
    prompts = []
    for weight in module.weight.detach():
        prompts.append(SoftPrompt(None, module.length, embed_dim=module.embed_dim, init=weight, dtype=weight.dtype))
        prompts[-1].origin = module.origin
    return prompts


def _kv(
    prefixes: Mapping[str, PrefixKV], dtype: torch.dtype | None, name: str, shift_positions: bool = True
) -> Files:
    return {f"{own}.safetensors": kv_bytes(kv_of(prefix, dtype, shift_positions)) for own, prefix in prefixes.items()}


def _cartridges(prefixes: Mapping[str, PrefixKV], dtype: torch.dtype | None, name: str) -> Files:
    return {
        f"{own}/{file}": data
        for own, prefix in prefixes.items()
        for file, data in cartridge_bytes(kv_of(prefix, dtype)).items()
    }


def _each(
    files_of: Callable[[Tensor, Origin], Files],
) -> Callable[[Mapping[str, SoftPrompt], torch.dtype | None, str], Files]:
    """A writer of each prompt by itself, from a function that returns its files by their suffixes."""

    def write(prompts: Mapping[str, SoftPrompt], dtype: torch.dtype | None, name: str) -> Files:
        return {
            f"{own}{suffix}": data
            for own, prompt in prompts.items()
            for suffix, data in files_of(_rows(prompt, dtype), prompt.origin).items()
        }

    return write


def _prompt_table(prompts: Mapping[str, SoftPrompt], dtype: torch.dtype | None, name: str) -> Files:
    tables = prompt_table_bytes({own: _rows(prompt, dtype) for own, prompt in prompts.items()})
    return {f"{name}{suffix}": data for suffix, data in tables.items()}


#: For each format, what it is written of, and the function that returns its files.
FORMATS: dict[str, tuple[type, Callable[..., Files]]] = {
    "kv": (PrefixKV, _kv),
    "cartridges": (PrefixKV, _cartridges),
    "prompt-embeds": (SoftPrompt, _each(prompt_embeds_bytes)),
    "tensorrt-llm": (SoftPrompt, _prompt_table),
    "llama.cpp": (SoftPrompt, _each(embd_bytes)),
}
