# SPDX-License-Identifier: Apache-2.0
"""Check a backend on your own machine against fp64.

This checks every feature on the backend of your choice. On a GPU, write for example ``"triton"`` and ``"cuda"``:

>>> import torch
>>> from peftkern.testing import FEATURES, Shape, check_backend, feature, tensors
>>> for name in FEATURES:
...     shape, options = feature(name, Shape(S=33, P=9, D=64))
...     results = check_backend("reference", tensors(shape, torch.bfloat16), options, device="cpu")

It raises ``AssertionError`` for a result that is further from fp64 than rounding explains, and
:class:`peftkern.BackendUnavailable` for a feature that the backend does not support.

- The bound: :func:`check_backend` checks all results of a backend. :func:`ratios` measures the errors of any
  attention function relative to the bound. :func:`assert_bound` checks one tensor against its :func:`deviations`.
- The cases: :class:`Shape` and :func:`tensors` make inputs. :func:`feature` turns on one of :data:`FEATURES`,
  :func:`combination` a random set of them.
- The oracle: :class:`Oracle` computes the results of large calls in fp64, block by block.
"""

from .bounds import Ratio, Results, assert_bound, check_backend, ratios
from .cases import FEATURES, Shape, combination, feature, tensors
from .error_analysis import deviations
from .oracle import Oracle
from .rounding import Roundings

__all__ = [
    "FEATURES",
    "Oracle",
    "Ratio",
    "Results",
    "Roundings",
    "Shape",
    "assert_bound",
    "check_backend",
    "combination",
    "deviations",
    "feature",
    "ratios",
    "tensors",
]
