# SPDX-License-Identifier: Apache-2.0
"""Self-study: a cartridge learns a document from questions that the model asks and answers about it.

The steps of Eyuboglu et al. 2025 ("Cartridges", arXiv 2506.06266), with a teacher that reads the document once::

    document ─► PrefixKV.from_text ──► synthesise ──► capture ──► train ──► compare
                the teacher's prefix   questions,     top-k       cartridge  KL to the teacher on
                                       answers        log-probs              questions held out

Teacher and student are one patched model. Each function reads the prefix that it is given
(:func:`peftkern.switched`). Every step can be interrupted and continues where it stopped, with the same results.

Positions: the teacher's text starts at position T behind the T tokens of the document, and the student's at P behind
the P tokens of the cartridge, as in the code of that paper.
"""

from __future__ import annotations

from .chat import Chat
from .comparing import Comparison, compare
from .conversations import Conversation, read_conversations
from .prompts import HELD_OUT_PROMPTS, SEED_PROMPTS, SeedPrompt
from .synthesis import Synthesis, synthesise
from .targets import Targets, capture
from .training import Study, Training, train

__all__ = [
    "HELD_OUT_PROMPTS",
    "SEED_PROMPTS",
    "Chat",
    "Comparison",
    "Conversation",
    "SeedPrompt",
    "Study",
    "Synthesis",
    "Targets",
    "Training",
    "capture",
    "compare",
    "read_conversations",
    "synthesise",
    "train",
]
