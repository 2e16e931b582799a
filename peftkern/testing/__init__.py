# SPDX-License-Identifier: Apache-2.0
"""Checks of a backend against fp64: error bounds, the oracle and a list of cases."""
