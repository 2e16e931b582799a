# SPDX-License-Identifier: Apache-2.0
"""Check a backend on your own machine against fp64.

The bound: :func:`check_backend` runs a backend forward and backward and raises ``AssertionError`` if an output is
further from fp64 than rounding explains. :func:`ratios` does the same for any function and returns the errors
relative to the bound; :func:`assert_bound` checks one tensor against its :func:`deviations`.

The cases: :class:`Shape` and :func:`tensors` make inputs, :data:`FEATURES`, :func:`feature` and :func:`combination`
turn on each feature alone or several at random.

The oracle: :class:`Oracle` computes results of large calls in fp64, block by block.

>>> import torch
>>> from peftkern.testing import Shape, check_backend, feature, tensors
>>> shape, options = feature("window", Shape(D=64))
>>> _ = check_backend("reference", tensors(shape, torch.float32), options)
"""

from .bounds import Ratio, Results, assert_bound, check_backend, ratios
from .cases import FEATURES, Shape, combination, feature, tensors
from .error_analysis import deviations
from .oracle import Oracle

__all__ = [
    "FEATURES",
    "Oracle",
    "Ratio",
    "Results",
    "Shape",
    "assert_bound",
    "check_backend",
    "combination",
    "deviations",
    "feature",
    "ratios",
    "tensors",
]
