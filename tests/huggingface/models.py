# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of every attention kind, their inputs, and one training step that all tests share."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers as hf
from peft import (
    CartridgeConfig,
    CPTConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import Tensor, nn

import peftkern
from peftkern import PrefixKV
from peftkern.huggingface.wiring import PATCH

warnings.filterwarnings("ignore", message=".*does not support `output_attentions`.*")

VOCAB, BATCH, SEQ, PREFIX = 97, 3, 7, 5
FP32_TOLERANCE, FP64_TOLERANCE = 1e-5, 1e-10

_TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_STACK = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
_DECODER: dict[str, Any] = {**_TOKENS, **_STACK, "max_position_embeddings": 64}
_ENCODER: dict[str, Any] = {**_STACK, "vocab_size": VOCAB, "max_position_embeddings": 64, "num_labels": 3}
_GPT2: dict[str, Any] = {**_TOKENS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
_GEMMA: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 4}
_T5: dict[str, Any] = {
    **_TOKENS,
    **{"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 4, "num_heads": 4, "decoder_start_token_id": 0},
}
_BART: dict[str, Any] = {
    **{"vocab_size": VOCAB, "d_model": 64, "max_position_embeddings": 64},
    **{"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 128},
    **{"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 128},
}


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of model: how to build it, and PEFT's name of its task."""

    model: Callable[..., Any]
    config: Callable[..., Any]
    arguments: dict[str, Any]
    task: str = "CAUSAL_LM"

    @property
    def generates(self) -> bool:
        return self.task in ("CAUSAL_LM", "SEQ_2_SEQ_LM")


def _decoder(name: str, model: Callable[..., Any] | None = None, **arguments: Any) -> Family:
    config = getattr(hf, f"{name}Config")
    return Family(model or getattr(hf, f"{name}ForCausalLM"), config, {**_DECODER, **arguments})


FAMILIES: dict[str, Family] = {
    "llama (GQA)": _decoder("Llama", num_key_value_heads=2),
    "qwen2": _decoder("Qwen2", num_key_value_heads=2),
    "qwen3": _decoder("Qwen3", num_key_value_heads=2, head_dim=32),
    "mistral (window 4)": _decoder("Mistral", num_key_value_heads=2, sliding_window=4),
    "mistral (window 64)": _decoder("Mistral", num_key_value_heads=2, sliding_window=64),
    "gemma2 (softcap)": _decoder("Gemma2", **_GEMMA),
    "gemma3": Family(
        hf.Gemma3ForCausalLM,
        hf.Gemma3TextConfig,
        {**_DECODER, **_GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi3": _decoder("Phi3", num_key_value_heads=2),
    "gpt-oss (sinks)": _decoder(
        "GptOss",
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=4,
        experts_implementation="eager",
    ),
    "gpt2": Family(hf.GPT2LMHeadModel, hf.GPT2Config, _GPT2),
    "gpt-neox": _decoder("GPTNeoX"),
    "opt": _decoder("OPT", ffn_dim=128, word_embed_proj_dim=64),
    "gpt-bigcode (MQA)": Family(hf.GPTBigCodeForCausalLM, hf.GPTBigCodeConfig, {**_GPT2, "multi_query": True}),
    "llama4 (chunks)": Family(
        hf.Llama4ForCausalLM,
        hf.Llama4TextConfig,
        {**_DECODER, "num_key_value_heads": 2, "head_dim": 16, "attention_chunk_size": 4, "num_local_experts": 2},
    ),
    "gemma3n (shared KV)": Family(
        hf.Gemma3nForCausalLM,
        hf.Gemma3nTextConfig,
        {
            **_DECODER,
            **{"num_hidden_layers": 4, "num_kv_shared_layers": 2, "num_key_value_heads": 2, "head_dim": 16},
            **{"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
            **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "laurel_rank": 4},
            **{"intermediate_size": [128] * 4, "activation_sparsity_pattern": [0.0] * 4},
        },
    ),
    "bert": Family(hf.BertForSequenceClassification, hf.BertConfig, _ENCODER, "SEQ_CLS"),
    "roberta": Family(hf.RobertaForSequenceClassification, hf.RobertaConfig, _ENCODER, "SEQ_CLS"),
    "t5": Family(hf.T5ForConditionalGeneration, hf.T5Config, _T5, "SEQ_2_SEQ_LM"),
    "umt5 (bias per layer)": Family(hf.UMT5ForConditionalGeneration, hf.UMT5Config, _T5, "SEQ_2_SEQ_LM"),
    "bart": Family(hf.BartForConditionalGeneration, hf.BartConfig, _BART, "SEQ_2_SEQ_LM"),
}
"""One model of each attention kind. ``T5`` has four layers, so that PEFT's shared layers matter."""

TASKS: dict[str, Family] = {
    "llama SEQ_CLS": Family(
        hf.LlamaForSequenceClassification, hf.LlamaConfig, {**_DECODER, "num_labels": 3}, "SEQ_CLS"
    ),
    "llama TOKEN_CLS": Family(
        hf.LlamaForTokenClassification, hf.LlamaConfig, {**_DECODER, "num_labels": 3}, "TOKEN_CLS"
    ),
    "llama QUESTION_ANS": Family(hf.LlamaForQuestionAnswering, hf.LlamaConfig, _DECODER, "QUESTION_ANS"),
    "llama FEATURE_EXTRACTION": Family(hf.LlamaModel, hf.LlamaConfig, _DECODER, "FEATURE_EXTRACTION"),
    "bert TOKEN_CLS": Family(hf.BertForTokenClassification, hf.BertConfig, _ENCODER, "TOKEN_CLS"),
    "bert QUESTION_ANS": Family(
        hf.BertForQuestionAnswering, hf.BertConfig, {**_ENCODER, "num_labels": 2}, "QUESTION_ANS"
    ),
    "bert FEATURE_EXTRACTION": Family(hf.BertModel, hf.BertConfig, _ENCODER, "FEATURE_EXTRACTION"),
    "gpt2 SEQ_CLS": Family(hf.GPT2ForSequenceClassification, hf.GPT2Config, {**_GPT2, "num_labels": 3}, "SEQ_CLS"),
}
"""Every other task type of PEFT."""

PROJECTION = {"prefix_projection": True, "encoder_hidden_size": 24}

_generator = torch.Generator().manual_seed(0)
IDS = torch.randint(3, VOCAB, (BATCH, SEQ), generator=_generator)
TARGETS = torch.randint(3, VOCAB, (BATCH, 6), generator=_generator)
ONES = torch.ones(BATCH, SEQ, dtype=torch.long)
RIGHT = ONES.clone()
RIGHT[0, -2:] = 0
LEFT = ONES.clone()
LEFT[0, :2] = 0
LEFT[1, :3] = 0
MASKS: dict[str, Tensor | None] = {"none": None, "ones": ONES, "right": RIGHT, "left": LEFT}


def labels_of(task: str) -> dict[str, Tensor]:
    """The labels that a model of this task takes."""
    return {
        "CAUSAL_LM": {"labels": IDS},
        "SEQ_2_SEQ_LM": {"labels": TARGETS},
        "SEQ_CLS": {"labels": torch.tensor([0, 1, 2])},
        "TOKEN_CLS": {"labels": IDS % 3},
        "QUESTION_ANS": {"start_positions": torch.tensor([0, 1, 2]), "end_positions": torch.tensor([3, 4, 5])},
        "FEATURE_EXTRACTION": {},
    }[task]


def base_model(family: Family, dtype: torch.dtype = torch.float32, **arguments: Any) -> Any:
    """A model with the same weights at every call, without dropout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = family.model(family.config(**{**family.arguments, **arguments}))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attn_dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model.to(dtype)


PEFT_NAME = "past_key_values"
"""PEFT's name of a cache, regardless of the model's name."""


class Renamed:
    """A bound method with the cache renamed, in its arguments or in the inputs that it returns."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call
        signature = inspect.signature(call)
        self.__signature__ = signature.replace(
            parameters=[p.replace(name=PEFT_NAME) if p.name == "cache" else p for p in signature.parameters.values()]
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self.call(*args, **kwargs)
        if type(out) is dict and "cache" in out:
            out[PEFT_NAME] = out.pop("cache")
        return out


def find_caches(model: PeftModel, *, patched: bool) -> PeftModel:
    """Make stock PEFT find the cache of a model with another name for it, so that it can be the reference.

    PEFT 0.21 asks for ``past_key_values``. Where models say ``cache``, it raises in classification, patched or not,
    and loses the prefix in generation, which patched models have right by themselves.
    """
    if model.active_peft_config.task_type in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"):
        for module in (model.base_model, model.base_model.base_model):
            if "cache" in inspect.signature(module.forward).parameters:
                module.forward = Renamed(module.forward)
    if not patched and hasattr(model, "base_model_prepare_inputs_for_generation"):
        model.base_model_prepare_inputs_for_generation = Renamed(model.base_model_prepare_inputs_for_generation)
    return model


def peft_model(family: Family, *, patched: bool, dtype: torch.dtype = torch.float32, **config: Any) -> PeftModel:
    """Prefix tuning with the same weights at every call, stock or patched. The prefix is N(0, 1)."""
    model = base_model(family, dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        settings = {"task_type": family.task, "num_virtual_tokens": PREFIX, **config}
        kind = CartridgeConfig if "num_frozen_tokens" in config else PrefixTuningConfig
        model = find_caches(get_peft_model(model, kind(**settings)), patched=patched)
    if dtype == torch.float64:
        model = model.double()
    return peftkern.patch(model) if patched else model


PROMPTS: dict[str, Callable[..., Any]] = {
    "PROMPT_TUNING": PromptTuningConfig,
    "P_TUNING": lambda **settings: PromptEncoderConfig(encoder_hidden_size=24, **settings),
    "MULTITASK_PROMPT_TUNING": lambda **settings: MultitaskPromptTuningConfig(num_tasks=4, **settings),
    "CPT": lambda task_type, num_virtual_tokens: CPTConfig(
        task_type=task_type, cpt_token_ids=[3, 4, 5, 6, 7], cpt_mask=[1] * 5, cpt_tokens_type_mask=[1, 2, 3, 4, 4]
    ),
}
"""The configuration of each kind of prompt at the embedding."""

TASK_IDS = torch.tensor([2, 0, 2])


def prompt_model(
    family: Family,
    kind: str = "PROMPT_TUNING",
    *,
    patched: bool,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> PeftModel:
    """A prompt with the same weights at every call, stock or patched with the options."""
    model = base_model(family, dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = get_peft_model(model, PROMPTS[kind](task_type=family.task, num_virtual_tokens=PREFIX))
        if not patched:
            find_caches(model, patched=False)
        for parameter in model.prompt_encoder.parameters():
            if kind != "CPT":
                nn.init.normal_(parameter, std=0.5)
    if dtype == torch.float64:
        model = model.double()
    return peftkern.patch(model, **options) if patched else model


def behind_prompt(mask: Tensor | None) -> Tensor | None:
    """A mask [B, S] with columns for the prompt, [B, P + S]."""
    return None if mask is None else torch.nn.functional.pad(mask, (PREFIX, 0), value=1)


def native_prefix(reference: PeftModel) -> PrefixKV:
    """A :class:`peftkern.PrefixKV` with the values of a PEFT model's flat prefix."""
    config = reference.active_peft_config
    prefix = PrefixKV(
        None, config.num_virtual_tokens, num_layers=config.num_layers, num_kv_heads=config.num_attention_heads,
        head_dim=config.token_dim // config.num_attention_heads,
        peft_seq2seq_layout=config.num_transformer_submodules == 2,
    )  # fmt: skip
    with torch.no_grad():
        prefix.trainable[0].copy_(peft_prefix(reference))
    return prefix


def peft_prefix(model: PeftModel) -> nn.Parameter:
    """The flat prefix of a PEFT model without projection."""
    return model.prompt_encoder[model.active_adapter].embedding.weight


@dataclasses.dataclass
class Step:
    """The results of a training step."""

    output: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]


def training_step(model: nn.Module, task: str, mask: Tensor | None = None, **inputs: Any) -> Step:
    """One forward and backward, with the gradients of trainable parameters. ``inputs`` add or replace arguments."""
    model.train()
    model.zero_grad()
    out = model(**{"input_ids": IDS, "attention_mask": mask, **labels_of(task), **inputs})
    if task == "FEATURE_EXTRACTION":
        output = out.last_hidden_state
        loss = (output * torch.linspace(-1.0, 1.0, output.shape[-1])).mean()
    else:
        output = out.start_logits if task == "QUESTION_ANS" else out.logits
        loss = out.loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Step(output.detach(), loss.detach(), gradients)


@contextlib.contextmanager
def fp64_throughout() -> Iterator[None]:
    """Within the block, stock norms, softmaxes and losses keep fp64 instead of computing in fp32."""
    to, softmax = Tensor.to, nn.functional.softmax

    def keep(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        narrows = x.dtype == torch.float64 and torch.float32 in (*args, *kwargs.values())
        return x if narrows else to(x, *args, **kwargs)

    def keep_softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        return softmax(x, dim=dim, dtype=torch.float64 if x.dtype == torch.float64 else dtype)

    with (
        mock.patch.object(Tensor, "to", keep),
        mock.patch.object(Tensor, "float", lambda x: keep(x, torch.float32)),
        mock.patch.object(nn.functional, "softmax", keep_softmax),
    ):
        yield


def difference(got: Tensor, want: Tensor) -> float:
    """The largest difference relative to the largest expected value."""
    return ((got - want).abs().max() / want.abs().max().clamp_min(1e-30)).item()


def step_difference(got: Step, want: Step, mask: Tensor | None = None) -> tuple[float, float]:
    """The differences of the outputs (where ``mask`` has tokens) and of all gradients."""
    assert got.gradients.keys() == want.gradients.keys(), "not the same parameters have gradients"
    assert got.gradients, "no parameter has a gradient"
    rows = slice(None) if mask is None or got.output.shape[:2] != mask.shape else mask.bool()
    largest = max(gradient.abs().max() for gradient in want.gradients.values())
    gradients = 0.0
    for name, gradient in want.gradients.items():
        size = gradient.abs().max()
        # The gradient of a bias before a softmax is zero except for rounding, so it is scaled by the other gradients.
        scale = size if size > 1e-6 * largest else largest
        gradients = max(gradients, ((got.gradients[name] - gradient).abs().max() / scale).item())
    return difference(got.output[rows], want.output[rows]), gradients


def generate(model: Any, task: str, **options: Any) -> Tensor:
    """Six new tokens, with padding on the side that the task uses."""
    torch.manual_seed(3)
    inputs = {"input_ids": IDS, "attention_mask": LEFT if task == "CAUSAL_LM" else RIGHT, **options}
    return model.generate(**inputs, max_new_tokens=6, pad_token_id=0, eos_token_id=None)


def assert_same_step(got: Step, want: Step, mask: Tensor | None = None, tolerance: float = FP32_TOLERANCE) -> None:
    """Two training steps have equal losses, outputs and gradients. ``mask`` excludes padding from the outputs."""
    assert got.output.shape == want.output.shape, "outputs have another shape than PEFT's"
    assert difference(got.loss, want.loss) <= tolerance, "losses differ"
    output, gradients = step_difference(got, want, behind_prompt(mask))
    assert output <= tolerance, f"outputs differ by {output:.1e}"
    assert gradients <= tolerance, f"gradients differ by {gradients:.1e}"


def rows_of(model: Any) -> list[int]:
    """A list to which each forward appends the number of rows that the first layer sees."""
    rows: list[int] = []
    layer = next(m for name, m in model.named_modules() if name.endswith("layers.0"))
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(args[0].shape[:2].numel()), with_kwargs=True
    )
    return rows


def patch_of(model: Any) -> Any:
    """The patch of a patched model, for tests of its internal state."""
    return getattr(model, PATCH)
