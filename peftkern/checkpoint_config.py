# SPDX-License-Identifier: Apache-2.0
"""The config of a checkpoint, which may come from anywhere.

Each field is read once, with its type and its range. What a config says about sizes is then compared with the header
of the weights, before a module is built or a tensor is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .integrations.kv_file import MAX_LAYERS
from .layer_shapes import LayerShape, lengths_of
from .model_info import Origin
from .prefix_layout import groups_of, shares_parameter
from .prefix_options import check_options
from .prefix_parts import PARTS, parts_of, positions_of
from .recurrent_state import StateShape, weight_shapes
from .strict_json import shown

__all__ = ["Fields", "PrefixConfig", "PromptConfig", "TensorShape", "check_shape", "geometry_of", "read_origin"]

#: The largest size of a tensor's dimension, and the most dimensions of a state.
_MAX_SIZE, _MAX_DIMS = (1 << 31) - 1, 8

#: dtypes of parameters and of ``prefix_lens``, by their names in safetensors.
_FLOATS, _INTEGERS = ("F64", "F32", "F16", "BF16"), ("I32",)


@dataclass(frozen=True)
class TensorShape:
    """What the header of the weights says about a tensor, or what it should say."""

    shape: list[int]
    dtype: str = "F32"

    @property
    def is_float(self) -> bool:
        """Whether a parameter may have this dtype."""
        return self.dtype in _FLOATS


class Fields:
    """The fields of a config.

    Args:
        values: a JSON object.

    Attributes:
        values: as given.

    Each method returns the value of a field and raises ValueError, naming the field, what was expected and what was
    found. ``default`` stands for a field that is missing or null; without it, the field is required.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def integer(self, name: str, least: int, most: int = _MAX_SIZE, default: int | None = None) -> int:
        """An integer from ``least`` to ``most``."""
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        return self._checked(name, value, least, most)

    def optional(self, name: str, least: int) -> int | None:
        """An integer of at least ``least``, or None."""
        return None if self.values.get(name) is None else self.integer(name, least)

    def per_layer(self, name: str, num_layers: int) -> int | list[int]:
        """An integer, or a list of one for each layer."""
        value = self.values[name]
        if type(value) is not list:
            return self._checked(name, value, 1, _MAX_SIZE)
        return self.integers(name, num_layers)

    def integers(self, name: str, num_layers: int) -> list[int]:
        """A list of one integer for each layer."""
        value = self.values[name]
        if type(value) is not list or len(value) != num_layers or not all(_is_size(n) for n in value):
            raise ValueError(f"{name}: expected a list of {num_layers} ints, one for each layer, got {shown(value)}")
        return value

    def flag(self, name: str) -> bool:
        """True or False; False if it is missing."""
        value = self.values.get(name, False)
        if type(value) is not bool:
            raise ValueError(f"{name}: expected true or false, got {shown(value)}")
        return value

    def text(self, name: str) -> str | None:
        """A string, or None."""
        value = self.values.get(name)
        if value is not None and type(value) is not str:
            raise ValueError(f"{name}: expected a string or null, got {shown(value)}")
        return value

    def parts(self) -> dict[str, int] | None:
        """The number of layers of each part of an encoder-decoder; None if they are missing."""
        value = self.values.get("parts")
        if value is None:
            return None
        if type(value) is not dict or not value or not all(n in PARTS and _is_size(m) for n, m in value.items()):
            raise ValueError(f"parts: expected the number of layers of each of {PARTS}, got {shown(value)}")
        return value

    def state(self) -> list[list[StateShape]] | None:
        """The shapes of the states of each layer; None if they are missing."""
        if "state" not in self.values:
            return None
        value = self.values["state"]
        if type(value) is not list or not all(type(layer) is list for layer in value):
            raise ValueError(f"state: expected a list of states for each layer, got {shown(value)}")
        pairs = [pair for layer in value for pair in layer]
        for pair in pairs:
            if type(pair) is not list or len(pair) != 2 or not all(x is None or _is_shape(x) for x in pair):
                raise ValueError(f"state: expected the shapes of two states, or null for one, got {shown(pair)}")
        if all(shape is None for pair in pairs for shape in pair):
            raise ValueError("state: expected the shape of at least one state, got none")
        return [[(conv, recurrent) for conv, recurrent in layer] for layer in value]

    @staticmethod
    def _checked(name: str, value: Any, least: int, most: int) -> int:
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"{name}: expected an int from {least} to {most}, got {shown(value)}")
        return value


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_SIZE


def _is_shape(value: Any) -> bool:
    return type(value) is list and len(value) <= _MAX_DIMS and all(_is_size(n) and n for n in value)


def geometry_of(fields: Fields) -> dict[str, Any]:
    """The arguments of a prefix that determine its layers, as PEFT's fields and ours describe them.

    PEFT describes layers of one width; ``head_dim`` and others of our own fields describe each layer.
    """
    num_layers = fields.integer("num_layers", 1, MAX_LAYERS)
    num_heads, token_dim = (fields.integer(name, 1) for name in ("num_attention_heads", "token_dim"))
    if token_dim % num_heads:
        raise ValueError(f"token_dim: expected a multiple of {num_heads} heads, got {token_dim}")
    geometry: dict[str, Any] = {
        "num_layers": num_layers,
        "num_kv_heads": num_heads,
        "head_dim": token_dim // num_heads,
    }
    if "head_dim" in fields.values:
        names = ("num_kv_heads", "head_dim", "value_head_dim")
        geometry |= {name: fields.per_layer(name, num_layers) for name in names if name in fields.values}
        parts = fields.parts()
        geometry |= {} if parts is None else {"parts": parts}
    return geometry


@dataclass(frozen=True)
class PrefixConfig:
    """The config of a prefix: the arguments of :class:`PrefixKV`, which fit each other.

    Attributes:
        geometry: ``num_layers``, ``num_kv_heads`` and the others that determine ``parts`` and ``shapes``.
        state: the shapes of the states of recurrent layers; None without.
    """

    geometry: Mapping[str, Any]
    parts: dict[str, range]
    shapes: Sequence[LayerShape | None]
    lengths: Sequence[int]
    num_frozen_tokens: int
    num_prefixes: int | None
    projection: int | None
    peft_seq2seq_layout: bool
    learn_length: bool
    positions: int
    state: list[list[StateShape]] | None

    @classmethod
    def read(cls, fields: Fields, geometry: Mapping[str, Any]) -> PrefixConfig:
        """The config of a prefix whose layers ``geometry`` describes."""
        longest, num_layers = fields.integer("num_virtual_tokens", 0), geometry["num_layers"]
        sizes = (geometry.get(name) for name in ("num_kv_heads", "head_dim", "value_head_dim"))
        parts, shapes = parts_of(None, geometry.get("parts", ("decoder",)), num_layers, *sizes)
        own = "lengths" in fields.values
        lengths = lengths_of(fields.integers("lengths", num_layers) if own else longest, shapes)
        if max(lengths) != longest:
            raise ValueError(f"num_virtual_tokens: expected {max(lengths)}, the longest of lengths, got {longest}")
        config = cls(
            geometry, parts, shapes, lengths,
            num_frozen_tokens=fields.integer("num_frozen_tokens", 0, default=0),
            num_prefixes=fields.optional("num_prefixes", 1),
            projection=fields.optional("projection", 1),
            peft_seq2seq_layout=fields.integer("num_transformer_submodules", 1, default=1) == 2,
            learn_length=fields.flag("learn_length"),
            positions=fields.integer("positions", 0, default=positions_of(parts, lengths)),
            state=fields.state(),
        )  # fmt: skip
        check_options(config, has_state=config.state is not None)
        return config

    @property
    def flat_shape(self) -> list[int] | None:
        """The shape of PEFT's ``prompt_embeddings``; None for a prefix that PEFT cannot represent."""
        if not shares_parameter(self.lengths, self.shapes) or self.num_prefixes is not None or self.learn_length:
            return None
        return [self.lengths[0], groups_of(self.lengths, self.shapes)[0].width]

    def tensors(self) -> dict[str, TensorShape]:
        """The entries of the prefix's ``state_dict``."""
        bank = [] if self.num_prefixes is None else [self.num_prefixes]
        groups = groups_of(self.lengths, self.shapes)
        shapes: dict[str, Sequence[int]] = {}
        for index, group in enumerate(groups):
            frozen = min(group.length, self.num_frozen_tokens)
            if self.num_frozen_tokens:
                shapes[f"frozen.{index}"] = [*bank, frozen, group.width]
            columns = group.width if self.projection is None else self._token_dim
            shapes[f"trainable.{index}"] = [*bank, group.length - frozen, columns]
        if self.projection is not None:
            width = groups[0].width
            shapes |= {
                "transform.0.weight": [self.projection, self._token_dim],
                "transform.0.bias": [self.projection],
            }
            shapes |= {"transform.2.weight": [width, self.projection], "transform.2.bias": [width]}
        if self.learn_length:
            shapes["gate_logits"] = [sum(n - min(n, self.num_frozen_tokens) for n in self.lengths)]
        if self.state is not None:
            shapes |= {f"state.weights.{name}": shape for name, shape in weight_shapes(self.state).items()}
        tensors = {name: TensorShape(list(shape)) for name, shape in shapes.items()}
        return tensors | ({"prefix_lens": TensorShape(bank, "I32")} if bank else {})

    @property
    def _token_dim(self) -> int:
        shapes = [shape for shape in self.shapes if shape]
        return max(shape.num_kv_heads for shape in shapes) * max(shape.head_dim for shape in shapes)


@dataclass(frozen=True)
class PromptConfig:
    """The config of a soft prompt.

    Attributes:
        length: tokens of the prompt.
        embed_dim: width of an embedding.
        num_prompts: of a bank; None without.
        rows: rows of the stored tensor: ``length`` for each transformer of the model, of which PEFT uses the first.
    """

    length: int
    embed_dim: int
    num_prompts: int | None
    rows: int

    @classmethod
    def read(cls, fields: Fields) -> PromptConfig:
        """The config of a prompt, as PEFT's fields and ours describe it."""
        length, embed_dim = fields.integer("num_virtual_tokens", 0), fields.integer("token_dim", 1)
        rows = length * fields.integer("num_transformer_submodules", 1, default=1)
        return cls(length, embed_dim, fields.optional("num_prompts", 1), rows)

    @property
    def flat_shape(self) -> list[int]:
        """The shape of PEFT's ``prompt_embeddings``, with a first dimension for a bank."""
        return [*([] if self.num_prompts is None else [self.num_prompts]), self.rows, self.embed_dim]


def read_origin(fields: Fields) -> Origin:
    """The model and the task that a config names."""
    return Origin(*(fields.text(name) or default for name, default in Origin._field_defaults.items()))


def check_shape(name: str, found: TensorShape, expected: TensorShape) -> None:
    """Raise ValueError unless a tensor of the weights has the expected shape, and a dtype of the expected kind."""
    dtypes = _FLOATS if expected.is_float else _INTEGERS
    if found.shape != expected.shape or found.dtype not in dtypes:
        kind = "floats" if expected.is_float else "integers"
        raise ValueError(
            f"{name}: expected {kind} ({', '.join(dtypes)}) {expected.shape}, got {found.dtype} {shown(found.shape)}"
        )
