# SPDX-License-Identifier: Apache-2.0
"""A model with adapters (LoRA) saves and loads its prefix or prompt together with them.

PEFT saves the tensors of its adapters and nothing else, so the module that :func:`peftkern.patch` adds needs a folder
of its own::

    folder/                     adapter_model.safetensors, adapter_config.json: PEFT's adapter
    folder/peftkern_prefix/     the same two files: the prefix, as peftkern.save_prefix writes it

``Trainer`` takes every such subfolder for an adapter of that name, which it passes to ``load_adapter``.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..checkpoint import load_prefix, save_prefix
from ..checkpoint_files import WEIGHTS_NAME
from ..modules import PrefixKV, SoftPrompt
from .peft_model import PeftMethod, is_peft_model
from .wiring import Patch

__all__ = ["AdapterFolder"]


class AdapterFolder:
    """Replaces ``save_pretrained`` and ``load_adapter`` of a model: they treat its prefix like an adapter.

    Args:
        model: a ``PeftModel``, or a ``transformers`` model, to which ``add_adapter`` may add adapters.
        name: of the submodule, and of the subfolder.
        base: the model that has the submodule.
    """

    def __init__(self, model: nn.Module, name: str, base: nn.Module) -> None:
        self.model = model
        self.name = name
        self.base = base

    @classmethod
    def install(cls, patch: Patch, name: str) -> None:
        """Change every model in the patched one that may save adapters."""
        for model in [patch.base, *filter(is_peft_model, patch.model.modules())]:
            folder = cls(model, name, patch.base)
            PeftMethod(model, "save_pretrained", folder.save).install(patch.wiring)
            PeftMethod(model, "load_adapter", folder.load).install(patch.wiring)

    @property
    def prefix(self) -> Any:
        """The submodule. A module of the user's own is not saved, which a warning says."""
        return getattr(self.base, self.name)

    @property
    def has_adapters(self) -> bool:
        """Whether the model saves adapters. A model without them saves all of its parameters, the prefix included."""
        return is_peft_model(self.model) or getattr(self.model, "_hf_peft_config_loaded", False)

    def save(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``save_pretrained``: save the adapters, then the prefix."""
        if not self.has_adapters:
            return method(*args, **kwargs)
        call = inspect.signature(method).bind(*args, **kwargs)
        more = call.arguments.get("kwargs", {})
        given = more if "state_dict" in more else call.arguments
        values: dict[str, Tensor] = {}
        if (state := given.get("state_dict")) is not None:
            values = {name: x for key, x in state.items() if (name := self._own_name(key)) is not None}
            given["state_dict"] = {key: x for key, x in state.items() if self._own_name(key) is None}
        with self._hidden():
            result = method(*call.args, **call.kwargs)
        if not isinstance(self.prefix, PrefixKV | SoftPrompt):
            warnings.warn(
                f"peftkern: expected a PrefixKV or SoftPrompt, which is saved with the adapters, got "
                f"{type(self.prefix).__name__}, which is not saved",
                stacklevel=3,
            )
        elif call.arguments.get("is_main_process", True):
            save_prefix(_with_values(self.prefix, values), Path(call.arguments["save_directory"]) / self.name)
        return result

    def load(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``load_adapter``: load the values of the prefix, and the adapter.

        Raises:
            ValueError: for a prefix of another shape. Nothing is loaded then.
        """
        call = inspect.signature(method).bind(*args, **kwargs)
        folder, adapter = next(iter(call.arguments.values()), None), call.arguments.get("adapter_name")
        if folder is None:  # transformers takes tensors instead
            return method(*args, **kwargs)
        if adapter == self.name:
            self.prefix.load_state_dict(self._read(Path(folder)))
            return None
        found = self._find(Path(folder, kwargs.get("subfolder") or ""), adapter)
        values = None if found is None else self._read(found)
        result = method(*args, **kwargs)
        if values is not None:
            self.prefix.load_state_dict(values)
        else:
            warnings.warn(f"peftkern: expected {self.name} in {folder}, got none; it keeps its values", stacklevel=3)
        return result

    def _find(self, folder: Path, adapter: str | None) -> Path | None:
        """The prefix beside an adapter. PEFT has adapters that are not called default in subfolders of their own."""
        places = [folder, *([folder.parent] if folder.name == adapter else [])]
        return next((place / self.name for place in places if (place / self.name / WEIGHTS_NAME).is_file()), None)

    def _read(self, folder: Path) -> Mapping[str, Tensor]:
        """The values in a folder, which must be those of a prefix of the same shape."""
        loaded = load_prefix(folder)
        expected, got = ((type(x), x.extra_repr(), _shapes(x)) for x in (self.prefix, loaded))
        if expected != got:
            raise ValueError(f"{folder}: expected the model's {self.prefix}, got {loaded}")
        return loaded.state_dict()

    def _own_name(self, key: str) -> str | None:
        """The name in the prefix of an entry of the model's ``state_dict``; None for entries of other modules."""
        _, found, name = f".{key}".partition(f".{self.name}.")
        return name if found else None

    @contextmanager
    def _hidden(self) -> Iterator[None]:
        """Leave the prefix out of ``state_dict``, from which PEFT takes every bias with ``bias="all"``."""
        hook = self.prefix.register_state_dict_post_hook(_remove_entries)
        try:
            yield
        finally:
            hook.remove()


def _with_values(prefix: PrefixKV | SoftPrompt, values: Mapping[str, Tensor]) -> PrefixKV | SoftPrompt:
    """The prefix, or a copy with the given values, which FSDP has gathered from all processes."""
    if values:
        prefix = copy.deepcopy(prefix)
        prefix.load_state_dict(values, strict=False, assign=True)
    return prefix


def _remove_entries(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        del state[key]


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in module.state_dict().items()}
