# SPDX-License-Identifier: Apache-2.0
"""A :class:`peftkern.PrefixKV` in a plain Hugging Face model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeGuard, cast

import torch
from torch import Tensor, nn

from ...checkpoint import PREFIX_NAME
from ...layer_shapes import LayerShape
from ...recurrent_state import LayerState
from ..adapter_folders import AdapterFolder
from ..cache import KeyValue
from ..calls import running
from ..mixed import PrefixBank
from ..prefix_patch import PrefixPatch
from ..prefix_source import PrefixSource
from ..wiring import Patch

__all__ = ["LayerPrefix", "ModulePrefix", "is_layer_prefix"]


class LayerPrefix(Protocol):
    """The interface of a prefix module, which :class:`peftkern.PrefixKV` implements.

    A module may also have ``layer_bias()``, per layer [P] or None, which attention adds to the scores of its tokens,
    ``positions``, those that it stands for if they are not those of its longest layer, ``has_gaps``, whether tokens
    between others have been removed, and ``state``, whose ``layer_states()`` are the states [1, ...] in which
    recurrent layers start.
    """

    shapes: Sequence[LayerShape | None]
    lengths: Sequence[int]

    def layer_kv(self) -> Sequence[KeyValue | None]:
        """Per layer (prefix_k, prefix_v), [Hkv, P, D] and [Hkv, P, D_v]. Those of length 0 are ignored."""


def is_layer_prefix(value: object) -> TypeGuard[LayerPrefix]:
    """Whether ``value`` is a :class:`LayerPrefix`. From Python 3.12, ``isinstance`` ignores a module's parameters."""
    return all(hasattr(value, name) for name in (*LayerPrefix.__annotations__, "layer_kv"))


@dataclass(eq=False)
class Switch:
    """A block in which another prefix is read."""

    prefix: LayerPrefix


class ModulePrefix(PrefixSource):
    """The prefix is a submodule of the Hugging Face model.

    Callers pass masks, positions and caches of the sequence alone. The hook on the backbone adds the prefix to them.

    Args:
        prefix: the module.
        shift_positions: the sequence's positions start after the longest prefix. False: they start at 0.
        freeze: clear ``requires_grad`` of the model's own parameters while it is patched.
    """

    is_given = False
    needs_cache = False

    def __init__(self, prefix: LayerPrefix, *, shift_positions: bool, freeze: bool) -> None:
        self.prefix = self._own = prefix
        self._switches: list[Switch] = []
        self.shift_positions = shift_positions
        self.freeze = freeze
        #: What the model has been tried with.
        self._takes_bank, self._takes_offset = self.has_bank, False
        #: The layers of each part.
        self._layers: Mapping[str, range] = getattr(prefix, "parts", {"decoder": range(len(prefix.shapes))})
        self._takes_offset = self.offset > 0

    def enter(self, patch: PrefixPatch, prefix: LayerPrefix) -> Switch:
        """Read ``prefix`` from now on, in place of the present prefix.

        Returns:
            What :meth:`leave` undoes. Switches may be undone in any order: the last one that is left counts.

        Raises:
            ValueError: for a prefix that the patched model has not been tried with.
        """
        self._switch(patch, prefix)
        self._switches.append(Switch(prefix))
        return self._switches[-1]

    def leave(self, switch: Switch, patch: PrefixPatch | None) -> None:
        """Undo a switch. ``patch`` is None if the model is no longer patched."""
        self._switches = [other for other in self._switches if other is not switch]
        prefix = self._switches[-1].prefix if self._switches else self._own
        if patch is not None and prefix is not self.prefix:
            self._switch(patch, prefix)

    def _switch(self, patch: PrefixPatch, prefix: LayerPrefix) -> None:
        other = ModulePrefix(prefix, shift_positions=self.shift_positions, freeze=self.freeze)
        lacks = (other.has_bank and not self._takes_bank, other.offset and not self._takes_offset)
        needs = next((need for need, missing in zip(("a bank", "tokens"), lacks, strict=True) if missing), None)
        if needs is None:
            mine, its = ((x.parts, x.has_bias, x.has_gaps, _has_state(x.prefix)) for x in (self, other))
            names = ("parts", "gates", "gaps", "states")
            needs = next((f"other {n}" for n, a, b in zip(names, mine, its, strict=True) if a != b), None)
        if needs is not None:
            raise ValueError(
                f"prefix: expected one of the kind that the model was patched with, got one with {needs}; "
                "unpatch the model, and patch it with this one"
            )
        other.check(patch)
        self.prefix, self._layers = prefix, other._layers
        patch.base.add_module(PREFIX_NAME, cast(nn.Module, prefix))

    @property
    def offset(self) -> int:
        """Positions that the model counts for the prefix."""
        positions: int = getattr(self.prefix, "positions", max(self.prefix.lengths, default=0))
        return positions if self.shift_positions and "decoder" in self._layers else 0

    @property
    def parts(self) -> Sequence[str]:
        """The parts of an encoder-decoder that have a prefix."""
        return tuple(self._layers)

    @property
    def has_bias(self) -> bool:
        """Whether some layer's tokens have a bias."""
        return any(bias is not None for bias in _biases(self.prefix))

    @property
    def has_gaps(self) -> bool:
        """Whether tokens may have been removed between others."""
        return bool(getattr(self.prefix, "has_gaps", False))

    @property
    def has_bank(self) -> bool:
        """Whether the module is a bank."""
        return getattr(self.prefix, "num_prefixes", None) is not None

    def bank_of(self, patch: PrefixPatch, prefix_ids: Any, batch: int) -> PrefixBank | None:
        """The prefixes that ``prefix_ids`` [B] or [B, K] selects."""
        if not self.has_bank:
            if prefix_ids is not None:
                raise ValueError("prefix_ids: expected None, because the prefix is not a bank, got ids")
            return None
        prefix: Any = self._running(patch)
        ids = _checked_ids(prefix_ids, batch, prefix.num_prefixes).to(prefix.prefix_lens.device)
        lens = prefix.prefix_lens
        return PrefixBank(self.layer_kv(patch), ids, lens, lens if self.shift_positions else torch.zeros_like(lens))

    def check(self, patch: PrefixPatch) -> None:
        """Raise ValueError unless the prefix fits the model: its shape, and its gaps the sliding windows."""
        for part, layers in self._layers.items():
            name = "prefix" if part == "decoder" else f"prefix ({part})"
            patch.check_geometry(name, self.prefix.shapes[layers.start : layers.stop], part=part)
        if not self.has_gaps or not patch.options.in_window:
            return
        for info in patch.prefix_layers.values():
            if info.pattern is None or info.pattern[1] is not None:
                raise ValueError(
                    f"prefix_in_window: expected False, because the mask of {info.name} may hide prefix tokens by "
                    "their positions, of which pruning has removed some, got True"
                )

    def wire(self, patch: Patch) -> None:
        """Make the prefix a submodule of the Hugging Face model, so that it stays when wrappers are removed."""
        if self.freeze:
            patch.wiring.freeze(patch.model.parameters())
        patch.wiring.add_submodule(patch.base, PREFIX_NAME, cast(nn.Module, self.prefix))
        AdapterFolder.install(patch, PREFIX_NAME)
        if self.has_bank and hasattr(patch.base, "prepare_inputs_for_generation"):
            inputs = InputsWithIds(patch.base)
            patch.wiring.set_attribute(patch.base, "prepare_inputs_for_generation", inputs)

    def layer_states(self, patch: PrefixPatch) -> Sequence[Sequence[LayerState]]:
        """The module's states of recurrent layers."""
        prefix = getattr(running.module(patch, patch.base), PREFIX_NAME, self.prefix)
        state = getattr(prefix, "state", None)
        return () if state is None else state.layer_states()

    def layer_kv(self, patch: PrefixPatch, part: str = "decoder") -> Sequence[KeyValue | None]:
        """Per layer of a part (prefix_k, prefix_v); None for a layer of length 0."""
        if part not in self._layers:
            return [None] * patch.num_layers
        kv, lengths = self._running(patch).layer_kv(), self.prefix.lengths
        return [kv[layer] if lengths[layer] else None for layer in self._layers[part]]

    def layer_bias(self, patch: PrefixPatch) -> Sequence[Tensor | None]:
        """Per layer of the decoder [P], added to the scores of the prefix tokens, or None; empty if none has one."""
        biases = _biases(self._running(patch))
        return [biases[layer] for layer in self._layers.get("decoder", ())] if biases else ()

    def _running(self, patch: PrefixPatch) -> Any:
        """The prefix of the module that runs, which may be a replica with its own copy."""
        return getattr(running.module(patch, patch.base), PREFIX_NAME)


class InputsWithIds:
    """A model's ``prepare_inputs_for_generation`` that passes ``prefix_ids`` on to the model.

    ``generate`` accepts the arguments that this method names, and repeats tensors among them for beams.

    Args:
        model: with a bank of prefixes.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.previous = model.__dict__.get("prepare_inputs_for_generation")
        signature = inspect.signature(model.prepare_inputs_for_generation)
        ids = inspect.Parameter("prefix_ids", inspect.Parameter.KEYWORD_ONLY, default=None)
        *named, last = signature.parameters.values()
        others = [last, ids] if last.kind is not last.VAR_KEYWORD else [ids, last]
        self.__signature__ = signature.replace(parameters=[*named, *others])

    def __call__(self, *args: Any, prefix_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """The inputs of the next step."""
        prepare = self.previous or partial(type(self.model).prepare_inputs_for_generation, self.model)
        inputs = prepare(*args, **kwargs)
        return inputs if prefix_ids is None else {**inputs, "prefix_ids": prefix_ids}


def _checked_ids(ids: Any, batch: int, num_prefixes: int) -> Tensor:
    """``prefix_ids`` as int32, if they select prefixes of the bank for each sample."""
    expected = (
        f"the prefix of each sample [{batch}], or [{batch}, K] several, of 0 to {num_prefixes - 1}, -1 for none"
    )
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dim() not in (1, 2) or ids.shape[0] != batch:
        got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else f"{type(ids).__name__}"
        raise ValueError(f"prefix_ids: expected {expected}, got {got}")
    readable = ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling()
    if readable and not -1 <= int(ids.min()) <= int(ids.max()) < num_prefixes:
        raise ValueError(f"prefix_ids: expected {expected}, got {int(ids.min())} to {int(ids.max())}")
    return ids.to(torch.int32)


def _has_state(prefix: Any) -> bool:
    return getattr(prefix, "state", None) is not None


def _biases(prefix: Any) -> Sequence[Tensor | None]:
    return prefix.layer_bias() if hasattr(prefix, "layer_bias") else ()
