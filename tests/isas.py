# SPDX-License-Identifier: Apache-2.0
"""Makes the CPU library run on an instruction set of choice."""

from __future__ import annotations

import contextlib
import functools
import struct
from collections.abc import Iterator
from unittest import mock

from peftkern import native
from peftkern.native import abi


@contextlib.contextmanager
def running_on(isa: str) -> Iterator[list[int]]:
    """Within the block all attention of the CPU library runs on ``isa``, whichever way a call is prepared.

    Yields a list to which every native call of attention appends the number of the instruction set that it asks for.
    """
    call, asked = native.cpu._call, []

    def noting_call(name: str, arguments: bytes) -> None:
        if name.startswith("prefix_attention"):
            asked.append(_isa_in(arguments))
        call(name, arguments)

    functions = {
        name: functools.partial(getattr(native.cpu, name), isa=isa)
        for name in ("prefix_attention", "prefix_attention_backward")
    }
    with mock.patch.multiple(native.cpu, _call=noting_call, **functions):
        yield asked


def _isa_in(arguments: bytes) -> int:
    """The field ``isa`` of a ``peftkern_attention`` or of a struct that starts with one."""
    offset = abi.ATTENTION_TENSORS.size + abi.ATTENTION_LAYOUT.size
    names = [field.name for field in abi.ATTENTION_OPTIONS.fields]
    return struct.unpack_from("=q", arguments, offset + 8 * names.index("isa"))[0]
