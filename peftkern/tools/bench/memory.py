# SPDX-License-Identifier: Apache-2.0
"""How much memory a call needs: the peak beside what is there before it, and what its forward keeps for backward.

On a GPU the peak is that of torch's allocator. On a CPU it is how far the process's resident memory rises (the
kernel's high-water mark), so that what native code allocates counts too; for that, a process of its own gives freed
blocks back at once (:func:`return_freed_memory`).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

_M_MMAP_THRESHOLD = -3  # malloc.h


def return_freed_memory() -> None:
    """Have glibc give each large block back when it is freed, or one call's leftovers would serve the next."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 16)


def reset_peak() -> bool:
    """Start the high-water mark again; false where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident(key: str) -> int | None:
    """Bytes: ``VmRSS``, ``VmHWM``, its high-water mark, or ``VmData``, what the process has allocated."""
    try:
        found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> float | None:
    """How far memory rises during a call, what it returns included; None where the system does not tell."""
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - held)
    before = resident("VmRSS") if reset_peak() else None
    call()
    after = resident("VmHWM")
    return None if before is None or after is None else float(after - before)


def saved_bytes(forward: Callable[[], Any], resident: Iterable[Any]) -> int:
    """Bytes that a forward pass keeps for backward: distinct storages, those of the ``resident`` tensors excluded."""
    import torch

    known = {tensor.untyped_storage().data_ptr() for tensor in resident}
    storages: dict[int, int] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    total = sum(storages.values())
    del result  # the graph, which kept every storage's address its own
    return total


@contextlib.contextmanager
def limited(budget: int) -> Iterator[None]:
    """Within the block, allocations fail that would have this process hold ``budget`` bytes more than it does now.

    So does what torch would compute by a slower way for want of memory, which it says in a warning.
    """
    import resource

    import torch

    before = resource.getrlimit(resource.RLIMIT_DATA)
    held = resident("VmData")
    if held is None:
        raise RuntimeError("this system does not tell how much memory a process has")
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    resource.setrlimit(resource.RLIMIT_DATA, (held + budget, before[1]))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="mkldnn_.* failed")
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
        torch.set_warn_always(always)


#: What failing allocations may raise; :func:`is_out_of_memory` tells whether they did.
ALLOCATION_ERRORS = (RuntimeError, MemoryError, UserWarning)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory could not be had, in the words of Python, torch, oneDNN or CUDA."""
    words = ("can't allocate memory", "out of memory", "bad_alloc", "bad allocation", "could not create a memory",
             "could not create a primitive", "cannot allocate")  # fmt: skip
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def in_own_process(program: list[str], order: dict[str, Any]) -> Any:
    """The answer of a program (``["-m", module]``) that reads ``order`` as JSON and ends with a line of JSON.

    Raises:
        RuntimeError: with the last words of the process.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    done = subprocess.run(
        [sys.executable, *program], input=json.dumps(order), capture_output=True, text=True, env=environment
    )
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(words[-1])
    return json.loads(done.stdout.splitlines()[-1])
