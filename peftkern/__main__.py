# SPDX-License-Identifier: Apache-2.0
"""``python -m peftkern``."""

import sys

from .tools.cli import main

sys.exit(main())
