# SPDX-License-Identifier: Apache-2.0
"""Puts a learned prefix into a Hugging Face model, and removes it again.

Suggested reading order:

- :mod:`.patch`: the public calls; :mod:`.switch` exchanges the prefix of a patched model.
- :mod:`.model_patch`: the hooks of a patched model. :mod:`.prefix_patch` and :mod:`.prompt_patch` implement them for
  prefixes and prompts, :mod:`.sources` provides the prefix or prompt, and :mod:`.wiring` undoes all changes.
- :mod:`.attention`: the attention function of the layers, with its :mod:`.cache` and its :mod:`.masks`.
- :mod:`.packing` and :mod:`.layout`: packed batches. :mod:`.packer` decides when to use them.
- :mod:`.sharing`: text that rows share; :mod:`.sharer` decides when, and :mod:`.share_patch` needs no prefix for it.
- :mod:`.distilling`: losses from the hidden states that :mod:`.output_rows` reads.
- :mod:`.survey` and :mod:`.trial`: examine a model by running it on a few tokens.
- :mod:`.concatenation_patch` and :mod:`.fallback_patch`: for models that cannot run a prompt once per batch, and for
  PEFT models that keep PEFT's code.
"""

from __future__ import annotations

from .distilling import TopK, capture_top_k, distil, label_loss
from .patch import explain, patch, patched, unpatch
from .switch import switched

__all__ = [
    "TopK",
    "capture_top_k",
    "distil",
    "explain",
    "label_loss",
    "patch",
    "patched",
    "switched",
    "unpatch",
]
