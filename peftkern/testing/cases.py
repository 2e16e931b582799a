# SPDX-License-Identifier: Apache-2.0
"""Inputs of prefix attention: shapes, every feature alone, and random combinations of features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")


@dataclass(frozen=True)
class Shape:
    """The sizes of one call.

    Attributes:
        B: batch size.
        Hq: query heads, a multiple of Hkv.
        Hkv: key and value heads.
        S: queries.
        P: tokens of the prefix.
        D: elements of a head of q and k.
        T: keys of the sequence; None for S keys, more than S for a KV cache.
        A: prefixes in a bank; None for one prefix that the batch shares.
        Dv: elements of a head of v; None for D.
    """

    B: int = 2
    Hq: int = 4
    Hkv: int = 2
    S: int = 7
    P: int = 5
    D: int = 8
    T: int | None = None
    A: int | None = None
    Dv: int | None = None

    @property
    def value_dim(self) -> int:
        """Dv, or D if Dv is None."""
        return self.D if self.Dv is None else self.Dv

    @property
    def kv_len(self) -> int:
        """T, or S if T is None."""
        return self.S if self.T is None else self.T

    def __str__(self) -> str:
        return "-".join(f"{name}{n}" for name, n in vars(self).items() if n is not None)


#: Sizes that leave a remainder in every vector, tile and group, with few and many rows, tokens, heads and columns.
ODD = [
    Shape(B=1, Hq=1, Hkv=1, S=9, P=3, D=1), Shape(B=1, Hq=2, Hkv=2, S=1, P=1, D=3),
    Shape(B=1, Hq=2, Hkv=1, S=65, P=49, D=64), Shape(B=2, Hq=3, Hkv=3, S=97, P=48, D=33),
    Shape(B=1, Hq=9, Hkv=3, S=31, P=20, D=64), Shape(B=1, Hq=5, Hkv=1, S=128, P=96, D=80),
    Shape(B=1, Hq=1, Hkv=1, S=64, P=47, D=128), Shape(B=1, Hq=2, Hkv=2, S=50, P=3, D=256),
    Shape(B=1, Hq=80, Hkv=1, S=3, P=9, D=16), Shape(B=1, Hq=4, Hkv=2, S=2, P=130, D=48, T=201),
    Shape(B=5, Hq=8, Hkv=2, S=1, P=1, D=64), Shape(B=3, Hq=8, Hkv=1, S=17, P=130, D=64),
    Shape(B=1, Hq=4, Hkv=4, S=63, P=7, D=96), Shape(B=1, Hq=2, Hkv=2, S=131, P=0, D=64),
    Shape(B=2, Hq=6, Hkv=2, S=33, P=65, D=128), Shape(B=2, Hq=4, Hkv=2, S=3, P=70, D=80),
    Shape(B=1, Hq=4, Hkv=2, S=333, P=5, D=64),
]  # fmt: skip
#: Shapes without samples, queries, prefix tokens or keys.
EMPTY = [Shape(B=0), Shape(S=0), Shape(S=0, T=4), Shape(P=0), Shape(S=0, P=0, T=0), Shape(B=0, P=0), Shape(S=3, T=0)]


def tensors(
    shape: Shape, dtype: torch.dtype = torch.float64, prefix_dtype: torch.dtype | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Standard normal q, k, v, prefix_k and prefix_v by name, on the CPU.

    They are slices of larger tensors with different strides, so that a kernel which assumes contiguous memory fails.

    Args:
        shape: sizes of the call.
        dtype: dtype of q, k and v.
        prefix_dtype: dtype of prefix_k and prefix_v; default ``dtype``.
        seed: seed of the random numbers.

    Returns:
        q [B, Hq, S, D], k [B, Hkv, T, D] and prefix_k [Hkv, P, D] ([A, Hkv, P, D] for a bank). v and prefix_v have
        Dv instead of D.

    >>> {name: list(x.shape) for name, x in tensors(Shape(S=3, P=2, D=4)).items() if name in ("q", "prefix_k")}
    {'q': [2, 4, 3, 4], 'prefix_k': [2, 2, 4]}
    """
    generator = torch.Generator().manual_seed(seed)

    def cut(*sizes: int, dtype: torch.dtype, order: tuple[int, ...]) -> Tensor:
        memory = [sizes[i] for i in order]
        memory[-1] += 8
        memory[-2] += 1
        inverse = [order.index(i) for i in range(len(order))]
        x = torch.randn(memory, generator=generator, dtype=torch.float64).to(dtype).permute(inverse)
        return x[tuple(slice(0, n) for n in sizes)]

    prefix_dtype = prefix_dtype or dtype
    kv = (shape.B, shape.Hkv, shape.kv_len)
    prefix: tuple[int, ...] = (shape.Hkv, shape.P)
    order: tuple[int, ...] = (1, 0, 2)
    if shape.A is not None:
        prefix, order = (shape.A, *prefix), (0, 2, 1, 3)
    return {
        "q": cut(shape.B, shape.Hq, shape.S, shape.D, dtype=dtype, order=(0, 2, 1, 3)),
        "k": cut(*kv, shape.D, dtype=dtype, order=(0, 2, 1, 3)),
        "v": cut(*kv, shape.value_dim, dtype=dtype, order=(0, 1, 2, 3)),
        "prefix_k": cut(*prefix, shape.D, dtype=prefix_dtype, order=order),
        "prefix_v": cut(*prefix, shape.value_dim, dtype=prefix_dtype, order=order),
    }


def _key_mask(s: Shape, g: torch.Generator) -> Tensor:
    """Left padding in the first sample, right padding in the last, a hidden key in the middle one."""
    mask = torch.ones(s.B, s.kv_len, dtype=torch.bool)
    if s.B and s.kv_len > 2:
        mask[0, : s.kv_len // 3] = False
        mask[-1, -(s.kv_len // 4) :] = False
        mask[s.B // 2, s.kv_len // 2] = False
    return mask


def _cu_seqlens(s: Shape, g: torch.Generator) -> Tensor:
    """Three sequences, one of them empty."""
    return torch.tensor([0, s.S // 3, s.S // 3, s.S], dtype=torch.int32)


def _prefix_ids(s: Shape, g: torch.Generator) -> Tensor:
    """Each prefix of the bank in turn, and none for the last sample."""
    ids = torch.arange(s.B) % (s.A or 1)
    if s.B > 1:
        ids[-1] = -1
    return ids


def _shared_rows(s: Shape, lens: list[int], starts: list[int], ids: list[list[int]]) -> dict[str, Any]:
    """Three packed sequences with prefixes of a bank, of which ``lens`` are the first, and with rows of the first.

    ``starts`` are offsets from which on the rows of the first sequence are a prefix.
    """
    first = s.S // 3
    starts = [min(start, first) for start in starts]
    return {
        "cu_seqlens": _cu_seqlens(s, torch.Generator()), "prefix_ids": torch.tensor(ids),
        "prefix_lens": torch.tensor([*lens, *(first - start for start in starts)]),
        "prefix_starts": torch.tensor(starts),
    }  # fmt: skip


class Feature(NamedTuple):
    """How a feature is turned on."""

    #: The keyword arguments of the call, for its shape and a generator of random numbers.
    options: Callable[[Shape, torch.Generator], dict[str, Any]] = lambda s, g: {}
    #: The sizes that the feature needs, for a given shape.
    sizes: Callable[[Shape], dict[str, int]] = lambda s: {}


#: Every feature of :func:`peftkern.prefix_attention` by name; :func:`feature` turns one on.
FEATURES: dict[str, Feature] = {
    "plain": Feature(),
    "non_causal": Feature(lambda s, g: {"causal": False}),
    "scale": Feature(lambda s, g: {"scale": 0.37}),
    "narrow_values": Feature(sizes=lambda s: {"Dv": max(1, 2 * s.D // 3)}),
    "wide_values": Feature(sizes=lambda s: {"Dv": s.D + s.D // 2 + 1}),
    "kv_cache": Feature(sizes=lambda s: {"T": max(11, s.S + 2)}),
    "key_mask": Feature(lambda s, g: {"key_mask": _key_mask(s, g)}),
    "window": Feature(lambda s, g: {"window": 4}),
    "window_after_prefix": Feature(lambda s, g: {"window": 3, "prefix_in_window": False}),
    "softcap": Feature(lambda s, g: {"softcap": 1.5}),
    "sinks": Feature(lambda s, g: {"sinks": torch.randn(s.Hq, generator=g)}),
    "bias": Feature(lambda s, g: {"bias": torch.randn(1, s.Hq, s.S, s.kv_len, generator=g)}),
    "bias_row": Feature(lambda s, g: {"bias": torch.randn(s.B, 1, 1, s.kv_len, generator=g)}),
    "prefix_bias": Feature(lambda s, g: {"prefix_bias": torch.randn(s.Hq, s.P, generator=g)}),
    "gate": Feature(lambda s, g: {"gate": torch.randn(s.Hq, generator=g)}),
    "dropout": Feature(lambda s, g: {"dropout_p": 0.3, "dropout_seed": 2**40 + 12345}),
    "packed": Feature(lambda s, g: {"cu_seqlens": _cu_seqlens(s, g)}, lambda s: {"B": 1}),
    "bank": Feature(lambda s, g: {"prefix_ids": _prefix_ids(s, g)}, lambda s: {"A": 3}),
    "ragged_bank": Feature(
        lambda s, g: {"prefix_ids": _prefix_ids(s, g), "prefix_lens": torch.tensor([s.P, 0, max(0, s.P - 2)])},
        lambda s: {"A": 3},
    ),
    "packed_window": Feature(lambda s, g: {"cu_seqlens": _cu_seqlens(s, g), "window": s.P + 4}, lambda s: {"B": 1}),
    "packed_bank": Feature(
        lambda s, g: {"cu_seqlens": _cu_seqlens(s, g), "prefix_ids": torch.tensor([1, 0, -1], dtype=torch.int32)},
        lambda s: {"B": 1, "A": 2},
    ),
    "packed_prompt": Feature(
        lambda s, g: {
            "cu_seqlens": _cu_seqlens(s, g), "prefix_ids": torch.tensor([-1, 0, 0]), "max_seqlen": s.S,
            "prefix_start": s.S // 3,
        },
        lambda s: {"B": 1, "A": 1},
    ),
    "several_prefixes": Feature(
        lambda s, g: {"prefix_ids": torch.stack([_prefix_ids(s, g), -torch.ones(s.B).long(), _prefix_ids(s, g)], 1)},
        lambda s: {"A": 3},
    ),
    "packed_several": Feature(
        lambda s, g: {
            "cu_seqlens": _cu_seqlens(s, g), "prefix_ids": torch.tensor([[1, 0], [0, -1], [0, 1]], dtype=torch.int32),
            "prefix_lens": torch.tensor([s.P, max(0, s.P - 2)], dtype=torch.int32), "max_prefix_len": 2 * s.P,
        },
        lambda s: {"B": 1, "A": 2},
    ),
    "packed_shared": Feature(
        lambda s, g: _shared_rows(s, [s.P], [0], [[0, -1], [0, -1], [0, 1]]), lambda s: {"B": 1, "A": 1}
    ),
    "packed_shared_window": Feature(
        lambda s, g: {**_shared_rows(s, [], [0, 1], [[-1, -1], [0, -1], [1, 0]]), "window": s.S // 3 + 3},
        lambda s: {"B": 1, "A": 0},
    ),
}  # fmt: skip


def feature(name: str, shape: Shape, seed: int = 0) -> tuple[Shape, dict[str, Any]]:
    """Turn on one feature.

    Args:
        name: a key of :data:`FEATURES`.
        shape: sizes of the call.
        seed: seed of random biases, sinks and gates.

    Returns:
        (``shape`` with the sizes that the feature needs, keyword arguments of :func:`peftkern.prefix_attention`).

    >>> feature("window", Shape())[1]
    {'window': 4}
    >>> sorted(FEATURES)[:4]
    ['bank', 'bias', 'bias_row', 'dropout']
    """
    shape = replace(shape, **FEATURES[name].sizes(shape))
    return shape, FEATURES[name].options(shape, torch.Generator().manual_seed(seed))


def _chains(s: Shape, options: dict[str, Any], g: torch.Generator) -> dict[str, Any]:
    """Up to three prefixes per sequence of a call with a bank, some of them in k and v if the call allows it."""
    num_prefixes, changes = s.A or 0, {}
    if "cu_seqlens" in options and options.get("prefix_in_window", True):
        starts = torch.randint(0, s.S + 1, (2,), generator=g)
        lens = torch.cat([torch.randint(0, s.P + 1, (num_prefixes,), generator=g), (s.S - starts) // 2])
        num_prefixes, changes = num_prefixes + 2, {"prefix_starts": starts, "prefix_lens": lens}
    changes["prefix_ids"] = torch.randint(-1, num_prefixes, (len(options["prefix_ids"]), 3), generator=g)
    return changes


def combination(seed: int) -> tuple[Shape, dict[str, Any]]:
    """A random small shape with a random set of compatible features.

    Returns:
        (shape, keyword arguments of :func:`peftkern.prefix_attention`), reproducible for a ``seed``.
    """
    g = torch.Generator().manual_seed(seed)

    def pick(*choices: _T) -> _T:
        return choices[int(torch.randint(len(choices), (), generator=g))]

    sequences = pick("batch", "packed", "kv_cache")
    Hkv, group = pick(1, 2, 3), pick(1, 2, 4)
    S = pick(1, 5, 9, 17)
    shape = Shape(
        B=1 if sequences == "packed" else pick(1, 2, 3), Hq=Hkv * group, Hkv=Hkv, S=S, P=pick(0, 1, 5, 7),
        D=pick(4, 8, 20), T=S + pick(1, 6) if sequences == "kv_cache" else None, A=pick(None, None, 2, 3),
    )  # fmt: skip
    options: dict[str, Any] = {"causal": pick(True, True, False)}
    names = ("scale", "window", "window_after_prefix", "softcap", "sinks", "bias", "bias_row", "prefix_bias", "gate",
             "dropout", "key_mask")  # fmt: skip
    for name in names:
        if pick(True, False, False):
            options.update(FEATURES[name].options(shape, g))
    if sequences == "packed":
        options["cu_seqlens"] = _cu_seqlens(shape, g)
    if shape.A is not None:
        count = 3 if sequences == "packed" else shape.B
        options["prefix_ids"] = torch.randint(-1, shape.A, (count,), generator=g)
        if pick(True, False):
            options["prefix_lens"] = torch.randint(0, shape.P + 1, (shape.A,), generator=g)
        if "prefix_bias" not in options and pick(True, False):
            options.update(_chains(shape, options, g))
    if pick(True, False, False):
        shape = replace(shape, Dv=pick(2, 8, 13, 24))
    return shape, options
