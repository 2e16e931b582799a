# SPDX-License-Identifier: Apache-2.0
"""Put a prefix into a model, and take it out again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar, cast

from torch import nn
from transformers import PreTrainedModel

from .cache import PrefixOptions
from .concatenation_patch import ConcatenationPatch
from .fallback_patch import FallbackPatch
from .model_patch import LogitsError
from .peft_model import has_prompt, is_peft_model
from .prefix_patch import PrefixPatch
from .prompt_patch import PromptPatch
from .sources.module_prefix import ModulePrefix, is_layer_prefix
from .sources.module_prompt import ModulePrompt, is_embedding_prompt
from .sources.peft_prefix import KEY_VALUE_TYPES, PeftPrefix
from .sources.peft_prompt import PROMPT_TYPES, PeftPrompt
from .wiring import PATCH, Patch

__all__ = ["explain", "patch", "patched", "unpatch"]

Model = TypeVar("Model", bound=nn.Module)


def patch(
    model: Model,
    prefix: nn.Module | None = None,
    *,
    shift_positions: bool = True,
    prefix_in_window: bool = True,
    freeze: bool = False,
    fix_seq2seq_layout: bool = False,
    packing: bool = True,
    logits: str = "all",
    peft_bugs: bool = False,
    strict: bool = False,
    backend: str = "auto",
) -> Model:
    """Makes a model compute its attention with :func:`peftkern.prefix_attention`, the prefix read where it lies.

    ::

        peft_model ─► get_prompt ─► cache with views of the parameter ─┐
                                                                       ├─► each layer: prefix_attention(q, k, v,
        model, PrefixKV ─► hook on the backbone ───────────────────────┘               prefix_k, prefix_v)

    On a PEFT model with PREFIX_TUNING or CARTRIDGE adapters of any task type, parameters, checkpoints, ``generate``
    and numbers are PEFT's. Adapters may be added, switched and disabled afterwards. Activation checkpointing works.

    On a PEFT model with PROMPT_TUNING, P_TUNING, MULTITASK_PROMPT_TUNING or CPT adapters, the prompt runs through a
    causal model once per batch instead of once per sample (:mod:`.packing`), with PEFT's loss, outputs and gradients.
    ``generate`` keeps its keys as a prefix that all rows and beams share.

    Padding of a causal model's batches is left out where labels or ``logits_to_keep`` say that nothing looks at it;
    outputs at such padding are those of a token beside it. Rows that ``position_ids`` without a mask divide into
    sequences have each of them behind the prefix or prompt.

    On any other model, with ``prefix``: the prefix becomes a submodule of the Hugging Face model, named
    ``peftkern_prefix`` (or ``peftkern_prompt``), so optimizers, ``Trainer`` and DDP see its parameters, and
    ``state_dict`` and the checkpoints of ``Trainer`` hold it. ``attention_mask``, ``position_ids`` and caches keep
    speaking of the sequence alone. ``requires_grad`` of the model's own parameters stays as it is unless ``freeze``
    is set.

    No ``forward`` or ``generate`` is replaced, so the model may be wrapped before or after (accelerate, DDP, FSDP2,
    ``torch.compile``, TRL). The model is tried on a few tokens: the patched model has to compute what the stock model
    computes whose cache holds the same prefix, with and without padding, for a decoding step, and on packed rows.
    Where it does not, a PEFT model runs PEFT's own code and a ``SoftPrompt`` is put before every sample, with one
    warning; a ``PrefixKV`` is refused. ``peftkern.explain(model)`` says how a model runs and why.

    One instance changes, and nothing when an error is raised; models that share a config object share its attention
    implementation.

    Args:
        model: a ``PeftModel``, a ``PreTrainedModel``, or a module that holds one (a ``PeftModel`` with LoRA).
        prefix: :class:`peftkern.PrefixKV`, or :class:`peftkern.SoftPrompt` for a causal model (a bank takes
            ``prompt_ids`` in each forward, not in ``generate``), for a model without prefix adapters.
        shift_positions: the sequence's positions begin behind the prefix, as PEFT has them. False: they begin at 0,
            so the prefix does not shorten the longest usable sequence, and sliding windows do not count it. Only with
            ``prefix``. Layers with a shorter prefix than the longest have it directly before the sequence.
        prefix_in_window: sliding windows count the prefix as positions before the sequence, as PEFT has it; False
            keeps it visible to every query.
        freeze: switch off ``requires_grad`` of all parameters but the prefix's until :func:`unpatch`.
        fix_seq2seq_layout: read encoder-decoder prefixes of PEFT layer by layer. PEFT lets layers share them by a
            mistake that trained checkpoints depend on. Only with a PEFT model; a ``PrefixKV`` says which layout it
            has.
        packing: leave padding out of training steps where labels allow it; False, only with a prefix, computes it.
        logits: ``"labelled"`` has training steps of a causal language model compute only the logits that predict a
            label, [1, M, V] in the order of the batch (those of first tokens before all others); loss and gradients
            are equal. Evaluation gives all logits.
        peft_bugs: have PEFT's numbers also where its prompts are put wrong: sequences padded on the left and
            ``position_ids``, which it drops (CAUSAL_LM), pooling of the last column (SEQ_CLS), labels (TOKEN_CLS).
            PEFT's own code then runs such calls. By default they are right, and a notice says so once.
        strict: raise where the default is to run PEFT's own code, or to put a prompt before every sample, with one
            warning: here for a model, and in each call that needs it.
        backend: as in :func:`peftkern.prefix_attention`.

    Returns:
        ``model``.

    Raises:
        ValueError: naming what does not fit: a model patched already, a prefix of another shape, an adapter of
            another type; for a ``PrefixKV``, or with ``strict``, a model that would not compute the right thing.

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
    if any(PATCH in module.__dict__ for module in model.modules()):
        raise ValueError("model: expected one that is not patched, got a patched one; unpatch(model) first")
    if logits not in ("all", "labelled"):
        raise ValueError(f"logits: expected 'all' or 'labelled', got {logits!r}")
    # A window can hide the prefix only where the prefix has positions.
    options = PrefixOptions(in_window=prefix_in_window and shift_positions, backend=backend)
    is_prompt = _adapts_prompt(model) if prefix is None else is_embedding_prompt(prefix)
    if is_prompt and not (shift_positions and prefix_in_window and packing):
        raise ValueError(
            "shift_positions, prefix_in_window, packing: expected True, as a prompt is rows of the model's, got False"
        )
    if peft_bugs and not (is_prompt and prefix is None):
        raise ValueError("peft_bugs: expected False but for a PEFT model with a prompt, got True")
    if prefix is None:
        if not is_peft_model(model):
            raise ValueError(f"prefix: expected a PrefixKV, as {type(model).__name__} is no PEFT model, got None")
        if not shift_positions:
            raise ValueError("shift_positions: expected True, as PEFT counts the prefix's positions, got False")
        _check_adapters(model)
        if is_prompt:
            _patch_peft_prompt(model, peft_bugs, options, logits, strict)
        else:
            _patch_peft_prefix(model, fix_seq2seq_layout, options, packing, logits, strict)
        return model
    if fix_seq2seq_layout:
        raise ValueError(
            "fix_seq2seq_layout: expected False, as a PrefixKV knows its layout (peft_seq2seq_layout), got True"
        )
    base = _find_base(model)
    if is_embedding_prompt(prefix):
        _patch_prompt(model, base, ModulePrompt(prefix, base, freeze=freeze), options, logits, strict)
    elif is_layer_prefix(prefix):
        source = ModulePrefix(prefix, shift_positions=shift_positions, freeze=freeze)
        PrefixPatch(model, base, source, options, packing=packing, logits=logits, strict=strict).install()
    else:
        raise ValueError(f"prefix: expected a PrefixKV or a SoftPrompt, got {type(prefix).__name__}")
    return model


def unpatch(model: Model) -> Model:
    """Takes the prefix out again: parameters, config and outputs are, to the bit, those of the model unpatched.

    A ``PrefixKV`` keeps its values, and is a submodule only while the model is patched.

    Raises:
        ValueError: if ``model`` is not the object that was patched.
    """
    change: Patch | None = model.__dict__.get(PATCH)
    if change is None:
        raise ValueError(f"model: expected what was given to patch, got a {type(model).__name__} that is not patched")
    change.remove()
    return model


def explain(model: nn.Module) -> str:
    """One line on how the batches of a patched model run, and why they do not run faster.

    Raises:
        ValueError: if ``model`` has not been patched.
    """
    change: Patch | None = getattr(model, PATCH, None)
    if change is None:
        raise ValueError(f"model: expected one that was given to patch, got {type(model).__name__}")
    return change.explain()


@contextlib.contextmanager
def patched(model: Model, prefix: nn.Module | None = None, **options: Any) -> Iterator[Model]:
    """Within the block, ``model`` is patched. Arguments as for :func:`patch`."""
    patch(model, prefix, **options)
    try:
        yield model
    finally:
        unpatch(model)


def _adapts_prompt(model: nn.Module) -> bool:
    """Whether the adapters of a PEFT model are prompts at the embedding."""
    return is_peft_model(model) and any(
        config.peft_type.value in PROMPT_TYPES for config in cast(Any, model).peft_config.values()
    )


def _check_adapters(model: nn.Module) -> None:
    """Raise ValueError unless the adapters of a PEFT model are ones that peftkern knows."""
    known = (*KEY_VALUE_TYPES, *PROMPT_TYPES)
    for name, config in cast(Any, model).peft_config.items():
        kind = config.peft_type.value
        if kind not in known:
            raise ValueError(
                f"model: expected {', '.join(known[:-1])} or {known[-1]} adapters, got {kind} ({name!r}); to train a "
                "prefix beside it, patch(model, PrefixKV(...))"
            )


def _fall_back(
    model: nn.Module, way: str, error: ValueError, logits: str, strict: bool, keeps_bugs: bool = False
) -> None:
    """Leave a PEFT model to PEFT, or raise."""
    reason = str(error).removeprefix("model: ")
    if strict:
        raise ValueError(f"model: {reason}; PEFT's own code would run it, which strict=True rules out") from error
    if logits != "all":
        raise ValueError(f"logits: expected 'all', got {logits!r}; {reason}") from error
    FallbackPatch(model, way, reason, keeps_bugs=keeps_bugs).install()


def _patch_peft_prefix(
    model: nn.Module, fix_seq2seq_layout: bool, options: PrefixOptions, packing: bool, logits: str, strict: bool
) -> None:
    base = _outermost(model)
    try:
        source = PeftPrefix(model, fix_seq2seq_layout=fix_seq2seq_layout)
        PrefixPatch(model, base, source, options, packing=packing, logits=logits, strict=strict).install()
    except LogitsError:
        raise
    except ValueError as error:
        if fix_seq2seq_layout:
            raise
        _fall_back(model, "the prefix is copied for every sample", error, logits, strict)


def _patch_peft_prompt(model: nn.Module, peft_bugs: bool, options: PrefixOptions, logits: str, strict: bool) -> None:
    for name, config in cast(Any, model).peft_config.items():
        if config.task_type is None:
            raise ValueError(
                f"model: expected a task_type in the configuration of adapter {name!r}, without which PEFT uses no "
                "prompt, got None"
            )
    try:
        source = PeftPrompt(model, peft_bugs=peft_bugs)
        PromptPatch(model, _outermost(model), source, options, logits=logits, strict=strict).install()
    except LogitsError:
        raise
    except ValueError as error:
        _fall_back(model, "the prompt is put before every sample", error, logits, strict, peft_bugs)


def _patch_prompt(
    model: nn.Module, base: PreTrainedModel, source: ModulePrompt, options: PrefixOptions, logits: str, strict: bool
) -> None:
    try:
        PromptPatch(model, base, source, options, logits=logits, strict=strict).install()
    except LogitsError:
        raise
    except ValueError as error:
        reason = str(error).removeprefix("model: ")
        if strict:
            raise ValueError(f"model: the prompt cannot run once for all samples: {reason}") from error
        if logits != "all":
            raise ValueError(f"logits: expected 'all', got {logits!r}; {reason}") from error
        ConcatenationPatch(model, base, source, reason).install()


def _find_base(model: nn.Module) -> PreTrainedModel:
    """The outermost Hugging Face model in ``model``, which has no prompt or prefix of PEFT's."""
    for module in model.modules():
        if is_peft_model(module) and has_prompt(module):
            raise ValueError(
                "prefix: expected None, as the PEFT model has a prompt or prefix of its own, got another one"
            )
    return _outermost(model)


def _outermost(model: nn.Module) -> PreTrainedModel:
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise ValueError(f"model: expected a transformers PreTrainedModel, or one inside, got {type(model).__name__}")
