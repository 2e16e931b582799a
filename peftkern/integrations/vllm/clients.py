# SPDX-License-Identifier: Apache-2.0
"""What a client puts into a request. Needs no vLLM."""

from __future__ import annotations

from typing import Any

__all__ = ["prefix_params"]


def prefix_params(name: str | None) -> dict[str, Any]:
    """``extra_args`` of ``SamplingParams``, or ``extra_body`` of an OpenAI client, for a request with a prefix.

    Args:
        name: of the prefix; None for a request without one, if the server has a default.

    >>> prefix_params("manual")
    {'kv_transfer_params': {'prefix': 'manual'}}
    """
    return {"kv_transfer_params": {"prefix": name}}
