# SPDX-License-Identifier: Apache-2.0
"""What is behind the command line: ``peftkern doctor``, ``bench``, ``demo`` and ``build-wheel``."""
