# SPDX-License-Identifier: Apache-2.0
"""Trials of models with recurrent layers: where they place a sequence, and whether they start in a given state."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..model_info import full_cache, layers_of
from ..recurrent_state import states_of
from .probing import is_transient, some_tokens
from .trial import Trial

__all__ = ["ignores_cache", "try_state"]


def ignores_cache(trial: Trial) -> bool:
    """Whether the stock model runs tokens behind a cache at the positions 0, 1, ...

    Of the models in transformers, only some with recurrent layers do, so only those are tried.
    """
    if not trial.stock_layers or "position_ids" not in inspect.signature(trial.backbone.forward).parameters:
        return False
    places = torch.arange(trial.ids.shape[1], device=trial.ids.device)[None]
    outputs: list[list[Tensor]] = []

    def differs(**positions: Tensor) -> bool:
        """Whether the outputs at these positions differ from those of the first call."""
        stock = trial.cache().as_stock(1, trial.backbone.dtype, trial.backbone.config)
        arguments = {str(trial.cache_name): stock, "use_cache": True, **positions}
        outputs.append(trial.recorded(input_ids=trial.ids[:1], **arguments))
        return trial.compare("", outputs[-1], outputs[0], None, [[0.0]] * len(outputs[0])) is not None

    try:
        differs()
        return differs(position_ids=places + trial.prefix_len) and not differs(position_ids=places)
    except Exception as error:
        if is_transient(error):
            raise
        return False


def try_state(trial: Trial, recurrent: Sequence[nn.Module]) -> str | None:
    """Why recurrent modules do not start in a given state; None if they do.

    Tokens behind the keys and states of a text have to come out as they do behind the text itself, and depend on
    every state.

    Args:
        trial: a trial that has tried the prefix.
        recurrent: the modules.
    """

    def run() -> str | None:
        ids = some_tokens(trial.backbone, 3 * trial.prefix_len)[None]
        text, behind = ids[:, : trial.prefix_len], ids[:, trial.prefix_len :]
        stock = full_cache(trial.backbone.config)
        whole = trial.recorded(recurrent, input_ids=ids, use_cache=False)
        trial.recorded(input_ids=text, use_cache=True, **{str(trial.cache_name): stock})
        states, leaves = [], []
        for layer in states_of(stock.layers):
            own = [[x if x is None else x.detach().requires_grad_() for x in pair] for pair in layer]
            leaves += [x for pair in own for x in pair if x is not None]
            states.append([(conv, recurrent) for conv, recurrent in own])
        with torch.enable_grad():
            got = trial.run(trial.cache(False, layers_of(stock), states), behind, None, recurrent)
            read = torch.autograd.grad(got[-1].float().sum(), leaves, allow_unused=True)
        want = [x[:, trial.prefix_len :] for x in whole]
        rounding = [rows[:1] for rows in trial.worst_rounding()[:1]] * len(want)
        differs = trial.compare(trial.kind, [x.detach() for x in got], want, None, rounding)
        if differs is None and all(gradient is not None for gradient in read):
            return None
        kinds = ", ".join(sorted({type(module).__name__ for module in recurrent}))
        return f"{kinds} does not continue from a state that it is given"

    return trial.guarded(run, "with states")
