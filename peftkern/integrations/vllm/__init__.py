# SPDX-License-Identifier: Apache-2.0
"""Prefixes, cartridges and soft prompts in vLLM.

:class:`PrefixConnector` gives each request the prefix or cartridge that it names. Only this class needs vLLM.
Soft prompts need no connector: :mod:`peftkern.integrations.prompt_embeds` builds such requests.
"""

from __future__ import annotations

from typing import Any

from .clients import prefix_params
from .errors import prefix_errors

__all__ = ["PrefixConnector", "prefix_errors", "prefix_params"]


def __getattr__(name: str) -> Any:
    if name == "PrefixConnector":
        from .connector import PrefixConnector

        return PrefixConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
