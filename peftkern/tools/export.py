# SPDX-License-Identifier: Apache-2.0
"""Write saved prefixes, cartridges and prompts in the formats of servers and other programs.

`peftkern export my-cartridge --to kv --output served` writes served/my-cartridge.safetensors. A source is a folder of
`save_prefix`, PEFT or Cartridges, or a file of the format kv. Nothing is written unless all sources can be written.
"""

from __future__ import annotations

import argparse
import sys

#: The formats of :func:`peftkern.export`, which is not imported for a help text.
FORMATS = ("kv", "cartridges", "prompt-embeds", "tensorrt-llm", "llama.cpp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``peftkern export``."""
    parser.add_argument("source", nargs="+", metavar="FOLDER", help="a saved prefix, cartridge or prompt")
    parser.add_argument(
        "--to",
        required=True,
        choices=FORMATS,
        help="kv, cartridges: keys and values of a prefix or cartridge; the others: the rows of a prompt",
    )
    parser.add_argument("--output", default=".", metavar="DIR", help="where to write (default: the current folder)")
    parser.add_argument("--name", help="name of the result, for one folder or a table (default: that of the folder)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: that of the source")
    parser.add_argument(
        "--no-shift-positions",
        dest="shift_positions",
        action="store_false",
        help="kv: the prefix was trained with patch(shift_positions=False); servers that cannot do this refuse it",
    )
    parser.add_argument("--force", action="store_true", help="replace files that exist")


def run(options: argparse.Namespace) -> int:
    """Export: 0 when written, 1 where the disk refuses, 2 for errors that the user can correct (on stderr)."""
    import torch

    from ..integrations.export import export

    dtype = options.dtype and getattr(torch, options.dtype)
    names = {name: getattr(options, name) for name in ("name", "shift_positions", "force")}
    try:
        written = export(options.source, options.output, options.to, dtype=dtype, **names)
    except ValueError as error:
        print(f"peftkern export: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # nobody reads the output any more
        raise
    except OSError as error:
        print(f"peftkern export: error: {error}", file=sys.stderr)
        return 1
    for path in written:
        print(path)
    return 0
