# SPDX-License-Identifier: Apache-2.0
"""What stock models compute with a prefix or a prompt, by PEFT or by hand, and the same calls of patched models.

By hand means: the prefix lies in a ``DynamicCache``, a copy for every sample; the prompt is concatenated with the
embeddings of the tokens. Logits are those at tokens, [N, V]; batches are those of :mod:`tests.huggingface.models`.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

import torch
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionCacheLayerMixin

from peftkern import PrefixKV, SoftPrompt
from peftkern.model_info import given_cache
from tests.huggingface import models
from tests.huggingface.families import tiny
from tests.huggingface.models import BATCH, IDS, LEFT, ONES, PREFIX, RIGHT, SEQ

__all__ = [
    "MASKS", "NEW_TOKENS", "SHARING_IDS", "SHARING_LEFT", "SHARING_MASKS", "Step", "bare", "cached_geometry",
    "copies", "generate", "generate_alone", "generate_behind_cache", "generate_behind_prompt", "has_window",
    "language_model", "peft_model", "prefix_by_hand", "prompt_by_hand", "sharing_step", "step", "step_alone",
    "without_adapter",
]  # fmt: skip

MASKS: dict[str, Tensor | None] = {"none": None, "right": RIGHT, "left": LEFT}
#: Rows that begin with the same four tokens. Behind padding on the left, only those with equal padding do.
SHARED = 4
SHARING_IDS = torch.cat([IDS[:1, :SHARED].expand(BATCH, -1), IDS[:, SHARED:]], 1)
SHARING_LEFT = LEFT[[0, 0, 2]]
SHARING_MASKS: dict[str, Tensor | None] = {"none": None, "right": RIGHT, "left": SHARING_LEFT}
NEW_TOKENS = 5
_GREEDY = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}


@dataclasses.dataclass
class Step:
    """What one forward and backward yields: logits at tokens [N, V], gradients of the prefix or prompt alone."""

    loss: Tensor
    logits: Tensor
    gradients: dict[str, Tensor | None]


def peft_model(family: str, kind: str, dtype: torch.dtype, *, stock: bool, told: bool = False) -> PeftModel:
    """PEFT's model with ``kind`` "prefix" or "prompt", the same values at every call; as PEFT has it if ``stock``.

    ``told``: the geometry is not left to PEFT's reading of the config.
    """
    model = tiny.tiny_model(family, dtype)
    kinds = {"prefix": PrefixTuningConfig, "prompt": PromptTuningConfig}
    geometry = _geometry(model, kind) if told else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        config = kinds[kind](task_type="CAUSAL_LM", num_virtual_tokens=PREFIX, **geometry)
        model = get_peft_model(model, config).to(dtype)
        if kind == "prompt":
            nn.init.normal_(model.prompt_encoder[model.active_adapter].embedding.weight, std=0.5)
    return models.find_caches(model, patched=False) if stock else model


def _geometry(model: Any, kind: str) -> dict[str, int]:
    """What PEFT may be told. Of a prompt it uses the width alone."""
    if kind == "prompt":
        width = model.get_input_embeddings().weight.shape[1]
        return {"num_layers": 1, "num_attention_heads": 1, "token_dim": width}
    own = cached_geometry(model)
    heads = own["num_kv_heads"]
    return {"num_layers": own["num_layers"], "num_attention_heads": heads, "token_dim": heads * own["head_dim"]}


@torch.no_grad()
def cached_geometry(model: Any) -> dict[str, int]:
    """That of the cache which a model makes for itself, as arguments of :class:`peftkern.PrefixKV`."""
    cache = given_cache(model.eval()(input_ids=IDS, use_cache=True))
    key = next(layer.keys for layer in cache.layers if isinstance(layer, DynamicLayer))
    return {"num_layers": len(cache.layers), "num_kv_heads": key.shape[1], "head_dim": key.shape[3]}


def labels_behind(mask: Tensor | None, ids: Tensor = IDS) -> Tensor:
    """The tokens, ignored at padding."""
    return ids if mask is None else ids.masked_fill(mask == 0, -100)


def _prepare(model: nn.Module, *, trains: bool = True) -> None:
    tiny.forget(model)
    model.train(trains)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)


def _at_tokens(logits: Tensor, mask: Tensor | None) -> Tensor:
    """[B, S or P + S, V] -> [N, V]."""
    tokens = (ONES if mask is None else mask).bool()
    return logits.detach()[:, logits.shape[1] - SEQ :][tokens].clone()


def _finish(loss: Tensor, logits: Tensor, trained: nn.Module) -> Step:
    if not loss.requires_grad:
        raise ArithmeticError("the loss does not depend on the prefix or prompt")
    loss.backward()
    gradients = {
        name: None if p.grad is None else p.grad.clone() for name, p in trained.named_parameters() if p.requires_grad
    }
    return Step(loss.detach().clone(), logits, gradients)


def step(model: nn.Module, trained: nn.Module, mask: Tensor | None) -> Step:
    """A training step of a PEFT model, or of a patched one."""
    _prepare(model)
    out = model(input_ids=IDS, labels=labels_behind(mask), **({} if mask is None else {"attention_mask": mask}))
    return _finish(out.loss, _at_tokens(out.logits, mask), trained)


def sharing_step(model: nn.Module, mask: Tensor | None) -> Step:
    """A training step of a plain model, or of a patched one, on rows that begin alike; labels are what follows.

    The gradients of all parameters are one tensor: those of biases before a softmax are 0 but for rounding.
    """
    _prepare(model)
    labels = labels_behind(mask, SHARING_IDS).clone()
    labels[:, :SHARED] = -100
    out = model(input_ids=SHARING_IDS, labels=labels, **({} if mask is None else {"attention_mask": mask}))
    result = _finish(out.loss, _at_tokens(out.logits, mask), model)
    known = {name: gradient for name, gradient in result.gradients.items() if gradient is not None}
    return Step(result.loss, result.logits, {",".join(known): torch.cat([x.flatten() for x in known.values()])})


def _weighted(model: nn.Module, trained: nn.Module, mask: Tensor, run: Any) -> Step:
    """Each sample without its padding, by ``run`` from [1, T] tokens to (loss, logits [1, T, V]); the mean loss."""
    _prepare(model)
    loss, rows = torch.zeros(()), []
    for ids, kept in zip(IDS, mask.bool(), strict=True):
        tiny.forget(model)
        of_sample, logits = run(ids[kept][None])
        loss = loss + of_sample * kept.sum() / mask.sum()  # every token is predicted, the first by the prompt
        rows.append(logits[0, -int(kept.sum()) :].detach())
    return _finish(loss, torch.cat(rows), trained)


def step_alone(model: PeftModel, mask: Tensor) -> Step:
    """A training step of a PEFT model with a prompt whose samples run one by one, without their padding."""

    def run(ids: Tensor) -> tuple[Tensor, Tensor]:
        out = model(input_ids=ids, labels=ids)
        return out.loss, out.logits

    return _weighted(model, model.prompt_encoder, mask, run)


@torch.no_grad()
def without_adapter(model: PeftModel, mask: Tensor | None) -> Tensor:
    """Logits at tokens of the bare model, in train mode as :func:`step` has them."""
    _prepare(model)
    with model.disable_adapter():
        out = model(input_ids=IDS, **({} if mask is None else {"attention_mask": mask}))
    return _at_tokens(out.logits, mask)


@torch.no_grad()
def generate(model: Any, mask: Tensor, ids: Tensor = IDS, **options: Any) -> Tensor:
    """Greedy tokens [B, NEW_TOKENS] of a PEFT model, or of a patched one."""
    _prepare(model, trains=False)
    return model.generate(input_ids=ids, attention_mask=mask, **_GREEDY, **options)[:, -NEW_TOKENS:]


def generate_alone(model: Any, mask: Tensor, **options: Any) -> Tensor:
    """Greedy tokens of a model whose samples run one by one, without their padding."""
    samples = [ids[kept][None] for ids, kept in zip(IDS, mask.bool(), strict=True)]
    return torch.cat([generate(model, torch.ones_like(ids), ids, **options) for ids in samples])


def copies(model: Any, prefix: PrefixKV, *, as_configured: bool = False) -> DynamicCache:
    """A cache that holds the prefix for every sample.

    It is laid out as PEFT has it, with keys and values in all layers, or ``as_configured``, where layers without
    attention keep their own states. A model with recurrent layers can only take the latter.
    """
    kv = [pair and tuple(x.to(model.dtype).expand(BATCH, -1, -1, -1) for x in pair) for pair in prefix.layer_kv()]
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    recurrent = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)
    if not recurrent and not as_configured:
        return DynamicCache(kv)
    for index, (layer, pair) in enumerate(zip(cache.layers, kv, strict=False)):
        if isinstance(layer, DynamicLayer) and pair is not None:
            cache.update(*pair, index)
    return cache


def _behind(mask: Tensor | None) -> dict[str, Tensor]:
    return {} if mask is None else {"attention_mask": models.behind_prompt(mask)}


def _places(model: Any) -> dict[str, Tensor]:
    """Positions behind the prefix, for a model that never asks its cache for its length."""
    source = inspect.getsource(inspect.unwrap(type(model.base_model).forward))
    asks = "get_seq_length" in source or "create_recurrent_attention_mask" not in source
    return {} if asks else {"position_ids": torch.arange(PREFIX, PREFIX + SEQ)[None]}


@torch.no_grad()
def bare(model: Any, mask: Tensor) -> Tensor:
    """Logits at tokens of a plain model."""
    _prepare(model)
    return _at_tokens(model(input_ids=IDS, attention_mask=mask).logits, mask)


def prefix_by_hand(model: Any, prefix: PrefixKV, cache: DynamicCache, mask: Tensor | None) -> Step:
    """A training step of a plain model with the prefix in its cache."""
    _prepare(model)
    prefix.zero_grad(set_to_none=True)
    inputs = {**_behind(mask), **_places(model)}
    out = model(input_ids=IDS, labels=labels_behind(mask), past_key_values=cache, **inputs)
    return _finish(out.loss, _at_tokens(out.logits, mask), prefix)


def prompt_by_hand(model: Any, prompt: SoftPrompt, mask: Tensor | None, *, alone: bool = False) -> Step:
    """A training step of a plain model on embeddings behind the prompt. ``alone``: samples without their padding."""
    prompt.zero_grad(set_to_none=True)

    def run(ids: Tensor, labels: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        labels = nn.functional.pad(labels, (PREFIX, 0), value=-100)
        out = model(inputs_embeds=_embeddings(model, prompt.weight, ids), labels=labels, **_behind(mask))
        return out.loss, out.logits

    if alone:
        assert mask is not None
        return _weighted(model, prompt, mask, lambda ids: run(ids, ids))
    _prepare(model)
    loss, logits = run(IDS, labels_behind(mask), mask)
    return _finish(loss, _at_tokens(logits, mask), prompt)


def _embeddings(model: Any, prompt: Tensor, ids: Tensor) -> Tensor:
    tokens = model.get_input_embeddings()(ids)
    return torch.cat([prompt.to(tokens.dtype).expand(ids.shape[0], -1, -1), tokens], 1)


@torch.no_grad()
def generate_behind_cache(model: Any, cache: DynamicCache, mask: Tensor, **options: Any) -> Tensor:
    """Greedy tokens of a plain model with the prefix in its cache.

    ``generate`` leaves out the tokens that the cache holds, so any ids stand for the prefix.
    """
    _prepare(model, trains=False)
    ids, mask = nn.functional.pad(IDS, (PREFIX, 0), value=3), models.behind_prompt(mask)
    out = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **_GREEDY, **options)
    return out[:, -NEW_TOKENS:]


@torch.no_grad()
def generate_behind_prompt(model: Any, prompt: Tensor, mask: Tensor, *, alone: bool = True) -> Tensor:
    """Greedy tokens of a plain model on embeddings behind the prompt.

    ``alone``: samples without their padding. Else the padding lies between prompt and text; ``generate`` takes
    positions from the mask, so only windows count it.
    """
    _prepare(model, trains=False)
    samples = (
        [(ids[kept][None], None) for ids, kept in zip(IDS, mask.bool(), strict=True)] if alone else [(IDS, mask)]
    )
    rows = []
    for ids, own in samples:
        embeddings, own = _embeddings(model, prompt, ids), torch.ones_like(ids) if own is None else own
        out = model.generate(inputs_embeds=embeddings, attention_mask=models.behind_prompt(own), **_GREEDY)
        rows.append(out[:, -NEW_TOKENS:])
    return torch.cat(rows)


def language_model(model: Any) -> Any:
    """The causal language model in a model that reads images, whose ``generate`` may refuse embeddings."""
    config = model.config.get_text_config(decoder=True)
    if config is model.config or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return model
    twin = AutoModelForCausalLM.from_config(config).to(model.dtype)
    try:
        twin.base_model.load_state_dict(model.get_decoder().state_dict())
    except RuntimeError:  # built in another way
        return model
    twin.set_output_embeddings(model.get_output_embeddings())
    twin.generation_config = model.generation_config
    return twin


def has_window(model: Any) -> bool:
    """Whether the config speaks of windows or chunks of tokens, in which padding takes part."""
    config = model.config.get_text_config(decoder=True).to_dict()
    named = any(value and _WINDOW.fullmatch(name) for name, value in config.items())
    return named or "sliding" in str(config.get("layer_types"))


_WINDOW = re.compile(r"(sliding|attention|local)_(window|chunk|attention|attn_chunk)\w*|window_size")
