# SPDX-License-Identifier: Apache-2.0
"""Fused Triton kernels for CUDA and ROCm: forward and backward over [prefix blocks | sequence blocks].

With TRITON_INTERPRET=1 in the environment the kernels run in Triton's interpreter, on CPU tensors too: for tests, and
by name only (``backend="triton"``). Importing this package does not import Triton.
"""

from .backend import TritonBackend, TritonPlan
from .device import architecture
from .prefix_kernels import TritonPrefixKernels

__all__ = ["TritonBackend", "TritonPlan", "TritonPrefixKernels", "architecture"]
