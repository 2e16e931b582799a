# SPDX-License-Identifier: Apache-2.0
"""The directive ``cli-help``: the help text of a ``peftkern`` command, read from its parser."""

from __future__ import annotations

import os
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

from peftkern.tools import cli


def help_text(command: str | None) -> str:
    """The output of ``peftkern COMMAND --help`` at a width of 88 columns; ``None`` for ``peftkern --help``."""
    parser = cli.build_parser()
    if command is not None:
        commands = next(action.choices for action in parser._actions if action.choices)
        parser = commands[command]  # type: ignore[index]
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "88"
    try:
        return parser.format_help()
    finally:
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns


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
