# SPDX-License-Identifier: Apache-2.0
"""Faults to plant in the Triton kernels. Each one edits the line that a comment ``# FAULT: <id>`` marks.

The comment ends the line, or stands alone on the line above; it may name several ids, separated by commas. So a fault
stays where it is when the code around it changes, and it fails with a message when its line does.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from peftkern.backends.triton import kernels

_MARKER = re.compile(r"# FAULT: ([\w, -]+)$")


class Fault(NamedTuple):
    """In the marked line, ``text`` becomes ``slip``; a call with the feature ``case`` on ``backend`` shows it."""

    id: str
    text: str
    slip: str
    case: str
    backend: str = "triton"

    def __str__(self) -> str:
        return f"{self.id}-{self.backend}"


FAULTS = [
    Fault("key-range-end", "last_row + offset + 1)", "last_row + offset)", "plain"),
    Fault("key-range-full-end", "first_row + offset + 1)", "first_row + offset + BLOCK_N)", "plain"),
    Fault("first-row-that-sees", "rows >= lower", "rows > lower", "plain"),
    Fault("causal-upper", "(offset + 1)", "offset", "plain"),
    Fault("window-lower", "+ 1 - opts.window", "- opts.window", "window_after_prefix"),
    Fault("window-farthest-row", "(opts.window - offset)", "opts.window + 1", "window_after_prefix"),
    Fault("prefix-window", "length + positions - tokens <", "positions - tokens <", "window"),
    Fault("prefix-length", "tokens < length", "tokens < length + 1", "plain"),
    Fault("tile-length", "< length", "<= length", "plain"),
    Fault("row-range-start", "first_key - offset)", "last_key - offset + BLOCK_M)", "plain"),
    Fault("sequence-search", "<= index", "< index", "packed"),
    Fault("dropout-words", "tl.interleave(w1, w3)", "tl.interleave(w3, w1)", "dropout"),
    Fault("softmax-decay", "acc * decay[:, None]", "acc", "plain"),
    Fault("softmax-unit", "scores * unit", "scores", "plain"),
    Fault("merge-decay", "denom * decay + ", "denom + ", "sinks"),
    Fault("dkv-delta", "neg_delta[None, :]", "0.0 * neg_delta[None, :]", "plain"),
    Fault("partials-first-split", "range(num_splits)", "range(1, num_splits)", "plain"),
    Fault("prefix-last-row-block", "minimum(num_row_blocks,", "minimum(num_row_blocks - 1,", "plain"),
    Fault("out-columns", "VALUE_DIM", "HEAD_DIM", "narrow_values"),
    Fault("value-columns", "VALUE_DIM", "HEAD_DIM", "wide_values"),
    Fault("prefix-value-rows", "VALUE_DIM", "HEAD_DIM", "narrow_values"),
]

#: Faults that show in the backends that put these kernels beside another library's.
FAULTS_BESIDE_OTHERS = [
    Fault("tile-head", "% sizes.group", "% (sizes.group + 1)", "plain", "merge"),
    Fault("tile-row-block", "index % row_blocks", "index % (row_blocks + 1)", "plain", "merge"),
    Fault("row-value-stride", " * x.stride_m", "", "lse_by_strides", "merge"),
    Fault("row-value-head-stride", "x.stride_h", "x.stride_b", "plain", "merge"),
    Fault("merge-last-tile", "tiles, workers", "tiles - 1, workers", "plain", "merge"),
    Fault("merge-first-tile", "range(worker,", "range(0,", "plain", "merge"),
    Fault("merge-mask", "True", "False", "plain", "merge"),
    Fault("merge-decay", "denom * decay + ", "denom + ", "plain", "merge"),
    Fault("merge-values", " * weight[:, None]", "", "plain", "merge"),
    Fault("merge-base", "LOG2E", "LN2", "plain", "merge"),
    Fault("merge-weight", " + weight", "", "sinks", "merge"),
    Fault("merge-store-mask", "mask=inside)", "mask=inside & (rows > 0))", "plain", "merge"),
    Fault("merge-hidden-row", "> 0.0", "> -1.0", "nothing_visible", "merge"),
    Fault("merge-bwd-last-tile", "tl.minimum(tiles,", "tl.minimum(tiles - 1,", "plain", "merge"),
    Fault("merge-bwd-first-tile", "split * tiles_per_split", "split * tiles_per_split + 1", "plain", "merge"),
    Fault("merge-bwd-delta", "dp + neg_delta[:, None]", "dp", "plain", "merge"),
    Fault("merge-bwd-part-dq", "total += ", "", "plain", "merge"),
    Fault("merge-bwd-scale", "dk * scale", "dk", "plain", "merge"),
    Fault("merge-bwd-value-rows", "VALUE_DIM", "HEAD_DIM", "narrow_values", "merge"),
    Fault("out-columns", "VALUE_DIM", "HEAD_DIM", "wide_values", "merge"),
    Fault("query-tile-stride", "x.stride_n", "x.stride_h", "plain", "merge"),
    Fault("dq-part", "acc += ", "", "bank", "merge"),
    Fault("concat-first-row", "sizes.prefix_len + tl", "sizes.prefix_len + 1 + tl", "plain", "concat"),
    Fault("concat-last-row", "rows < sizes.kv_len", "rows < sizes.kv_len + 1", "plain", "concat"),
    Fault("concat-prefix-length", "tl.where(prefix < 0, 0, sizes.prefix_len)", "sizes.prefix_len - 1", "plain",
          "concat"),
    Fault("concat-value-columns", "VALUE_DIM", "HEAD_DIM", "wide_values", "concat"),
    Fault("concat-bwd-first-sample", "range(entries)", "range(1, entries)", "plain", "concat"),
    Fault("concat-bwd-prefix", "== prefix:", "<= prefix:", "bank", "concat"),
    Fault("concat-bwd-head", " * num_kv_heads + kv_head", " * num_kv_heads", "heads", "concat"),
]  # fmt: skip

#: Faults that direct calls of the kernels for packed concatenation show.
FAULTS_OF_PACKED = [
    Fault("packed-first-key", "keys >= tl", "keys > tl", "ragged bank", "concat"),
    Fault("packed-prefix-rows", "- keys", "", "ragged bank", "concat"),
    Fault("packed-split-row", "keys + shift", "keys + 1 + shift", "ragged bank", "concat"),
]


def marked_lines(source: str) -> dict[str, int]:
    """The number of the line, from 0, that each id in ``source`` marks."""
    found: dict[str, int] = {}
    for number, line in enumerate(source.splitlines()):
        if match := _MARKER.search(line):
            alone = line.strip() == match[0]
            for name in match[1].split(", "):
                assert name not in found, f"two lines are marked '# FAULT: {name}'"
                found[name] = number + alone
    return found


def functions() -> Iterator[tuple[Any, str]]:
    """Each function of Triton's in the kernels' modules, and its source."""
    for module in pkgutil.iter_modules(kernels.__path__):
        name = f"{kernels.__name__}.{module.name}"
        for function in vars(importlib.import_module(name)).values():
            python = getattr(function, "fn", None)
            if getattr(python, "__module__", None) == name:
                yield function, inspect.getsource(python)


def function_of(fault: Fault) -> Any:
    """The function of Triton's that holds a fault's line."""
    found = [function for function, source in functions() if fault.id in marked_lines(source)]
    assert len(found) == 1, f"{len(found)} lines of the kernels are marked '# FAULT: {fault.id}', not 1"
    return found[0]


def planted_in(source: str, fault: Fault) -> str:
    """``source``, the one of :func:`function_of`, with the fault."""
    lines = source.splitlines(keepends=True)
    number = marked_lines(source)[fault.id]
    code, hash_sign, comment = lines[number].partition("#")
    count = code.count(fault.text)
    assert count == 1, f"the line marked '# FAULT: {fault.id}' holds {fault.text!r} {count} times, not once: {code}"
    lines[number] = code.replace(fault.text, fault.slip) + hash_sign + comment
    return "".join(lines)


def plant(monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    """Have the interpreter run the kernels with a fault, until the end of the test."""
    function = function_of(fault)
    rewriter = function.rewriter
    lines = inspect.getsourcelines(function.fn)[0]
    rewriter.def_lineno = rewriter._find_def(lines)
    source = planted_in(rewriter._prepare_source(lines), fault)
    monkeypatch.setattr(rewriter, "_prepare_source", lambda lines: source)
    monkeypatch.setattr(function, "rewritten_fn", {})
