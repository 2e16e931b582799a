# SPDX-License-Identifier: Apache-2.0
"""Sources of a prefix or prompt: a module of peftkern, or the adapter of a PEFT model."""
