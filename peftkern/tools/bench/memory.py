# SPDX-License-Identifier: Apache-2.0
"""Measure a call's peak memory and the bytes that its forward saves for backward.

On a GPU the peak is that of torch's allocator. On a CPU it is the growth of the process's resident memory (the
kernel's high-water mark), which includes allocations of native code. A process that measures it must return freed
blocks at once (:func:`return_freed_memory`).
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
    """Make glibc return each large block when it is freed. Otherwise later calls reuse it, unseen by the peak."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 16)


def reset_peak() -> bool:
    """Reset the high-water mark; false if the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident(key: str) -> int | None:
    """Bytes of ``VmRSS``, of ``VmHWM`` (its high-water mark), or of ``VmData`` (allocated by the process)."""
    try:
        found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> float | None:
    """Growth of memory during a call, with its results; None if the system does not report it."""
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


def allocated_bytes(call: Callable[[], object]) -> int:
    """The most bytes that a call has held at once, counted by torch's allocator of the CPU: exact and repeatable.

    What native code allocates by itself is not counted.
    """
    import torch

    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        call()
    events: Any = profile.profiler
    changes = [(e.start_ns(), e.nbytes()) for e in events.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda x: x[0]):
        held += change
        peak = max(peak, held)
    return peak


def saved_bytes(forward: Callable[[], Any], resident: Iterable[Any]) -> int:
    """Bytes that a forward pass saves for backward: distinct storages, without those of the ``resident`` tensors."""
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
    del result  # until here the graph kept all storages alive, so that no two had the same address
    return total


@contextlib.contextmanager
def limited(budget: int) -> Iterator[None]:
    """Within the block, allocations fail once the process holds ``budget`` bytes more than now.

    Where torch falls back to a slower algorithm with a warning because memory is short, the block fails as well.
    """
    import resource

    import torch

    before = resource.getrlimit(resource.RLIMIT_DATA)
    held = resident("VmData")
    if held is None:
        raise RuntimeError("this system does not report the memory of a process")
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


#: Types of exceptions that failed allocations raise; see :func:`is_out_of_memory`.
ALLOCATION_ERRORS = (RuntimeError, MemoryError, UserWarning)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of Python, torch, oneDNN or CUDA reports a failed allocation."""
    words = ("can't allocate memory", "out of memory", "bad_alloc", "bad allocation", "could not create a memory",
             "could not create a primitive", "cannot allocate")  # fmt: skip
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def in_own_process(program: list[str], order: dict[str, Any]) -> Any:
    """Run a program (``["-m", module]``) that reads ``order`` as JSON; return the JSON in its last line.

    Raises:
        RuntimeError: if the process fails, with the last line of its errors.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    done = subprocess.run(
        [sys.executable, *program], input=json.dumps(order), capture_output=True, text=True, env=environment
    )
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(words[-1])
    return json.loads(done.stdout.splitlines()[-1])
