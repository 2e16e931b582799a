# SPDX-License-Identifier: Apache-2.0
"""Whole models with PEFT and with peftkern: ``python -m benchmarks.end_to_end --help``."""
