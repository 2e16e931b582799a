# SPDX-License-Identifier: Apache-2.0
"""The shell commands of the page "From a document to a served cartridge"."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "cartridges.md"


def page_commands() -> dict[str, str]:
    """The commands, by their first two words, in their order."""
    commands, lines = {}, ""
    for block in re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.M | re.S):
        for line in block.splitlines():
            lines += line + "\n"
            try:
                words = shlex.split(lines)
            except ValueError:  # a quote is open: the command continues
                continue
            commands[" ".join(words[:2])] = lines.strip()
            lines = ""
    return commands
