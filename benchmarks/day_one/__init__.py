# SPDX-License-Identifier: Apache-2.0
"""Checks and measurements for a GPU that has never run peftkern: ``python benchmarks/gpu_day_one.py``."""
