# SPDX-License-Identifier: Apache-2.0
"""The directive ``cli-help``: the help text of a ``peftkern`` command, read from its parser."""

from __future__ import annotations

import os
import re
import textwrap
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

from peftkern.tools import cli

WIDTH = 98  # columns that the pages show without scrolling


def help_text(command: str | None) -> str:
    """The output of ``peftkern COMMAND --help``, or of ``peftkern --help``, with long paragraphs filled anew."""
    parser = cli.build_parser()
    if command is not None:
        commands = next(action.choices for action in parser._actions if action.choices)
        parser = commands[command]  # type: ignore[index]
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(WIDTH + 2)
    try:
        text = parser.format_help()
    finally:
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns
    return re.sub(r"^(?:\S.*\n)+", lambda found: _fill(found[0]), text, flags=re.MULTILINE)


def _fill(paragraph: str) -> str:
    """The lines without indentation, filled to the width if one of them exceeds it."""
    if max(map(len, paragraph.splitlines())) <= WIDTH:
        return paragraph
    return textwrap.fill(" ".join(paragraph.split()), WIDTH, break_on_hyphens=False) + "\n"


class CliHelp(Directive):
    """A literal block with the help of the command that is the argument, or of ``peftkern`` itself."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The block."""
        text = help_text(self.arguments[0] if self.arguments else None)
        block = nodes.literal_block(text, text)
        block["language"] = "text"
        return [block]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("cli-help", CliHelp)
    return {"parallel_read_safe": True}
