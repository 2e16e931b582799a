# SPDX-License-Identifier: Apache-2.0
"""How the calls of a patched model run."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CallOptions", "LogitsError"]


class LogitsError(ValueError):
    """The model does not support ``logits="labelled"``."""


@dataclass(frozen=True)
class CallOptions:
    """How the calls of a patched model run: see :func:`peftkern.patch`.

    Attributes:
        packing: pack batches where this removes rows.
        logits: ``"all"``, or ``"labelled"`` to compute only the logits that predict a label, in training steps.
        strict: raise for a call that would run a slower fallback.
        share: run text that the rows of a batch share once.
    """

    packing: bool = True
    logits: str = "all"
    strict: bool = False
    share: bool = False

    @property
    def logits_note(self) -> str:
        """What ``peftkern.explain`` says of the logits; empty if all are computed."""
        return "; only logits that predict a label are computed" if self.logits == "labelled" else ""
