# SPDX-License-Identifier: Apache-2.0
"""PEFT's ADAPTION_PROMPT (LLaMA-Adapter): patched models have PEFT's numbers, gradients, adapters and checkpoints."""

from __future__ import annotations

import contextlib
import copy
import pickle
import warnings

import pytest
import torch
import transformers as hf
from peft import AdaptionPromptConfig, PeftModel, get_peft_model
from peft.tuners.adaption_prompt.layer import AdaptedAttention, AdaptedAttentionGPT

import peftkern
from peftkern.huggingface import gated
from tests.huggingface.models import _DECODER, _GPT2, PREFIX, VOCAB

KINDS = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, {**_DECODER, "num_key_value_heads": 2}),
    "biases": (hf.LlamaForCausalLM, hf.LlamaConfig, {**_DECODER, "attention_bias": True}),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig, {**_DECODER, "num_key_value_heads": 2, "sliding_window": 4}),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config, {**_GPT2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
}


def _config(layers=2, length=PREFIX):
    return AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=length, adapter_layers=layers)


def _vary(model, gate=1.7):
    """Gates that are open, wider than a tanh, and biases that count."""
    for name, parameter in model.named_parameters():
        if name.endswith("adaption_gate"):
            parameter.data.fill_(gate)
        if name.endswith("proj.bias"):
            parameter.data.normal_()
    return model


def _model(kind="llama", dtype=torch.float32, layers=2, gate=1.7, **changes):
    torch.manual_seed(0)
    make, config, arguments = KINDS[kind]
    return _vary(get_peft_model(make(config(**{**arguments, **changes})).to(dtype), _config(layers)), gate)


def _batch(padding="both"):
    ids = torch.randint(3, VOCAB, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padding in ("left", "both"):
        mask[2, :3] = 0
    if padding in ("right", "both"):
        mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def _step(model, batch, **changes):
    """(logits where the mask is 1, loss, gradients) of a training step."""
    model.train()
    model.zero_grad()
    output = model(**{**batch, **changes})
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) >= 2
    return output.logits.detach()[batch["attention_mask"].bool()], output.loss.detach(), gradients


def _assert_equal(got, want, tolerance):
    assert got[2].keys() == want[2].keys()
    pairs = [(got[0], want[0]), (got[1], want[1]), *((got[2][name], want[2][name]) for name in want[2])]
    for x, y in pairs:
        assert (x - y).norm() <= tolerance * max(1e-6, y.norm()), (x - y).norm() / y.norm()


@contextlib.contextmanager
def _patched(model, **options):
    """A patched model. A warning means that PEFT's code runs it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with peftkern.patched(model, **options):
            yield model


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_training_steps_have_peft_numbers_and_gradients(kind, layers):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-6)):  # PEFT's softmax is always fp32
        model, batch = _model(kind, dtype, layers), _batch()
        want = _step(model, batch)
        with _patched(model):
            _assert_equal(_step(model, batch), want, tolerance)
        again = _step(model, batch)
        assert torch.equal(again[0], want[0])
        assert torch.equal(again[1], want[1])


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_as_close_to_the_exact_result_as_peft(kind):
    results = []
    for seed in range(4):
        model = _model(kind, torch.float64)
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
        model.to(torch.bfloat16).double()
        exact = _by_kind(_step(model, _batch()))
        model.to(torch.bfloat16)
        theirs = _by_kind(_step(model, _batch()))
        with _patched(model):
            results.append((_by_kind(_step(model, _batch())), theirs, exact))
    for kind_of_tensor in range(3):
        ours, theirs, exact = (torch.cat([result[who][kind_of_tensor] for result in results]) for who in range(3))
        assert (ours - exact).norm() <= 2 * (theirs - exact).norm() + 0.01 * exact.norm()


def _by_kind(step):
    """(logits, gradients of the prompts, gradients of the gates), flat."""
    logits, _, gradients = step
    prompts, gates = ([x for name, x in gradients.items() if name.endswith(end)] for end in ("prompt", "gate"))
    return [torch.cat([x.double().flatten() for x in kind]) for kind in ([logits], prompts, gates)]


def test_autocast():
    model, batch = _model(), _batch()
    with torch.autocast("cpu", torch.bfloat16):
        want = _step(model, batch)
        with _patched(model):
            _assert_equal(_step(model, batch), want, 2e-2)


def test_closed_gates_begin_to_learn():
    """Gates start at 0, so the trial must open them to see the adapter, and closes them again."""
    model, batch = _model(gate=0.0), _batch()
    want = _step(model, batch)
    gates = [p for name, p in model.named_parameters() if name.endswith("adaption_gate")]
    with _patched(model):
        got = _step(model, batch)
        assert [p for name, p in model.named_parameters() if name.endswith("adaption_gate")] == gates
    _assert_equal(got, want, 1e-5)
    assert all(got[2][name].abs().max() > 0 for name in got[2] if name.endswith("adaption_gate"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beams", [1, 2])
def test_generation(kind, beams):
    model = _model(kind).eval()
    batch = {name: x for name, x in _batch("left").items() if name != "labels"}
    options = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False}
    want = model.generate(**batch, **options)
    with _patched(model):
        assert torch.equal(model.generate(**batch, **options), want)
        assert torch.equal(model.generate(**batch, **options, use_cache=False), want)
        if kind == "llama":
            assert torch.equal(model.generate(**batch, **options, cache_implementation="static"), want)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_one_attention_computes_both_parts(kind, monkeypatch):
    """Queries are projected once, the prefix is not copied, and padding does not run."""
    model, batch, calls, rows = _model(kind), _batch("right"), [], []
    original = peftkern.huggingface.attention.prefix_attention

    def count(*args, **kwargs):
        calls.append((tuple(args[3].shape), kwargs.get("gate") is not None))
        return original(*args, **kwargs)

    with _patched(model):
        projection = model.get_base_model().model.layers[0].self_attn.model.q_proj
        projection.register_forward_hook(lambda module, args, output: rows.append(output.shape[:2].numel()))
        monkeypatch.setattr(peftkern.huggingface.attention, "prefix_attention", count)
        monkeypatch.setattr(gated, "prefix_attention", count)
        _step(model, batch)
        assert calls == 2 * [((2, PREFIX, 16), True)]
        assert rows == [int(batch["attention_mask"].sum())]


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing(kind):
    model, batch = _model(kind), _batch()
    want = _step(model, batch)
    for reentrant in (False, True):
        with _patched(model):
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
            _assert_equal(_step(model, batch), want, 1e-5)
            model.gradient_checkpointing_disable()


def test_adapters_are_added_switched_disabled_and_deleted():
    model, batch = _model(layers=1), _batch()
    model.add_adapter("other", _config(2, 3))
    wants = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        wants[name] = _step(_trainable(_vary(model)), batch)
    with model.disable_adapter(), torch.no_grad():
        bare = model(**batch).logits
    with _patched(model):
        for name in ("default", "other", "default"):
            model.set_adapter(name)
            _assert_equal(_step(_trainable(model), batch), wants[name], 1e-5)
        with model.disable_adapter(), torch.no_grad():
            assert torch.allclose(model(**batch).logits, bare, atol=1e-6)
        _assert_equal(_step(model, batch), wants["default"], 1e-5)
        model.add_adapter("third", _config(2, 4))
        model.set_adapter("third")
        third = _step(_trainable(_vary(model)), batch)
        modules = [m for m in model.modules() if isinstance(m, AdaptedAttention)]
        assert {type(m) for m in modules} != {AdaptedAttention}
        model.set_adapter("default")
        model.delete_adapter("other")
        _assert_equal(_step(_trainable(model), batch), wants["default"], 1e-5)
    assert torch.equal(_step(model, batch)[1], wants["default"][1])
    model.set_adapter("third")
    _assert_equal(_step(_trainable(model), batch), third, 1e-5)
    assert {type(m) for m in model.modules() if isinstance(m, AdaptedAttention)} == {AdaptedAttention}


def _trainable(model):
    for name, parameter in model.named_parameters():
        if "adaption_" in name:
            parameter.requires_grad_(True)
    return model


def test_checkpoints_are_those_of_peft(tmp_path):
    model, batch = _model(), _batch()
    want = _step(model, batch)
    names = set(model.state_dict())
    with _patched(model):
        assert set(model.state_dict()) == names
        model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    make, config, arguments = KINDS["llama"]
    loaded = PeftModel.from_pretrained(make(config(**arguments)), tmp_path, is_trainable=True)
    with _patched(loaded):
        _assert_equal(_step(loaded, batch), want, 1e-5)


def test_patched_models_are_ordinary_objects():
    model, batch = _model(), _batch()
    want = _step(model, batch)
    peftkern.patch(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        _assert_equal(_step(other, batch), want, 1e-5)
        peftkern.unpatch(other)
        assert torch.equal(_step(other, batch)[1], want[1])
    peftkern.unpatch(model)


def test_another_attention_implementation_runs_peft_code():
    model, batch = _model().eval(), _batch("right")
    with torch.no_grad():
        want = model(**batch).logits
        with _patched(model):
            model.get_base_model().set_attn_implementation("eager")
            assert torch.allclose(model(**batch).logits, want, atol=1e-5)


def test_positions_of_several_sequences_per_row():
    """PEFT's models separate them only without a cache; so does the patched model."""
    model, ids = _model(), _batch()["input_ids"]
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4]).expand(3, -1)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    for use_cache in (None, False):
        arguments = {"attention_mask": None, "position_ids": positions, "use_cache": use_cache}
        want = _step(model, batch, **arguments)
        with _patched(model):
            _assert_equal(_step(model, batch, **arguments), want, 1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_labelled_logits_and_shared_text(kind):
    model, batch = _model(kind), _batch("right")
    batch["input_ids"][1, :4] = batch["input_ids"][0, :4]
    want = _step(model, batch)
    with _patched(model, logits="labelled"):
        model.zero_grad()
        output = model(**batch)
        output.loss.backward()
        assert output.logits.shape[:2] == (1, int((batch["labels"][:, 1:] != -100).sum()))
        assert torch.allclose(output.loss, want[1], rtol=1e-5)
    with _patched(model, share="prefixes"):
        _assert_equal(_step(model, batch), want, 1e-5)
        assert "rows" in peftkern.explain(model)


def test_dropout_and_masks_of_ones_own():
    """The adapter's weights are not dropped; a mask [B, 1, S, T] need not be causal."""
    model, batch = _model(attention_dropout=0.5), _batch("none")
    torch.manual_seed(3)
    want = _step(model, batch)
    with _patched(model):
        torch.manual_seed(3)
        _assert_equal(_step(model, batch), want, 1e-5)
    mask = torch.rand(3, 1, 9, 9) < 0.7
    mask |= torch.eye(9, dtype=torch.bool)
    model.eval()
    with torch.no_grad():
        want = model(input_ids=batch["input_ids"], attention_mask=mask).logits
        with _patched(model):
            got = model(input_ids=batch["input_ids"], attention_mask=mask).logits
    assert torch.allclose(got, want, atol=1e-5)


def test_models_that_drop_keyword_arguments_run_peft_code(monkeypatch):
    model, batch = _model(), _batch()
    want = _step(model, batch)
    forward = hf.models.llama.modeling_llama.LlamaAttention.forward

    def without(self, *args, peftkern_gated=None, **kwargs):
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(hf.models.llama.modeling_llama.LlamaAttention, "forward", without)
    with pytest.raises(ValueError, match="keyword arguments"):
        peftkern.patch(model, strict=True)
    with pytest.warns(UserWarning, match="by PEFT's own code"):
        peftkern.patch(model)
    assert torch.equal(_step(model, batch)[1], want[1])
    peftkern.unpatch(model)


def test_options_that_have_no_meaning_are_refused():
    model = _model("gpt2")
    for options in ({"prefix_in_window": False}, {"shift_positions": False}, {"fix_seq2seq_layout": True}):
        with pytest.raises(ValueError, match=next(iter(options))):
            peftkern.patch(model, **options)
    assert {type(m) for m in model.modules() if isinstance(m, AdaptedAttentionGPT)} == {AdaptedAttentionGPT}
    with model.disable_adapter(), pytest.raises(ValueError, match="disabled"):
        peftkern.patch(model, strict=True)
