# SPDX-License-Identifier: Apache-2.0
"""The public calls: put a prefix into a model, and remove it again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar, cast

from torch import nn
from transformers import PreTrainedModel

from ..argument_types import checks_arguments
from ..backends.registry import get_backend
from ..model_info import check_not_patched
from .around_text import reads_more
from .cache import PrefixOptions
from .call_options import CallOptions, LogitsError
from .concatenation_patch import ConcatenationPatch
from .fallback_patch import FallbackPatch
from .gated_patch import GatedPatch
from .peft_model import has_prompt, is_peft_model
from .prefix_patch import PrefixPatch
from .prompt_patch import PromptPatch
from .share_patch import NoPrefix, SharePatch
from .sources.module_prefix import ModulePrefix, is_layer_prefix
from .sources.module_prompt import ModulePrompt, is_embedding_prompt
from .sources.peft_prefix import KEY_VALUE_TYPES, PeftPrefix
from .sources.peft_prompt import PROMPT_TYPES, PeftPrompt
from .wiring import PATCH, Patch, changing

__all__ = ["explain", "patch", "patched", "unpatch"]

#: PEFT's name of the adapters that are gated prefixes of attention modules.
ATTENTION_TYPE = "ADAPTION_PROMPT"

Model = TypeVar("Model", bound=nn.Module)


@checks_arguments()
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
    share: str | None = None,
    backend: str = "auto",
) -> Model:
    """Makes a model compute its attention with :func:`peftkern.prefix_attention`, which reads the prefix in place.

    ::

        peft_model ─► get_prompt ─► cache with views of the parameter ─┐
                                                                       ├─► each layer: prefix_attention(q, k, v,
        model, PrefixKV ─► hook on the backbone ───────────────────────┘               prefix_k, prefix_v)

    PEFT models with PREFIX_TUNING or CARTRIDGE adapters of any task type keep PEFT's parameters, checkpoints,
    ``generate`` and results. Adapters may be added, switched and disabled afterwards. Activation checkpointing works.

    In PEFT models with PROMPT_TUNING, P_TUNING, MULTITASK_PROMPT_TUNING or CPT adapters, the prompt runs through a
    causal model once per batch instead of once per sample (:mod:`.packing`), with PEFT's loss, outputs and gradients.
    ``generate`` keeps the prompt's keys as a prefix that all rows and beams share.

    Padding in batches of a causal model is skipped where labels or ``logits_to_keep`` show that its outputs are not
    used; outputs at such padding are those of a neighbouring token. If ``position_ids`` without a mask divide a row
    into several sequences, each sequence follows the prefix or prompt.

    Calls of a ``PeftModel`` and its ``generate`` take ``adapter_names``, one name per sample (``"__base__"`` for no
    adapter), for adapters of different lengths of one of these two kinds.

    In PEFT models with ADAPTION_PROMPT adapters (LLaMA-Adapter), attention and adapter are computed together, from
    the same queries; training steps skip padding.

    In any other model, ``prefix`` becomes a submodule of the Hugging Face model, named ``peftkern_prefix`` (or
    ``peftkern_prompt``). Optimizers, ``Trainer`` and DDP therefore see its parameters, and ``state_dict`` and the
    checkpoints of ``Trainer`` contain it. Beside other adapters (LoRA), ``save_pretrained`` saves it to a subfolder
    of its name, from which ``load_adapter`` and :func:`peftkern.load_prefix` read it. ``attention_mask``,
    ``position_ids`` and caches describe the sequence alone. ``requires_grad`` of the model's own parameters does not
    change unless ``freeze`` is set.

    No ``forward`` or ``generate`` is replaced, so the model may be wrapped before or after (accelerate, DDP, FSDP2,
    ``torch.compile``, TRL). A trial on a few tokens compares the patched model with the stock model, whose cache
    contains the same prefix: with and without padding, for a decoding step, and on packed rows. If they differ, a
    PEFT model runs PEFT's own code and a ``SoftPrompt`` is put before every sample, with one warning; a ``PrefixKV``
    is refused. ``peftkern.explain(model)`` reports how a model runs and why.

    Only this instance changes, and nothing changes when an error is raised. Models that share a config object share
    its attention implementation.

    Args:
        model: a ``PeftModel``, a ``PreTrainedModel``, or a module that holds one (a ``PeftModel`` with LoRA).
        prefix: for a model without prefix adapters: :class:`peftkern.PrefixKV`, or for a causal model
            :class:`peftkern.SoftPrompt`. A bank needs ``prefix_ids`` in each forward and ``generate``, or
            ``prompt_ids`` in each forward; a bank of prompts does not support ``generate``.
        shift_positions: the sequence's positions start after the prefix, as in PEFT. False: they start at 0, so the
            prefix does not shorten the longest usable sequence, and sliding windows do not count it. Only with
            ``prefix``. In layers with a shorter prefix than the longest, it ends directly before the sequence.
        prefix_in_window: sliding windows count the prefix as positions before the sequence, as in PEFT. False: every
            query sees the prefix.
        freeze: clear ``requires_grad`` of all parameters except the prefix's until :func:`unpatch`.
        fix_seq2seq_layout: give every decoder layer of an encoder-decoder its own prefix. In PEFT, layers share
            prefixes because of a bug that trained checkpoints depend on. Only for a PEFT model; a ``PrefixKV`` has
            its own ``peft_seq2seq_layout``.
        packing: skip padding in training steps where labels permit. False, only with a prefix: compute it.
        logits: ``"labelled"``: training steps of a causal language model compute only the logits that predict a
            label, [1, M, V] in the order of the batch (those of first tokens before all others). Loss and gradients
            do not change. Evaluation returns all logits.
        peft_bugs: reproduce PEFT's results where PEFT places prompts incorrectly: sequences padded on the left and
            ``position_ids``, which it drops (CAUSAL_LM), pooling of the last column (SEQ_CLS), labels (TOKEN_CLS),
            positions of images. With a prefix: where it places images incorrectly.
            PEFT's own code then runs such calls. By default they are computed correctly, with one warning.
        strict: raise where the default is to run PEFT's own code, or to put a prompt before every sample, with one
            warning. This applies to the model here, and to each later call that needs it.
        share: ``"prefixes"``: text with which several rows of a batch begin runs once, with or without a prefix or
            prompt. See :ref:`shared-text`. Calls may pass ``group_ids`` [B]; rows of different groups share nothing.
        backend: as in :func:`peftkern.prefix_attention`.

    Returns:
        ``model``.

    Raises:
        ValueError: for a model that is already patched, a prefix of the wrong shape, an adapter of an unsupported
            type, or a backend that does not exist; for a ``PrefixKV``, or with ``strict``, for a model that fails the
            trial.

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
    with changing(model):
        return _patch(
            model, prefix, shift_positions, prefix_in_window, freeze, fix_seq2seq_layout, packing, logits, peft_bugs,
            strict, share, backend,
        )  # fmt: skip


def _patch(
    model: Model,
    prefix: nn.Module | None,
    shift_positions: bool,
    prefix_in_window: bool,
    freeze: bool,
    fix_seq2seq_layout: bool,
    packing: bool,
    logits: str,
    peft_bugs: bool,
    strict: bool,
    share: str | None,
    backend: str,
) -> Model:
    """:func:`patch`, while no other thread changes the model."""
    _check_options(model, logits, share, backend)
    # A window can hide the prefix only if the prefix has positions.
    options = PrefixOptions(in_window=prefix_in_window and shift_positions, backend=backend)
    calls = CallOptions(packing=packing, logits=logits, strict=strict, share=share is not None)
    is_prompt = _adapts_prompt(model) if prefix is None else is_embedding_prompt(prefix)
    if is_prompt and not (shift_positions and prefix_in_window and packing):
        raise ValueError(
            "shift_positions, prefix_in_window, packing: expected True, because a prompt runs through the model, got "
            "False"
        )
    if peft_bugs and (prefix is not None or not (is_prompt or _reads_more(model))):
        raise ValueError(
            "peft_bugs: expected False except for a PEFT model with a prompt, or with images or sound, got True"
        )
    if prefix is None and share and not (_adapts_prefix(model) or _adapts_attention(model)):
        if freeze or fix_seq2seq_layout or not (shift_positions and prefix_in_window and packing):
            raise ValueError(
                "freeze, fix_seq2seq_layout, shift_positions, prefix_in_window, packing: expected their defaults, "
                "because there is no prefix, got others"
            )
        SharePatch(model, _find_base(model), NoPrefix(), options, calls).install()
        return model
    if prefix is None:
        _check_peft_model(model, shift_positions)
        if is_prompt:
            _patch_peft_prompt(model, peft_bugs, options, calls)
        elif _adapts_attention(model):
            _patch_peft_attention(model, fix_seq2seq_layout or not prefix_in_window, options, calls)
        else:
            _patch_peft_prefix(model, fix_seq2seq_layout, peft_bugs, options, calls)
        return model
    if fix_seq2seq_layout:
        raise ValueError(
            "fix_seq2seq_layout: expected False, because a PrefixKV has its own layout (peft_seq2seq_layout), got "
            "True"
        )
    base = _find_base(model)
    if is_embedding_prompt(prefix):
        _patch_prompt(model, base, ModulePrompt(prefix, base, freeze=freeze), options, calls)
    elif is_layer_prefix(prefix):
        source = ModulePrefix(prefix, shift_positions=shift_positions, freeze=freeze)
        PrefixPatch(model, base, source, options, calls).install()
    else:
        raise ValueError(f"prefix: expected a PrefixKV or a SoftPrompt, got {type(prefix).__name__}")
    return model


@checks_arguments()
def unpatch(model: Model) -> Model:
    """Removes the prefix: parameters, config and outputs are bitwise equal to those of the model before the patch.

    A ``PrefixKV`` keeps its values. It is a submodule only while the model is patched.

    Raises:
        ValueError: if ``model`` is not the object that was patched.
    """
    with changing(model):
        change: Patch | None = model.__dict__.get(PATCH)
        if change is None:
            got = f"a {type(model).__name__} that is not patched"
            raise ValueError(f"model: expected the object that was given to patch, got {got}")
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


@checks_arguments()
@contextlib.contextmanager
def patched(model: Model, prefix: nn.Module | None = None, **options: Any) -> Iterator[Model]:
    """Within the block, ``model`` is patched. Arguments as for :func:`patch`.

    The block may call :func:`unpatch` itself, and patch the model again, which then stays patched.
    """
    with changing(model):
        change = patch(model, prefix, **options).__dict__[PATCH]
    try:
        yield model
    finally:
        with changing(model):
            if model.__dict__.get(PATCH) is change:
                unpatch(model)


def _adapts_prompt(model: nn.Module) -> bool:
    """Whether the adapters of a PEFT model are prompts at the embedding."""
    return is_peft_model(model) and any(
        config.peft_type.value in PROMPT_TYPES for config in cast(Any, model).peft_config.values()
    )


def _adapts_prefix(model: nn.Module) -> bool:
    """Whether a PEFT model has adapters that are prefixes or prompts."""
    return is_peft_model(model) and any(
        config.peft_type.value in (*KEY_VALUE_TYPES, *PROMPT_TYPES)
        for config in cast(Any, model).peft_config.values()
    )


def _adapts_attention(model: nn.Module) -> bool:
    """Whether the adapters of a PEFT model are gated prefixes of its attention modules."""
    return is_peft_model(model) and any(
        config.peft_type.value == ATTENTION_TYPE for config in cast(Any, model).peft_config.values()
    )


def _reads_more(model: nn.Module) -> bool:
    """Whether a PEFT model has inputs other than text."""
    return is_peft_model(model) and reads_more(_outermost(model))


def _check_options(model: nn.Module, logits: str, share: str | None, backend: str) -> None:
    """Raise ValueError for a patched model, or for names that are unknown."""
    check_not_patched(model)
    if logits not in ("all", "labelled"):
        raise ValueError(f"logits: expected 'all' or 'labelled', got {logits!r}")
    if share not in (None, "prefixes"):
        raise ValueError(f"share: expected None or 'prefixes', got {share!r}")
    if backend != "auto":
        get_backend(backend)  # raises here and not in the first forward


def _check_peft_model(model: nn.Module, shift_positions: bool) -> None:
    """Raise ValueError unless ``model`` is a PEFT model with adapters that peftkern supports."""
    if not is_peft_model(model):
        raise ValueError(f"prefix: expected a PrefixKV, because {type(model).__name__} is not a PEFT model, got None")
    if not shift_positions:
        raise ValueError("shift_positions: expected True, because PEFT counts the prefix's positions, got False")
    known = (*KEY_VALUE_TYPES, *PROMPT_TYPES, ATTENTION_TYPE)
    for name, config in cast(Any, model).peft_config.items():
        kind = config.peft_type.value
        if kind not in known:
            raise ValueError(
                f"model: expected {', '.join(known[:-1])} or {known[-1]} adapters, got {kind} ({name!r}); to train a "
                "prefix together with it, patch(model, PrefixKV(...))"
            )


def _fall_back(model: nn.Module, way: str, error: ValueError, calls: CallOptions, keeps_bugs: bool = False) -> None:
    """Have a PEFT model run PEFT's own code, or raise."""
    reason = str(error).removeprefix("model: ")
    if calls.strict:
        raise ValueError(f"model: {reason}; PEFT's own code would run it, which strict=True rules out") from error
    _refuse(calls, reason, error)
    FallbackPatch(model, way, reason, keeps_bugs=keeps_bugs).install()


def _refuse(calls: CallOptions, reason: str, error: ValueError) -> None:
    """Raise for options that need packed batches, which the model cannot run."""
    if calls.logits != "all":
        raise ValueError(f"logits: expected 'all', got {calls.logits!r}; {reason}") from error
    if calls.share:
        raise ValueError(f"share: expected None, got 'prefixes'; {reason}") from error


def _patch_peft_prefix(
    model: nn.Module, fix_seq2seq_layout: bool, peft_bugs: bool, options: PrefixOptions, calls: CallOptions
) -> None:
    base = _outermost(model)
    try:
        source = PeftPrefix(model, fix_seq2seq_layout=fix_seq2seq_layout, peft_bugs=peft_bugs)
        PrefixPatch(model, base, source, options, calls).install()
    except LogitsError:
        raise
    except ValueError as error:
        if fix_seq2seq_layout:
            raise
        _fall_back(model, "the prefix is copied for every sample", error, calls)


def _patch_peft_attention(model: nn.Module, has_others: bool, options: PrefixOptions, calls: CallOptions) -> None:
    from .sources.peft_attention import PeftAttention  # imports peft, which not every user has

    if has_others:
        raise ValueError(
            "fix_seq2seq_layout, prefix_in_window: expected their defaults, because the adapter has neither layout "
            "nor positions, got others"
        )
    try:
        GatedPatch(model, _outermost(model), PeftAttention(model), options, calls).install()
    except LogitsError:
        raise
    except ValueError as error:
        _fall_back(model, "the adapter computes queries and keys again", error, calls)


def _patch_peft_prompt(model: nn.Module, peft_bugs: bool, options: PrefixOptions, calls: CallOptions) -> None:
    for name, config in cast(Any, model).peft_config.items():
        if config.task_type is None:
            raise ValueError(
                f"model: expected a task_type in the config of adapter {name!r}, without which PEFT uses no "
                "prompt, got None"
            )
    try:
        source = PeftPrompt(model, peft_bugs=peft_bugs)
        PromptPatch(model, _outermost(model), source, options, calls).install()
    except LogitsError:
        raise
    except ValueError as error:
        _fall_back(model, "the prompt is put before every sample", error, calls, peft_bugs)


def _patch_prompt(
    model: nn.Module, base: PreTrainedModel, source: ModulePrompt, options: PrefixOptions, calls: CallOptions
) -> None:
    try:
        PromptPatch(model, base, source, options, calls).install()
    except LogitsError:
        raise
    except ValueError as error:
        reason = str(error).removeprefix("model: ")
        if calls.strict:
            raise ValueError(f"model: the prompt cannot run once for all samples: {reason}") from error
        _refuse(calls, reason, error)
        ConcatenationPatch(model, base, source, reason).install()


def _find_base(model: nn.Module) -> PreTrainedModel:
    """The outermost Hugging Face model in ``model``. Raises ValueError if a PEFT prompt or prefix is in it."""
    for module in model.modules():
        if is_peft_model(module) and has_prompt(module):
            raise ValueError(
                "prefix: expected None, because the PEFT model has its own prompt or prefix, got another one"
            )
    return _outermost(model)


def _outermost(model: nn.Module) -> PreTrainedModel:
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise ValueError(f"model: expected a transformers PreTrainedModel, or one inside, got {type(model).__name__}")
