# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M's sizes, for scripts that need its shape and not its weights."""

from __future__ import annotations

from typing import Any

from end_to_end import config_of

TITLE = "SmolLM2-135M's shape, random weights"
QUICK_TITLE = "a tiny Llama"


def config(quick: bool = False) -> Any:
    """Its ``transformers`` config, or that of a tiny Llama. The output layer is the embedding."""
    sizes = config_of("tiny" if quick else "smollm2-135m", 30)
    sizes.tie_word_embeddings = True
    return sizes
