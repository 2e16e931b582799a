# SPDX-License-Identifier: Apache-2.0
"""Plants faults in a launch's PTX, its arguments, or Triton's source, and checks that the emulator reports them."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
from collections.abc import Iterable, Iterator

import torch
from triton.runtime.jit import JITFunction

from ..triton_faults import Fault, function_of, planted_in
from .launch import Launch
from .machine import Violation

BARRIER = r"bar\.sync\s+\d+[^;]*;"
WAIT = r"cp\.async\.wait_group\s+\d+\s*;"
GUARD = r"@!?%p\d+(?=\s+(?:ld|st)\.global)"
COPY_SIZE = r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], 0x[0-9a-f]+(?P<size>, %r\d+);"


def without(ptx: str, spans: Iterable[tuple[int, int]]) -> str:
    """The text with these spans blanked."""
    characters = list(ptx)
    for start, end in spans:
        characters[start:end] = " " * (end - start)
    return "".join(characters)


def spans_of(ptx: str, pattern: str) -> list[tuple[int, int]]:
    """The spans where ``pattern``, or its group ``size``, matches."""
    return [match.span("size" if "size" in match.groupdict() else 0) for match in re.finditer(pattern, ptx)]


def line_of(ptx: str, span: tuple[int, int]) -> int:
    return ptx.count("\n", 0, span[0]) + 1


class Replay:
    """Runs a launch again with a fault. Its outputs are poisoned before and compared after."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        counts = launch.counts
        self.outputs = [
            x for name, x in launch.arguments if isinstance(x, torch.Tensor) and x.numel() and counts.stored[name]
        ]
        if any(counts.loaded[name] and counts.stored[name] for name in counts.loaded):
            raise NotImplementedError("a kernel that changes its arguments in place cannot be run again")
        self.expected = [x.clone() for x in self.outputs]
        finding = self.finding()
        assert finding is None, f"{launch.kernel} does not repeat itself: {finding}"

    def finding(
        self, ptx: str | None = None, arguments: list[tuple[str, object]] | None = None, seeds: Iterable[int] = (0,)
    ) -> str | None:
        """The difference from the original launch, or None if there is none."""
        changed = dataclasses.replace(
            self.launch, ptx=ptx or self.launch.ptx, arguments=arguments or self.launch.arguments
        )
        try:
            for seed in seeds:
                for x in self.outputs:
                    x.fill_(float("nan") if x.is_floating_point() else 77)
                changed.run(seed)
                if not all(_equal(x, y) for x, y in zip(self.outputs, self.expected, strict=True)):
                    return "wrong result"
        except Violation as violation:
            return str(violation)
        finally:  # other launches read them
            for x, y in zip(self.outputs, self.expected, strict=True):
                x.copy_(y)
        return None


def _equal(x: torch.Tensor, y: torch.Tensor) -> bool:
    return torch.equal(x.nan_to_num(1e30), y.nan_to_num(1e30))


def superfluous(replays: list[Replay], candidates: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The candidates, spans in one PTX, that can all be dropped together without a finding in any replay.

    What happens before what is the same in every order of the warps: where a launch without a barrier shows no race,
    the barrier orders nothing in that launch.
    """
    ptx, dropped = replays[0].launch.ptx, []
    for span in candidates:
        mutant = without(ptx, [*dropped, span])
        if all(replay.finding(mutant) is None for replay in replays):
            dropped.append(span)
    return dropped


@contextlib.contextmanager
def planted(fault: Fault) -> Iterator[None]:
    """Within the block Triton compiles the kernels with a fault in their source."""
    function = function_of(fault)
    source = function.src
    _replace_source(function, planted_in(source, fault))
    try:
        yield
    finally:
        _replace_source(function, source)


def _replace_source(function: JITFunction, source: str) -> None:
    """Replace the source, and forget the compiled code of the function and of all its possible callers."""
    function._unsafe_update_src(source)
    for name, module in list(sys.modules.items()):
        if name.startswith("peftkern.backends"):
            for x in vars(module).values():
                if isinstance(x, JITFunction):
                    x.hash = None
                    x.device_caches.clear()
