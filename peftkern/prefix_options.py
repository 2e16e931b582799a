# SPDX-License-Identifier: Apache-2.0
"""Checks the arguments of a prefix against each other."""

from __future__ import annotations

from typing import Any

from .prefix_layout import shares_parameter
from .prefix_parts import check_parts, positions_of

__all__ = ["check_options"]


def check_options(prefix: Any, *, has_state: bool) -> None:
    """Raise ValueError for arguments that do not fit each other.

    Args:
        prefix: a :class:`.prefix_kv.PrefixKV` without its parameters.
        has_state: whether it will have states of recurrent layers.
    """
    longest = max(prefix.lengths)
    check_parts(prefix.parts, num_prefixes=prefix.num_prefixes, peft_seq2seq_layout=prefix.peft_seq2seq_layout)
    check_parts(prefix.parts, learn_length=prefix.learn_length)
    if prefix.num_prefixes is not None and prefix.num_prefixes < 1:
        raise ValueError(f"num_prefixes: expected None or at least 1, got {prefix.num_prefixes}")
    if not 0 <= prefix.num_frozen_tokens <= longest:
        raise ValueError(f"num_frozen_tokens: expected 0 to length = {longest}, got {prefix.num_frozen_tokens}")
    if prefix.positions < (taken := positions_of(prefix.parts, prefix.lengths)):
        raise ValueError(f"positions: expected None or at least length = {taken}, got {prefix.positions}")
    if prefix.projection is not None and prefix.projection < 1:
        raise ValueError(f"projection: expected None or a hidden size of at least 1, got {prefix.projection}")
    if prefix.learn_length and prefix.peft_seq2seq_layout:
        raise ValueError("learn_length: expected False with peft_seq2seq_layout, whose layers share tokens, got True")
    for argument in ("projection", "peft_seq2seq_layout"):
        if not getattr(prefix, argument) or shares_parameter(prefix.lengths, prefix.shapes):
            continue
        if len(set(prefix.lengths)) > 1 and all(prefix.shapes):
            raise ValueError(f"{argument}: expected one length for all layers, got lengths {list(prefix.lengths)}")
        raise ValueError(
            f"{argument}: expected keys and values of the same width in every layer, got layers of {prefix.shapes}"
        )
    if prefix.num_prefixes is not None and prefix.positions != longest:
        raise ValueError(f"positions: expected None in a bank, whose prefixes take their own, got {prefix.positions}")
    if prefix.num_prefixes is not None and has_state:
        raise ValueError(f"num_prefixes: expected None with state=True, got {prefix.num_prefixes}")
    if prefix.num_prefixes is not None:
        names = ("projection", "peft_seq2seq_layout", "learn_length")
        given = [name for name in names if getattr(prefix, name)]
        lengths = {n for n, shape in zip(prefix.lengths, prefix.shapes, strict=True) if shape is not None}
        if given or len(lengths) > 1:
            got = f"{given[0]}={getattr(prefix, given[0])}" if given else f"lengths {list(prefix.lengths)}"
            raise ValueError(f"num_prefixes: expected None, or prefixes of one length for all layers, got {got}")
