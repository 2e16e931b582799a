# SPDX-License-Identifier: Apache-2.0
"""The commands ``peftkern doctor``, ``bench``, ``demo`` and ``build-wheel``."""
