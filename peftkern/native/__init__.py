# SPDX-License-Identifier: Apache-2.0
"""The native libraries through ctypes: :mod:`.cpu` and :mod:`.cuda`."""

from . import cpu, cuda

__all__ = ["cpu", "cuda"]
