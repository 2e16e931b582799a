# SPDX-License-Identifier: Apache-2.0
"""Put a prefix into a model, and take it out again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from .cache import SITE, PrefixOptions
from .model_patch import PATCH, ModelPatch
from .native import LayerPrefix, PrefixPatch
from .peft import PeftPatch, has_prompt, is_peft_model

__all__ = ["patch", "patched", "unpatch"]

Model = TypeVar("Model", bound=nn.Module)


def patch(
    model: Model,
    prefix: nn.Module | None = None,
    *,
    shift_positions: bool = True,
    prefix_in_window: bool = True,
    freeze: bool = False,
    fix_seq2seq_layout: bool = False,
    backend: str = "auto",
) -> Model:
    """Makes a model compute its attention with :func:`peftkern.prefix_attention`, the prefix read where it lies.

    ::

        peft_model ─► get_prompt ─► cache with views of the parameter ─┐
                                                                       ├─► each layer: prefix_attention(q, k, v,
        model, PrefixKV ─► hook on the backbone ───────────────────────┘               prefix_k, prefix_v)

    On a PEFT model with PREFIX_TUNING or CARTRIDGE adapters of any task type, parameters, checkpoints, ``generate``
    and numbers are PEFT's. Adapters may be added, switched and disabled afterwards. Activation checkpointing works.

    On any other model, with ``prefix``: the prefix becomes the submodule ``model.peftkern_prefix``, so optimizers,
    ``Trainer`` and DDP see its parameters, and ``state_dict`` and the checkpoints of ``Trainer`` hold it.
    ``attention_mask``, ``position_ids`` and caches keep speaking of the sequence alone. ``requires_grad`` of the
    model's own parameters stays as it is unless ``freeze`` is set.

    The model is run once on two tokens, to see which attention modules read its cache. One instance changes, and
    nothing when an error is raised; models that share a config object share its attention implementation.

    Args:
        model: a ``PeftModel``, a ``PreTrainedModel``, or a module that holds one (a ``PeftModel`` with LoRA).
        prefix: :class:`peftkern.PrefixKV` for a model without prefix adapters.
        shift_positions: the sequence's positions begin behind the prefix, as PEFT has them. False: they begin at 0,
            so the prefix does not shorten the longest usable sequence, and sliding windows do not count it. Only with
            ``prefix``. Layers with a shorter prefix than the longest have it directly before the sequence.
        prefix_in_window: sliding windows count the prefix as positions before the sequence, as PEFT has it; False
            keeps it visible to every query.
        freeze: switch off ``requires_grad`` of all parameters but the prefix's until :func:`unpatch`.
        fix_seq2seq_layout: read encoder-decoder prefixes of PEFT layer by layer. PEFT lets layers share them by a
            mistake that trained checkpoints depend on. Only with a PEFT model; a ``PrefixKV`` says which layout it
            has.
        backend: as in :func:`peftkern.prefix_attention`.

    Returns:
        ``model``.

    Raises:
        ValueError: naming what does not fit: a model patched already, attention that is not dispatched through
            ``transformers``' ``AttentionInterface``, a prefix of another shape, an adapter of another type.

    >>> import torch, peftkern
    >>> from peft import PrefixTuningConfig, get_peft_model
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...                      num_attention_heads=4, num_key_value_heads=2)
    >>> model = LlamaForCausalLM(config)
    >>> model = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    >>> ids = torch.ones(2, 6, dtype=torch.long)
    >>> loss = peftkern.patch(model)(ids, labels=ids).loss
    """
    if any(SITE in module.__dict__ for module in model.modules()):
        raise ValueError("model: expected one that is not patched, got a patched one; unpatch(model) first")
    # A window can hide the prefix only where the prefix has positions.
    options = PrefixOptions(in_window=prefix_in_window and shift_positions, backend=backend)
    change: ModelPatch
    if prefix is None:
        if not is_peft_model(model):
            raise ValueError(f"prefix: expected a PrefixKV, as {type(model).__name__} is no PEFT model, got None")
        if not shift_positions:
            raise ValueError("shift_positions: expected True, as PEFT counts the prefix's positions, got False")
        change = PeftPatch(model, fix_seq2seq_layout=fix_seq2seq_layout, options=options)
    else:
        if not isinstance(prefix, LayerPrefix):
            raise ValueError(
                f"prefix: expected a PrefixKV, got {type(prefix).__name__}; a prompt that enters at the embedding is "
                "peftkern.soft_prompt_embedding's"
            )
        if fix_seq2seq_layout:
            raise ValueError(
                "fix_seq2seq_layout: expected False, as a PrefixKV knows its layout (peft_seq2seq_layout), got True"
            )
        base = _find_base(model)
        change = PrefixPatch(model, base, prefix, shift_positions=shift_positions, freeze=freeze, options=options)
    change.install()
    return model


def unpatch(model: Model) -> Model:
    """Takes the prefix out again: parameters, config and outputs are, to the bit, those of the model unpatched.

    A ``PrefixKV`` keeps its values, and is a submodule only while the model is patched.

    Raises:
        ValueError: if ``model`` is not the object that was patched.
    """
    change = model.__dict__.get(PATCH)
    if change is None:
        raise ValueError(f"model: expected what was given to patch, got a {type(model).__name__} that is not patched")
    change.remove()
    return model


@contextlib.contextmanager
def patched(model: Model, prefix: nn.Module | None = None, **options: Any) -> Iterator[Model]:
    """Within the block, ``model`` is patched. Arguments as for :func:`patch`."""
    patch(model, prefix, **options)
    try:
        yield model
    finally:
        unpatch(model)


def _find_base(model: nn.Module) -> PreTrainedModel:
    """The outermost Hugging Face model in ``model``."""
    if is_peft_model(model) and has_prompt(model):
        raise ValueError(
            "prefix: expected None, as the PEFT model has a prompt or prefix of its own, got another one"
        )
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise ValueError(f"model: expected a transformers PreTrainedModel, or one inside, got {type(model).__name__}")
