# SPDX-License-Identifier: Apache-2.0
"""Where a prefix or prompt comes from: a module of ours, or the adapter of a PEFT model."""
