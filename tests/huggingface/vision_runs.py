# SPDX-License-Identifier: Apache-2.0
"""What stock models that read images compute behind a prefix or a prompt, and the same calls of patched models.

The reference is PEFT's where PEFT runs such a call. Where it does not, it is made by hand: a cache that holds the
prefix, or embeddings of the prompt before those of the tokens, with the positions that the model counts.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache

import peftkern
from peftkern import PrefixKV, SoftPrompt
from tests.huggingface.models import BATCH, PREFIX
from tests.huggingface.vision_models import IMAGE_TOKEN, VISION, vision_model

__all__ = [
    "KINDS", "Step", "by_hand", "module_of", "new_tokens", "patched", "peft_model", "step", "tokens_by_hand",
    "values_of",
]  # fmt: skip

KINDS = ("prefix", "prompt", "PrefixKV", "SoftPrompt")
NEW = 4
GREEDY: dict[str, Any] = {
    "max_new_tokens": NEW,
    "min_new_tokens": NEW,
    "do_sample": False,
    "pad_token_id": 0,
    "bad_words_ids": [[IMAGE_TOKEN]],
}
FORBIDDEN = torch.tensor([IMAGE_TOKEN, 2])
"""Tokens that generation leaves out: an image that is not there, and the end of the sequence."""


@dataclasses.dataclass
class Step:
    """What one forward and backward yields: logits at tokens [N, V], the gradient of the prefix or prompt."""

    loss: Tensor
    logits: Tensor
    gradient: Tensor


def peft_model(name: str, kind: str) -> Any:
    """PEFT's model with the same values at every call."""
    model = vision_model(name)
    text = model.config.get_text_config()
    geometry = {"num_layers": text.num_hidden_layers, "num_attention_heads": 2, "token_dim": 32}
    if kind == "prompt":
        geometry = {"num_layers": 1, "num_attention_heads": 1, "token_dim": 64}
    config = PrefixTuningConfig if kind == "prefix" else PromptTuningConfig
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = get_peft_model(model, config(task_type="CAUSAL_LM", num_virtual_tokens=PREFIX, **geometry))
        nn.init.normal_(model.prompt_encoder["default"].embedding.weight, std=0.5)
    return model


def module_of(name: str, kind: str) -> Any:
    """The PrefixKV or SoftPrompt with the same values at every call, those of :func:`peft_model`."""
    text = VISION[name].arguments["text_config"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        if kind in ("prompt", "SoftPrompt"):
            return SoftPrompt(None, PREFIX, embed_dim=64, init=torch.randn(PREFIX, 64) * 0.5)
        layers = text["num_hidden_layers"]
        module = PrefixKV(None, PREFIX, num_layers=layers, num_kv_heads=2, head_dim=16)
        nn.init.normal_(module.trainable[0], std=0.5)
        return module


def values_of(name: str, kind: str) -> Any:
    """The module with the values that :func:`patched` trains."""
    module = module_of(name, kind)
    if kind in ("prefix", "prompt"):
        (parameter,) = module.parameters()
        values = peft_model(name, kind).prompt_encoder["default"].embedding.weight.detach()
        with torch.no_grad():
            parameter.copy_(values.view(parameter.shape))
    return module


def patched(name: str, kind: str, **options: Any) -> Any:
    """The patched model."""
    if kind in ("prefix", "prompt"):
        return peftkern.patch(peft_model(name, kind), **options)
    return peftkern.patch(vision_model(name), module_of(name, kind), freeze=True, **options)


def _finish(out: Any, batch: dict[str, Any], trained: Tensor) -> Step:
    out.loss.backward()
    logits = out.logits[:, out.logits.shape[1] - batch["input_ids"].shape[1] :]
    mask = batch["attention_mask"]
    logits = logits.flatten(0, 1) if mask is None else logits[mask.bool()]
    assert trained.grad is not None
    return Step(out.loss.detach(), logits.detach().clone(), trained.grad.clone())


def step(model: Any, batch: dict[str, Any]) -> Step:
    """A training step of a PEFT model, or of a patched one."""
    model.train()
    model.zero_grad(set_to_none=True)
    (trained,) = (p for p in model.parameters() if p.requires_grad)
    return _finish(model(**batch), batch, trained)


@torch.no_grad()
def new_tokens(model: Any, batch: dict[str, Any]) -> Tensor:
    """Greedy tokens [B, NEW]."""
    model.eval()
    batch = {name: x for name, x in batch.items() if name != "labels" and x is not None}
    return model.generate(**batch, **GREEDY)[:, -NEW:]


def positions_of(model: Any, batch: dict[str, Any], *, from_first: bool) -> Tensor:
    """[B, S] or [3, B, S], the positions of the tokens without what is before them.

    Args:
        model: stock.
        batch: of a call.
        from_first: padding before the first token takes no positions.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"]
    if hasattr(model.model, "get_rope_index"):
        names = ("image_grid_thw", "mm_token_type_ids")
        given = {name: batch[name] for name in names if name in batch}
        return model.model.get_rope_index(ids, attention_mask=mask, **given)[0]
    steps = torch.arange(ids.shape[1]).expand(len(ids), -1)
    first = mask.argmax(1, keepdim=True) if from_first and mask is not None else 0
    steps = (steps - first).clamp(min=0)
    return steps + 1 if type(model).__name__.startswith("PaliGemma") else steps


def _cache(module: PrefixKV, model: Any, batch: int) -> DynamicCache:
    """A cache with a copy of the prefix for every sample; a layer of cross attention has none."""
    cache = DynamicCache()
    cross = getattr(model.config.get_text_config(), "cross_attention_layers", ())
    for layer, (key, value) in enumerate(module.layer_kv()):
        if layer not in cross:
            cache.update(key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1), layer)
    return cache


def _call_by_hand(model: Any, module: Any, batch: dict[str, Any], *, from_first: bool) -> dict[str, Any]:
    """Arguments of the stock model."""
    batch = dict(batch)
    positions = positions_of(model, batch, from_first=from_first) + PREFIX
    mask = batch["attention_mask"]
    mask = torch.ones_like(batch["input_ids"]) if mask is None else mask
    batch["attention_mask"] = nn.functional.pad(mask, (PREFIX, 0), value=1)
    if "token_type_ids" in batch:  # the mask counts the prefix as well
        batch["token_type_ids"] = nn.functional.pad(batch["token_type_ids"], (PREFIX, 0))
    if isinstance(module, PrefixKV):
        return {**batch, "position_ids": positions, "past_key_values": _cache(module, model, len(mask))}
    if "cross_attention_mask" in batch:  # images follow the prompt, so it does not see them
        batch["cross_attention_mask"] = nn.functional.pad(batch["cross_attention_mask"], (0, 0, 0, 0, PREFIX, 0))
    first = 1 if type(model).__name__.startswith("PaliGemma") else 0
    before = torch.arange(first, PREFIX + first).expand(*positions.shape[:-1], -1)
    tokens = model.get_input_embeddings()(batch.pop("input_ids"))
    batch["inputs_embeds"] = torch.cat([module.weight.expand(len(tokens), -1, -1), tokens], 1)
    batch["position_ids"] = torch.cat([before, positions], -1)
    if "labels" in batch:
        batch["labels"] = nn.functional.pad(batch["labels"], (PREFIX, 0), value=-100)
    return batch


def _alone(batch: dict[str, Any], row: int) -> dict[str, Any]:
    """A row of a batch without its padding."""
    kept = batch["attention_mask"][row].bool()
    length = batch["input_ids"].shape[1]
    sample = {}
    for name, x in batch.items():
        rows = x.shape[0] // BATCH  # patches of all images may be in one dimension
        x = x[row * rows : (row + 1) * rows]
        sample[name] = x[:, kept] if x.shape[:2] == (1, length) else x
    return sample


def by_hand(name: str, kind: str, batch: dict[str, Any], module: Any = None) -> Step:
    """A training step of the stock model.

    With a prompt, padding on the left would be between it and the text: samples then run one by one.
    """
    model = vision_model(name).train().requires_grad_(False)
    module = module_of(name, kind) if module is None else module
    (trained,) = module.parameters()
    mask, is_prompt = batch["attention_mask"], isinstance(module, SoftPrompt)
    if not is_prompt or mask is None or bool(mask[:, 0].all()):
        return _finish(model(**_call_by_hand(model, module, batch, from_first=False)), batch, trained)
    loss, count, rows = torch.zeros(()), 0, []
    for row in range(BATCH):
        sample = _alone(batch, row)
        out = model(**_call_by_hand(model, module, sample, from_first=False))
        labelled = int((sample["labels"] != -100).sum())
        loss, count = loss + out.loss * labelled, count + labelled
        rows.append(out.logits[0, PREFIX:].detach())
    loss = loss / count
    loss.backward()
    assert trained.grad is not None
    return Step(loss.detach(), torch.cat(rows), trained.grad.clone())


@torch.no_grad()
def tokens_by_hand(name: str, kind: str, batch: dict[str, Any], module: Any = None) -> Tensor:
    """Greedy tokens [B, NEW], from a forward over the whole sequence for each of them.

    ``generate`` gives padding before the first token no positions. With a prompt, samples run one by one.
    """
    module = module_of(name, kind) if module is None else module
    batch = {k: x for k, x in batch.items() if k != "labels"}
    if isinstance(module, SoftPrompt) and len(batch["input_ids"]) > 1:
        samples = [_alone(batch, row) for row in range(BATCH)]
        return torch.cat([tokens_by_hand(name, kind, sample, module) for sample in samples])
    model = vision_model(name).eval()
    for _ in range(NEW):
        arguments = _call_by_hand(model, module, batch, from_first=True)
        token = model(**arguments).logits[:, -1:].index_fill(-1, FORBIDDEN, float("-inf")).argmax(-1)
        batch["input_ids"] = torch.cat([batch["input_ids"], token], 1)
        for key, fill in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", int("pali" in name))):
            if batch.get(key) is not None:
                batch[key] = nn.functional.pad(batch[key], (0, 1), value=fill)
        if "cross_attention_mask" in batch:
            last = batch["cross_attention_mask"][:, -1:]
            batch["cross_attention_mask"] = torch.cat([batch["cross_attention_mask"], last], 1)
    return batch["input_ids"][:, -NEW:]
