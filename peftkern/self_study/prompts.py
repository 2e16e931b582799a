# SPDX-License-Identifier: Apache-2.0
"""What the model is asked to ask about a document."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["HELD_OUT_PROMPTS", "SEED_PROMPTS", "SeedPrompt"]


class SeedPrompt(NamedTuple):
    """One way to ask about a passage.

    Attributes:
        name: of the kind of question.
        instruction: has the model write a question about a passage.
        otherwise: the question if the model writes none.
    """

    name: str
    instruction: str
    otherwise: str


#: The kinds of questions that a cartridge is trained on.
SEED_PROMPTS = (
    SeedPrompt(
        "question",
        "Write one short question that this passage answers. Reply with the question only.",
        "What does the document say here?",
    ),
    SeedPrompt(
        "structuring",
        "Write one short request for the facts of this passage as a list or a table. Reply with the request only.",
        "List the main facts of the document.",
    ),
    SeedPrompt(
        "summary",
        "Write one short request for a summary of what this passage is about. Reply with the request only.",
        "Summarise the document in two sentences.",
    ),
    SeedPrompt(
        "use case",
        "Think of someone who needs this passage at work. Write the short question that they ask. Reply with the "
        "question only.",
        "When would I need what the document describes?",
    ),
    SeedPrompt(
        "definition",
        "Choose a term in this passage. Write a short question about what it means. Reply with the question only.",
        "What do the terms in the document mean?",
    ),
    SeedPrompt(
        "creative",
        "Write one short request for an example or a story that illustrates this passage. Reply with the request "
        "only.",
        "Make up an example of what the document describes.",
    ),
)

#: Kinds that no cartridge is trained on, for a fair comparison.
HELD_OUT_PROMPTS = (
    SeedPrompt(
        "reason",
        "Write one short question that starts with Why or How and that this passage answers. Reply with the question "
        "only.",
        "Why does the document say so?",
    ),
    SeedPrompt(
        "mistake",
        "Think of a mistake that this passage warns of. Write a short question about it. Reply with the question "
        "only.",
        "What can go wrong?",
    ),
    SeedPrompt(
        "condition",
        "Write one short question about what happens in a case that this passage mentions. Reply with the question "
        "only.",
        "What happens in the cases that the document mentions?",
    ),
)
