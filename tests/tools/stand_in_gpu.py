"""A GPU in simulated time: a queue that a CPU fills, with torch's functions to time it."""

from __future__ import annotations

import torch

from peftkern.tools.bench import device_time


class Gpu:
    """The CPU's clock, and the time at which the GPU will have run everything in its queue."""

    cycles = 1.5e9

    def __init__(self, monkeypatch):
        self.now = self.idle_at = 0.0
        owner = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.time = max(owner.now, owner.idle_at)

            def elapsed_time(self, other):
                assert max(self.time, other.time) <= owner.now, "read before the GPU has recorded it"
                return (other.time - self.time) * 1e3

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.run(0.0, cycles / self.cycles))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: self.synchronize())
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(device_time.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(device_time, "_cache", lambda device: self)

    def run(self, host, device):
        """Launch kernels: ``host`` seconds of the CPU, then ``device`` seconds of the GPU."""
        self.now += host
        self.idle_at = max(self.now, self.idle_at) + device

    def synchronize(self):
        self.now = max(self.now, self.idle_at)

    def zero_(self):
        """What the buffer does that clears the L2 cache."""
        self.run(5e-6, 1e-4)
