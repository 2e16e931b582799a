# SPDX-License-Identifier: Apache-2.0
"""Puts a learned prefix into a Hugging Face model, and takes it out again.

Read in this order: :mod:`.patch` (the public calls), :mod:`.model_patch` (what a patched model has that others do
not), :mod:`.attention` (what its layers then compute), :mod:`.packing` (batches as streams), :mod:`.cache`,
:mod:`.masks`, :mod:`.survey`; :mod:`.peft`, :mod:`.native` and :mod:`.prompt` say where the prefix comes from.
"""

from __future__ import annotations

from .patch import patch, patched, unpatch

__all__ = ["patch", "patched", "unpatch"]
