# SPDX-License-Identifier: Apache-2.0
"""Clear answers to HTTP clients. Needs starlette, which vLLM's server brings."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from ..prefix_folder import find_file
from .requests import name_of

__all__ = ["prefix_errors"]


async def prefix_errors(request: Any, call_next: Callable[[Any], Awaitable[Any]]) -> Any:
    """Answer a request with an unknown prefix, or with one for a server without any, with status 400 and the reason.

    ``vllm serve --middleware peftkern.integrations.vllm.prefix_errors``. Without it such a request fails in the
    engine, and vLLM answers with status 500 and no reason.
    """
    if request.method == "POST":
        try:
            _check(await request.body(), request.app.state.vllm_config.kv_transfer_config)
        except ValueError as error:
            from starlette.responses import JSONResponse

            return JSONResponse({"error": {"message": str(error), "type": "BadRequestError", "code": 400}}, 400)
    return await call_next(request)


def _check(raw: bytes, config: Any) -> None:
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):  # the endpoint's to judge
        return
    params = body.get("kv_transfer_params") if isinstance(body, dict) else None
    name = name_of(params, None)
    if name is None:
        return
    folder = config.kv_connector_extra_config.get("folder") if config is not None else None
    if folder is None:
        raise ValueError(
            f"kv_transfer_params: expected none, because this server has no prefixes, got {name[:200]!r}"
        )
    find_file(folder, name)
