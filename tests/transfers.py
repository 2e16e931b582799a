# SPDX-License-Identifier: Apache-2.0
"""Record the moves of tensors between devices."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class Moves(TorchDispatchMode):
    """``asynchronous`` gets an element per tensor moved in the block: whether the host goes on without waiting."""

    def __init__(self):
        super().__init__()
        self.asynchronous = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ == "_to_copy" and kwargs.get("device", args[0].device) != args[0].device:
            self.asynchronous.append(bool(kwargs.get("non_blocking")))
        return func(*args, **kwargs)
