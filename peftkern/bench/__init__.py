# SPDX-License-Identifier: Apache-2.0
"""Microbenchmarks of prefix attention: what we gain over each alternative on this machine, and where we lose."""
