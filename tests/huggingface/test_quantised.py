# SPDX-License-Identifier: Apache-2.0
"""Prefixes and prompts in models with quantised weights: stock numbers, and parameters that are never quantised.

Each library runs where it is installed. GGUF files, and layers that quantise their inputs, are tested everywhere.
"""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM

import peftkern
from peftkern import PrefixKV, SoftPrompt, load_prefix, save_prefix
from tests.huggingface import by_hand, models
from tests.huggingface.by_hand import GREEDY
from tests.huggingface.models import FAMILIES, IDS, LEFT, PREFIX, RIGHT

pytestmark = [
    pytest.mark.filterwarnings("ignore:Position ids are not supported"),
    pytest.mark.filterwarnings("error:peftkern:UserWarning"),  # no case here falls back
]

QWEN = FAMILIES["qwen2"]


def bits_and_bytes(**options):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**options)


def torch_ao(bits):
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    if bits == 8:
        return TorchAoConfig(quantization.Int8WeightOnlyConfig())
    return TorchAoConfig(
        quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=quantization.PerGroup(32)),
        include_input_output_embeddings=True,
        modules_to_not_convert=[],
    )


def quanto(weights):
    pytest.importorskip("optimum.quanto")
    from transformers import QuantoConfig

    return QuantoConfig(weights=weights)


CONFIGS = {
    "bitsandbytes nf4": lambda: bits_and_bytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bitsandbytes int8": lambda: bits_and_bytes(load_in_8bit=True),
    "torchao int8": lambda: torch_ao(8),
    "torchao int4 with embeddings": lambda: torch_ao(4),
    "quanto int8": lambda: quanto("int8"),
    "quanto int4": lambda: quanto("int4"),
}
KINDS = [*CONFIGS, "gguf file", "gguf blocks", "int8 inputs"]
#: These quantise the inputs of linear layers: a change by one rounding error can become a change by one step of int8.
COARSE = ("bitsandbytes int8", "int8 inputs")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model, also as a GGUF file."""
    path = tmp_path_factory.mktemp("quantised")
    model = models.base_model(QWEN)
    model.save_pretrained(path)
    write_gguf(model, path / "tiny.gguf")
    return path


def load(kind, folder, dtype=torch.float32):
    """A fresh quantised model."""
    if kind == "gguf file":
        return AutoModelForCausalLM.from_pretrained(folder, gguf_file="tiny.gguf", dtype=dtype).eval()
    if kind in ("gguf blocks", "int8 inputs"):
        model = models.base_model(QWEN, dtype).eval()
        change = keep_blocks if kind == "gguf blocks" else quantise_inputs
        change(model)
        return model
    config = CONFIGS[kind]()
    options = {"quantization_config": config, "dtype": dtype, "device_map": "cpu"}
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


# Models that need no library beside the tests'


GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(model, path):
    """Write a Qwen2 as a GGUF file whose matrices are Q8_0."""
    gguf = pytest.importorskip("gguf")
    q8, config = gguf.GGMLQuantizationType.Q8_0, model.config
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([str(i) for i in range(config.vocab_size)])
    for name, weight in model.state_dict().items():
        for ours, theirs in GGUF_NAMES.items():
            name = name.replace(ours, theirs)
        if weight.dim() == 2:
            writer.add_tensor(name, gguf.quants.quantize(weight.numpy(), q8), raw_dtype=q8)
        else:
            writer.add_tensor(name, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def keep_blocks(model):
    """Replace linear layers and embeddings by those of ``transformers`` that keep blocks of a GGUF file in uint8.

    On a CPU it would unpack the file. These layers themselves run there.
    """
    gguf = pytest.importorskip("gguf")
    blocks = pytest.importorskip("transformers.integrations.gguf.utils")
    q8 = gguf.GGMLQuantizationType.Q8_0
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            new = blocks.GgufLinear(module.in_features, module.out_features, int(q8), module.bias is not None)
            new.forward = lambda x, new=new: run_blocks(new, x)
        elif isinstance(module, nn.Embedding):
            new = blocks.GgufEmbedding(module.num_embeddings, module.embedding_dim, int(q8), module.weight.dtype)
        else:
            continue
        packed = gguf.quants.quantize(module.weight.detach().float().numpy(), q8)
        new.weight = nn.Parameter(torch.from_numpy(packed), requires_grad=False)
        if getattr(module, "bias", None) is not None:
            new.bias = module.bias
        model.set_submodule(name, new)


def run_blocks(layer, x):
    """``GgufLinear.forward`` without the GPU kernel that it uses for few rows."""
    out = layer._unpack_matmul(x.reshape(-1, layer.in_features))
    out = out if layer.bias is None else out + layer.bias
    return out.reshape(*x.shape[:-1], layer.out_features)


class Int8Inputs(nn.Linear):
    """Quantises its inputs to int8 with a scale per row, as dynamic quantisation does."""

    def forward(self, x):
        scale = x.detach().abs().amax(-1, keepdim=True).clamp(min=1e-9) / 127
        rounded = (x.detach() / scale).round() * scale
        return super().forward(x + (rounded - x).detach())


def quantise_inputs(model):
    for module in model.model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Int8Inputs


# Numbers


ADAPTERS = {"prefix": PrefixTuningConfig, "prompt": PromptTuningConfig}


def with_adapter(base, adapter):
    """PEFT's adapter with the same values at every call."""
    model = get_peft_model(base, ADAPTERS[adapter](task_type="CAUSAL_LM", num_virtual_tokens=PREFIX))
    weight = models.peft_prefix(model)
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)) * 0.5)
    return model


def tolerance(kind):
    return 0.1 if kind in COARSE else 1e-4


def compare_steps(got, want, kind, mask=RIGHT):
    """Loss and gradients of a training step."""
    labels = torch.where(mask == 1, IDS, -100)
    got, want = (models.training_step(model, "CAUSAL_LM", mask, labels=labels) for model in (got, want))
    by_hand.assert_close(got.loss, want.loss, "loss", tolerance(kind))
    assert got.gradients.keys() == want.gradients.keys()
    for name, gradient in want.gradients.items():
        assert got.gradients[name].dtype == gradient.dtype == torch.float32
        off = (got.gradients[name] - gradient).norm() / gradient.norm()
        assert off <= tolerance(kind), f"gradients of {name} differ by {off:.1e}"


def compare_tokens(got, want, kind, **options):
    """Generated tokens; where rounding may change them, the logits of the first one."""
    options = {"attention_mask": LEFT, "max_new_tokens": 5, "return_dict_in_generate": True, **GREEDY, **options}
    got, want = (model.eval().generate(input_ids=IDS, output_logits=True, **options) for model in (got, want))
    if kind in COARSE:
        by_hand.assert_close(got.logits[0], want.logits[0], "logits", tolerance(kind))
    else:
        assert got.sequences.tolist() == want.sequences.tolist()


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_peft_adapters_train_and_generate_as_in_peft(kind, adapter, folder):
    stock, model = (with_adapter(load(kind, folder), adapter) for _ in range(2))
    peftkern.patch(model, strict=True, peft_bugs=adapter == "prompt")
    compare_steps(model, stock, kind)
    compare_tokens(model, stock, kind)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert trainable == [models.peft_prefix(model)]
    peftkern.unpatch(model)
    assert torch.equal(model(input_ids=IDS).logits, stock(input_ids=IDS).logits)


def stock_prefix_step(base, prefix, mask=RIGHT):
    """Loss of a stock model with the prefix in its cache."""
    labels = torch.where(mask == 1, IDS, -100)
    return by_hand.with_prefix(base, prefix, IDS, mask, labels=labels).loss


@pytest.mark.parametrize("kind", KINDS)
def test_a_native_prefix_trains_and_generates_as_in_a_stock_cache(kind, folder):
    stock, model = load(kind, folder), load(kind, folder)
    torch.manual_seed(4)
    prefix = PrefixKV(model, PREFIX, std=0.5)
    want = stock_prefix_step(stock, copied := copy.deepcopy(prefix))
    want.backward()
    peftkern.patch(model, prefix, freeze=True)
    step = models.training_step(model, "CAUSAL_LM", RIGHT, labels=torch.where(RIGHT == 1, IDS, -100))
    by_hand.assert_close(step.loss, want.detach(), "loss", tolerance(kind))
    (gradient,) = step.gradients.values()
    off = (gradient - copied.trainable[0].grad).norm() / gradient.norm()
    assert off <= tolerance(kind), f"gradients differ by {off:.1e}"
    assert {p.dtype for p in prefix.parameters()} == {torch.float32}
    if kind not in COARSE:
        logits = lambda ids: by_hand.with_prefix(stock, prefix, ids).logits  # noqa: E731
        got = model.eval().generate(input_ids=IDS, max_new_tokens=4, **GREEDY)
        assert got.tolist() == by_hand.greedy(logits, IDS, 4)
    peftkern.unpatch(model.eval())
    assert torch.equal(model(input_ids=IDS).logits, stock(input_ids=IDS).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_a_soft_prompt_is_as_wide_as_the_embeddings(kind, folder):
    """A quantised embedding may store its rows in fewer bytes."""
    stock, model = load(kind, folder), load(kind, folder)
    for init in ("random", "vocab"):
        prompt = SoftPrompt(model, PREFIX, init=init)
        assert prompt.weight.shape == (PREFIX, 64)
        assert prompt.weight.dtype == torch.float32
    rows = model.get_input_embeddings()(torch.arange(97))
    assert all((row == rows).all(1).any() for row in prompt.weight.detach()), "a row is no token's embedding"
    peftkern.patch(model, prompt, freeze=True, strict=True)
    want = by_hand.with_prompt(stock, prompt.weight, IDS, RIGHT).logits[:, PREFIX:]
    with torch.no_grad():
        got = model(input_ids=IDS, attention_mask=RIGHT).logits
    by_hand.assert_close(got[RIGHT == 1], want[RIGHT == 1].detach(), "logits", tolerance(kind))
    step = models.training_step(model, "CAUSAL_LM", RIGHT)
    assert [name for name, grad in step.gradients.items() if grad.any()] == ["peftkern_prompt.weight"]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gguf blocks"])  # PEFT has no LoRA for those
def test_a_prefix_beside_lora(kind, folder):
    """The losses and gradients of both are those of the LoRA model with the prefix in a stock cache."""
    pair = []
    for _ in range(2):
        torch.manual_seed(5)
        config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        pair.append(get_peft_model(load(kind, folder), config))
    stock, model = pair
    torch.manual_seed(4)
    prefix = PrefixKV(model.get_base_model(), PREFIX, std=0.5)
    want = stock_prefix_step(stock, copied := copy.deepcopy(prefix))
    want.backward()
    peftkern.patch(model, prefix)
    step = models.training_step(model, "CAUSAL_LM", RIGHT, labels=torch.where(RIGHT == 1, IDS, -100))
    by_hand.assert_close(step.loss, want.detach(), "loss", tolerance(kind))
    wanted = {"base_model.model.peftkern_prefix.trainable.0": copied.trainable[0].grad, **by_hand.gradients(stock)}
    assert step.gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        off = (step.gradients[name] - gradient).norm() / gradient.norm()
        assert off <= tolerance(kind), f"gradients of {name} differ by {off:.1e}"


@pytest.mark.parametrize("kind", KINDS)
def test_from_text_and_checkpoints(kind, folder, tmp_path):
    model = load(kind, folder)
    prefix = PrefixKV.from_text(model, lambda text: {"input_ids": list(range(3, 3 + len(text)))}, "text", 4)
    cache = model(input_ids=torch.arange(3, 7)[None], use_cache=True).past_key_values
    for (key, value), layer in zip(prefix.layer_kv(), cache.layers, strict=True):
        torch.testing.assert_close(key, layer.keys[0])
        torch.testing.assert_close(value, layer.values[0])
    assert {p.dtype for p in prefix.parameters()} == {torch.float32}
    save_prefix(prefix, tmp_path)
    loaded = load_prefix(tmp_path, model=model)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in loaded.parameters())
    torch.testing.assert_close(loaded.trainable[0], prefix.trainable[0])
    peftkern.patch(model, loaded)
    assert model.state_dict()["peftkern_prefix.trainable.0"].dtype == torch.float32


@pytest.mark.parametrize("kind", ["bitsandbytes nf4", "torchao int8", "quanto int8", "gguf blocks"])
def test_half_precision_beside_an_fp32_prefix(kind, folder):
    stock, model = (with_adapter(load(kind, folder, torch.bfloat16), "prefix") for _ in range(2))
    peftkern.patch(model, strict=True)
    got, want = (models.training_step(m, "CAUSAL_LM", RIGHT) for m in (model, stock))
    by_hand.assert_close(got.loss, want.loss, "loss", 2e-3)
    (got, want) = (next(iter(step.gradients.values())) for step in (got, want))
    assert got.dtype == torch.float32
    assert (got - want).norm() <= 2e-2 * want.norm()


def test_a_model_prepared_for_training_in_four_bits(folder):
    """With norms in fp32, embeddings that require a gradient, and activation checkpointing."""
    pair = []
    for _ in range(2):
        base = load("bitsandbytes nf4", folder, torch.bfloat16)
        options = {"use_reentrant": False}
        base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs=options)
        pair.append(with_adapter(base, "prompt"))
    stock, model = pair
    peftkern.patch(model, strict=True)
    labels = torch.where(RIGHT == 1, IDS, -100)
    got, want = (models.training_step(m, "CAUSAL_LM", RIGHT, labels=labels) for m in (model, stock))
    by_hand.assert_close(got.loss, want.loss, "loss", 2e-3)
    assert got.gradients.keys() == want.gradients.keys()


# The trial


@pytest.mark.parametrize(("seed", "scale"), [(0, 5), (2, 1)])
def test_the_trial_allows_for_quantised_inputs(seed, scale):
    """A step of int8 is no fault of the patch. These models are close to one."""
    torch.manual_seed(seed)
    model = QWEN.model(QWEN.config(**{**QWEN.arguments, "num_hidden_layers": 6, "vocab_size": 200})).eval()
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.data *= scale
    quantise_inputs(model)
    peftkern.patch(model, PrefixKV(model, PREFIX))
    assert "without their padding" in peftkern.explain(model)
    peftkern.unpatch(model)
    peftkern.patch(model, SoftPrompt(model, PREFIX), strict=True)


def test_the_trial_finds_a_fault_beside_quantised_inputs(folder, monkeypatch):
    model = load("int8 inputs", folder)
    attention = model.model.layers[0].self_attn
    forward = attention.forward

    def wrong(*args, **kwargs):
        out, weights = forward(*args, **kwargs)
        return (out * 1.5 if kwargs.get("peftkern_prefix") is not None else out), weights

    monkeypatch.setattr(attention, "forward", wrong)
    with pytest.raises(ValueError, match="differs from the stock model"):
        peftkern.patch(model, PrefixKV(model, PREFIX))


def test_a_tokens_embedding_is_that_of_the_model():
    """Not the row of the weight: Gemma scales it."""
    model = models.base_model(FAMILIES["gemma3"])
    prompt = SoftPrompt(model, 3, init="vocab")
    rows = model.get_input_embeddings()(torch.arange(97))
    assert all((row == rows).all(1).any() for row in prompt.weight.detach())
