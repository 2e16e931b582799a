# SPDX-License-Identifier: Apache-2.0
"""Puts a learned prefix into a Hugging Face model, and takes it out again.

Read in this order: :mod:`.patch` (the public calls), :mod:`.model_patch` (the hooks), :mod:`.prefix_patch` and
:mod:`.prompt_patch` (what they do), :mod:`.attention` (what the layers then compute), :mod:`.packing` and
:mod:`.layout` (batches as streams), :mod:`.packer` (when), :mod:`.cache`, :mod:`.masks`, :mod:`.survey` and
:mod:`.trial` (what is found out about a model). :mod:`.sources` says where the prefix comes from, :mod:`.wiring` how
changes are undone.
"""

from __future__ import annotations

from .patch import patch, patched, unpatch

__all__ = ["patch", "patched", "unpatch"]
