# SPDX-License-Identifier: Apache-2.0
"""Whether an op must go through torch's dispatcher.

The dispatcher shows a call to everyone who observes or transforms it, and turns special tensors into plain ones. For
this, it converts every argument twice, which takes longer than a kernel on small tensors. A call that nobody observes
and whose tensors are plain gives the same if the kernel is called directly: the dispatcher changes none of torch's
state on the way to it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["is_needed"]

#: Types without ``__torch_function__`` and ``__torch_dispatch__`` of their own.
_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))


def _is_needed(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a call on these tensors must go through the dispatcher.

    It must under torch.compile, in a ``TorchFunctionMode`` or a profiler, if a thread-local dispatch key is set
    (``TorchDispatchMode``, ``make_fx``, functorch, functionalisation, ``torch.jit.trace``), and for tensors that are
    not plain memory: subclasses such as fake tensors, lazy negations, and those without an address (functional, meta,
    zero and batched tensors). An empty tensor has no address either. Dispatch keys would tell all of these apart, but
    reading them takes three times as long.
    """
    if (
        torch.compiler.is_compiling()
        or _has_function_mode()
        or _has_profiler()
        or _raw(_thread_keys()) not in _PLAIN_THREADS
    ):
        return True
    try:
        for x in tensors:  # a generator would double the time
            if x is not None and (type(x) not in _PLAIN_TYPES or x.is_neg() or not x.data_ptr()):
                return True
    except RuntimeError:  # no storage
        return True
    return False


def _always(tensors: Iterable[Tensor | None]) -> bool:
    return True


def _key_set(*names: str) -> int:
    keys: Any = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, names[0]))
    for name in names[1:]:
        keys = keys.add(getattr(torch._C.DispatchKey, name))
    return int(keys.raw_repr())


try:  # none of these names is public: where one is missing, every call goes through the dispatcher
    _thread_keys = torch._C._dispatch_tls_local_include_set
    _raw = torch._C.DispatchKeySet.raw_repr
    _has_function_mode = torch._C._is_torch_function_mode_enabled
    _has_profiler = torch._C._autograd._profiler_enabled
    #: The key sets of threads outside of inference mode and in it.
    _PLAIN_THREADS = frozenset((_key_set("BackendSelect", "ADInplaceOrView"), _key_set("BackendSelect")))
    is_needed = _is_needed
except AttributeError:
    is_needed = _always
