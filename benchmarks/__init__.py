# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of a checkout, run from its root: ``python -m benchmarks.end_to_end --help``."""
