# SPDX-License-Identifier: Apache-2.0
"""A provider of the benchmark with a fault, which the measurement must report."""

from __future__ import annotations

from dataclasses import replace

from peftkern.tools.bench.providers import PROVIDERS

#: Providers that every machine can time.
TIMED = ("peft", "no-prefix", "peftkern")


def plant(monkeypatch, name: str, change) -> None:
    """Change the output of a provider."""
    right = PROVIDERS[name]
    planted = replace(right, make=lambda problem: lambda *inputs: change(right.make(problem)(*inputs)))
    monkeypatch.setitem(PROVIDERS, name, planted)
