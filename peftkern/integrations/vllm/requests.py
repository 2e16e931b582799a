# SPDX-License-Identifier: Apache-2.0
"""What the scheduler does to a vLLM ``Request`` before it is scheduled for the first time."""

from __future__ import annotations

from typing import Any

__all__ = ["check", "name_of", "put_prefix_before", "replace_by_stub", "try_request"]

#: Token whose positions the prefix takes. Nothing computes or reads its embedding.
PLACEHOLDER = 0
#: Tokens of a refused request: one that counts as loaded, and one to compute.
STUB = [PLACEHOLDER, PLACEHOLDER]


def name_of(params: Any, default: str | None) -> str | None:
    """The prefix that ``kv_transfer_params`` name: ``{"prefix": NAME}``, or None in its place for none.

    Raises:
        ValueError: for anything else.
    """
    if not params:
        return default
    if not isinstance(params, dict) or set(params) != {"prefix"}:
        raise ValueError(f"kv_transfer_params: expected {{'prefix': NAME}}, got {str(params)[:200]}")
    name = params["prefix"]
    if name is not None and not isinstance(name, str):
        raise ValueError(f"kv_transfer_params: expected a prefix's name or None, got {str(name)[:200]}")
    return name


def check(request: Any, length: int, max_model_len: int) -> None:
    """Raise ValueError if a request of this kind cannot have a prefix of ``length`` tokens."""
    if request.sampling_params is None:
        raise ValueError("request: expected one that generates, got one that pools, which cannot have a prefix")
    if request.prompt_embeds is not None or request.prompt_token_ids is None:
        raise ValueError("prompt: expected token ids behind a prefix, got embeddings")
    if request.mm_features:
        raise ValueError("prompt: expected text behind a prefix, got images, audio or video")
    if request.resumable:
        raise ValueError("request: expected a complete prompt behind a prefix, got a stream of inputs")
    if request.skip_reading_prefix_cache:
        raise ValueError(
            "sampling_params: prompt_logprobs and skip_reading_prefix_cache make vLLM compute every token of the "
            "prompt, so they cannot be combined with a prefix"
        )
    tokens, most = len(request.prompt_token_ids), max_model_len - length - 1  # one token is generated
    if not 1 <= tokens <= most:
        raise ValueError(
            f"prompt: expected at least 1 token, and at most {most} behind a prefix of {length} "
            f"(max_model_len {max_model_len}), got {tokens}"
        )


def put_prefix_before(request: Any, length: int, salt: str) -> None:
    """Put ``length`` placeholders before the prompt, whose keys and values the connector supplies.

    Args:
        request: has not been scheduled yet.
        length: tokens of the prefix.
        salt: names the prefix in the hash of the first block and, because hashes are chained, of all blocks. Requests
            with another prefix or none never share a block with this one.
    """
    ids = list(request.prompt_token_ids)
    # A repetition penalty concerns all tokens of the prompt. A token of the text adds none to that set.
    placeholder = ids[0] if request.sampling_params.repetition_penalty != 1.0 else PLACEHOLDER
    client_salt = f":{request.cache_salt}" if request.cache_salt else ""
    _set_prompt(request, [placeholder] * length + ids, salt + client_salt)


def replace_by_stub(request: Any, salt: str) -> None:
    """Turn a refused request into one of two tokens, whose block then fails to load.

    No other request has this block, because two tokens do not fill one.
    """
    request.prompt_embeds = request.prompt_is_token_ids = None
    request.mm_features = []
    request.skip_reading_prefix_cache = False
    _set_prompt(request, STUB, salt)


def try_request(request: Any) -> bool:
    """Whether the attributes of a request that has the prompt [1, 2] follow a prefix that is put before it."""
    try:
        put_prefix_before(request, 2, "salt")
        tokens = [PLACEHOLDER, PLACEHOLDER, 1, 2]
        same = list(request.prompt_token_ids) == list(request.all_token_ids) == tokens
        return same and request.num_prompt_tokens == request.num_tokens == len(tokens)
    except AttributeError:
        return False


def _set_prompt(request: Any, ids: list[int], salt: str) -> None:
    # The frontend may share the list of ids with the request: replace it.
    request.prompt_token_ids = list(ids)
    request._all_token_ids[:] = ids
    request.num_prompt_tokens = len(ids)
    request.cache_salt = salt
    request.block_hashes.clear()
    request.update_block_hashes()
