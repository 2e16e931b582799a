# SPDX-License-Identifier: Apache-2.0
"""LoRA and a prefix or prompt train, save and load together, by hand and in ``Trainer``'s checkpoints."""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainingArguments

import peftkern
from peftkern import PrefixKV, SoftPrompt
from peftkern.layer_shapes import LayerShape
from tests.huggingface import models
from tests.huggingface.models import FAMILIES, IDS
from tests.huggingface.test_two_processes import _free_port as free_port

LLAMA = FAMILIES["llama (GQA)"]
KINDS = {
    "prefix": lambda base: PrefixKV(base, 4, std=0.5),
    "prefix with a projection": lambda base: PrefixKV(base, 4, projection=6),
    "cartridge": lambda base: PrefixKV(base, 4, num_frozen_tokens=1),
    "a length per layer": lambda base: PrefixKV(base, [2, 3]),
    "prompt": lambda base: SoftPrompt(base, 4),
}
FOLDERS = {"prompt": "peftkern_prompt"}
BESIDE = "peftkern_prefix"


def lora_config(**changes):
    return peft.LoraConfig(
        **{"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0, **changes}
    )


def lora(seed=0, **changes):
    torch.manual_seed(seed)
    return peft.get_peft_model(models.base_model(LLAMA), lora_config(init_lora_weights=False, **changes))


def hybrid(kind="prefix", seed=0, **changes):
    """A patched model with LoRA and a prefix or prompt, whose values follow the seed."""
    model = lora(seed, **changes)
    return peftkern.patch(model, KINDS[kind](model.get_base_model()))


def learned(model):
    """The prefix or prompt of a patched model."""
    return next(m for m in model.modules() if isinstance(m, PrefixKV | SoftPrompt))


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def folder_of(kind, folder):
    return Path(folder) / FOLDERS.get(kind, BESIDE)


@pytest.fixture(autouse=True)
def no_warning():
    """PEFT warns about unexpected and missing tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_one_call_saves_both_and_one_call_loads_both(kind, tmp_path):
    model = hybrid(kind, seed=1)
    want = logits(model)
    model.save_pretrained(tmp_path)
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("adapter_*")}
    files = ("adapter_model.safetensors", "adapter_config.json")
    assert names == {*files, *(f"{folder_of(kind, '')}/{name}" for name in files)}
    other = hybrid(kind, seed=2)
    assert not torch.equal(logits(other), want)
    other.load_adapter(tmp_path, "default")
    assert torch.equal(logits(other), want)


@pytest.mark.parametrize("kind", ["prefix with a projection", "cartridge", "prompt"])
def test_each_folder_is_loaded_by_its_library(kind, tmp_path):
    model = hybrid(kind, seed=1)
    want = logits(model)
    model.save_pretrained(tmp_path)
    prefix = peftkern.load_prefix(tmp_path)
    assert repr(prefix) == repr(learned(model))
    loaded = peft.PeftModel.from_pretrained(models.base_model(LLAMA), tmp_path)
    assert torch.equal(logits(peftkern.patch(loaded, prefix)), want)
    if kind in ("prefix", "cartridge"):
        alone = peft.PeftModel.from_pretrained(models.base_model(LLAMA), folder_of(kind, tmp_path))
        assert torch.equal(alone.get_prompt_embedding_to_save("default"), learned(model).prompt_embeddings())


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_the_adapter_file_has_only_the_adapter(bias, tmp_path):
    """With ``bias="all"``, PEFT saves every tensor with bias in its name: a projection has two."""
    model = hybrid("prefix with a projection", bias=bias)
    model.save_pretrained(tmp_path / "patched")
    model.save_pretrained(tmp_path / "given", state_dict=model.state_dict())
    prefix = learned(model)
    peftkern.unpatch(model)
    model.save_pretrained(tmp_path / "stock")
    stock = load_file(tmp_path / "stock" / "adapter_model.safetensors")
    for folder in ("patched", "given"):
        found = load_file(tmp_path / folder / "adapter_model.safetensors")
        assert found.keys() == stock.keys(), folder
        assert all(torch.equal(found[name], stock[name]) for name in stock), folder
    assert not (tmp_path / "stock" / BESIDE).exists()
    assert prefix.state_dict(), "the prefix is in its own state_dict again"


def test_values_come_from_a_given_state_dict(tmp_path):
    """Trainer gathers a sharded model into one and passes it on."""
    model = hybrid("prefix with a projection")
    state = {name: x + 1 for name, x in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = peftkern.load_prefix(tmp_path).state_dict()
    for name, x in learned(model).state_dict().items():
        assert torch.equal(loaded[name], x + 1), name


def test_other_processes_write_nothing(tmp_path):
    hybrid().save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_an_adapter_with_a_name(tmp_path):
    """PEFT has such an adapter in a subfolder of its name, beside which the prefix lies."""
    model, other = hybrid(seed=1), hybrid(seed=2)
    for each in (model, other):
        each.add_adapter("b", lora_config(init_lora_weights=False))
        each.set_adapter("b")
    assert all(p.requires_grad for p in learned(model).parameters())
    want = logits(model)
    model.save_pretrained(tmp_path)
    other.load_adapter(tmp_path / "b", "b")
    assert torch.equal(logits(other), want)


def test_an_adapter_alone_leaves_the_prefix_and_says_so(tmp_path):
    lora(seed=1).save_pretrained(tmp_path)
    model = hybrid()
    before = copy.deepcopy(learned(model).state_dict())
    with pytest.warns(UserWarning, match="expected peftkern_prefix in .*, got none; it keeps its values"):
        model.load_adapter(tmp_path, "default")
    assert all(torch.equal(x, before[name]) for name, x in learned(model).state_dict().items())


@pytest.mark.parametrize(
    "kind", ["prefix with a projection", "cartridge", "a length per layer", "longer", "another projection"]
)
def test_a_prefix_of_another_shape_is_refused_before_anything_is_loaded(kind, tmp_path):
    others = {"longer": lambda b: PrefixKV(b, 5), "another projection": lambda b: PrefixKV(b, 4, projection=7)}
    other = lora(seed=1)
    peftkern.patch(other, (KINDS | others)[kind](other.get_base_model())).save_pretrained(tmp_path)
    model = hybrid("prefix with a projection" if kind == "another projection" else "prefix")
    want = logits(model)
    with pytest.raises(ValueError, match="peftkern_prefix: expected the model's PrefixKV"):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(logits(model), want)


def test_unpatch_gives_the_methods_back(tmp_path):
    model = lora()
    before = set(vars(model)), set(vars(model.get_base_model()))
    peftkern.unpatch(peftkern.patch(model, KINDS["prefix"](model.get_base_model())))
    assert (set(vars(model)), set(vars(model.get_base_model()))) == before
    model.save_pretrained(tmp_path)
    assert not (tmp_path / BESIDE).exists()


def test_adapters_that_transformers_adds(tmp_path):
    """``model.add_adapter`` needs no ``PeftModel``; ``save_pretrained`` then saves the adapter alone."""

    def build(seed):
        torch.manual_seed(seed)
        model = models.base_model(LLAMA)
        model.add_adapter(lora_config(init_lora_weights=False))
        return peftkern.patch(model, PrefixKV(model, 4, std=0.5))

    model = build(1)
    want = logits(model)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "peftkern" in name]  # noqa: SIM118
    base = models.base_model(LLAMA)
    peftkern.patch(base, PrefixKV(base, 4))
    base.load_adapter(str(tmp_path), "default")
    assert torch.equal(logits(base), want)


def test_a_model_without_adapters_saves_everything_as_before(tmp_path):
    model = models.base_model(LLAMA)
    peftkern.patch(model, PrefixKV(model, 4))
    model.save_pretrained(tmp_path)
    assert not (tmp_path / BESIDE).exists()
    assert any("peftkern_prefix" in name for name in load_file(tmp_path / "model.safetensors"))


def test_a_copy_saves_its_own_values(tmp_path):
    model = hybrid()
    clone = copy.deepcopy(model)
    with torch.no_grad():
        learned(clone).trainable[0].add_(1)
    clone.save_pretrained(tmp_path)
    assert torch.equal(peftkern.load_prefix(tmp_path).trainable[0], learned(clone).trainable[0])


def test_a_folder_with_a_prefix_and_a_prompt_is_ambiguous(tmp_path):
    hybrid("prefix").save_pretrained(tmp_path)
    hybrid("prompt").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected one prefix or prompt .* peftkern_prefix and peftkern_prompt"):
        peftkern.load_prefix(tmp_path)
    assert isinstance(peftkern.load_prefix(tmp_path / "peftkern_prompt"), SoftPrompt)


def test_a_prefix_is_itself_even_with_another_one_in_its_folder(tmp_path):
    hybrid().save_pretrained(tmp_path)
    peftkern.save_prefix(PrefixKV(None, 7, num_layers=2, num_kv_heads=2, head_dim=8), tmp_path / "own")
    (tmp_path / BESIDE).rename(tmp_path / "own" / BESIDE)
    assert peftkern.load_prefix(tmp_path / "own").lengths[0] == 7


class Own(nn.Module):
    """A prefix module of a user's own."""

    def __init__(self):
        super().__init__()
        self.shapes, self.lengths = [LayerShape(2, 16, 16)] * 2, [3, 3]
        self.kv = nn.Parameter(torch.randn(2, 2, 2, 3, 16))

    def layer_kv(self):
        return [tuple(pair) for pair in self.kv]


def test_a_module_of_the_users_own_is_announced_as_not_saved(tmp_path):
    model = peftkern.patch(lora(), Own())
    with pytest.warns(UserWarning, match=r"expected a PrefixKV or SoftPrompt, .* got Own, which is not saved"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()


def data():
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, models.VOCAB, (8, 9), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]


def trainer(model, folder, **changes):
    settings = {
        **{"per_device_train_batch_size": 2, "max_steps": 6, "learning_rate": 1e-2, "optim": "adamw_torch"},
        **{"logging_steps": 1, "save_strategy": "steps", "save_steps": 3, "use_cpu": True, "report_to": []},
        **{"disable_tqdm": True, "seed": 0, "data_seed": 0, **changes},
    }
    made = Trainer(
        model=model, train_dataset=data(), eval_dataset=data()[:4],
        args=TrainingArguments(output_dir=str(folder), **settings),
    )  # fmt: skip
    made.remove_callback(PrinterCallback)
    return made


def losses(of):
    return [entry["loss"] for entry in of.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", ["cartridge", "prompt", pytest.param("a length per layer", marks=pytest.mark.slow)])
def test_trainer_resumes_with_the_same_bits(kind, tmp_path):
    whole = trainer(hybrid(kind), tmp_path)
    whole.train()
    model = hybrid(kind, seed=9)
    resumed = trainer(model, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(resumed) == losses(whole)
    assert len(set(losses(whole))) == 6
    assert torch.equal(logits(model), logits(whole.model))
    trained = {name for name, p in learned(model).named_parameters() if p.requires_grad}
    assert trained == {name for name, p in learned(whole.model).named_parameters() if p.requires_grad}


def test_trainer_with_a_named_adapter_resumes(tmp_path):
    def named(seed):
        model = lora(seed)
        model.add_adapter("b", lora_config(init_lora_weights=False))
        model.set_adapter("b")
        return peftkern.patch(model, KINDS["prefix"](model.get_base_model()))

    whole = trainer(named(0), tmp_path)
    whole.train()
    resumed = trainer(named(9), tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(resumed) == losses(whole)


def test_trainer_loads_the_best_of_the_checkpoints_that_it_kept(tmp_path):
    model = hybrid()
    runs = trainer(
        model, tmp_path, max_steps=8, save_steps=2, eval_strategy="steps", eval_steps=2, save_total_limit=2,
        load_best_model_at_end=True, greater_is_better=True,
    )  # fmt: skip
    runs.train()
    kept = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    best = Path(runs.state.best_model_checkpoint)
    assert len(kept) == 2
    assert best.name != "checkpoint-8", "the last is the best, so that nothing is loaded"
    assert torch.equal(learned(model).trainable[0], peftkern.load_prefix(best).trainable[0])
    other = hybrid(seed=4)
    other.load_adapter(best, "default")
    assert torch.equal(logits(other), logits(model))


def test_trainer_does_not_resume_a_model_without_the_prefix(tmp_path):
    trainer(hybrid(), tmp_path, max_steps=3).train()
    with pytest.raises(ValueError, match=r"Cannot combine adapters .*LORA and .*PREFIX_TUNING"):
        trainer(lora(), tmp_path).train(resume_from_checkpoint=True)


def test_a_prefix_alone_is_trained_with_freeze(tmp_path):
    model = lora(seed=1)
    peftkern.patch(model, KINDS["prefix"](model.get_base_model()), freeze=True)
    runs = trainer(model, tmp_path, max_steps=3)
    runs.train()
    saved = load_file(tmp_path / "checkpoint-3" / "adapter_model.safetensors")
    model = lora(seed=1)
    model.save_pretrained(tmp_path / "before")
    before = load_file(tmp_path / "before" / "adapter_model.safetensors")
    assert all(torch.equal(saved[name], before[name]) for name in before)


def test_auto_class_loads_the_folder(tmp_path):
    """``AutoModel.from_pretrained`` takes a folder with an adapter, for the base model that its config names."""
    base = models.base_model(LLAMA)
    base.save_pretrained(tmp_path / "base")
    torch.manual_seed(3)
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora_config(init_lora_weights=False)
    )
    peftkern.patch(model, PrefixKV(model.get_base_model(), 4, std=0.5))
    want = logits(model)
    model.save_pretrained(tmp_path / "both")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "both")
    assert torch.equal(logits(peftkern.patch(loaded, peftkern.load_prefix(tmp_path / "both"))), want)


def _save_sharded(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    for kind in ("cartridge", "prompt"):
        model, mesh = hybrid(kind), init_device_mesh("cpu", (2,))
        for layer in model.get_base_model().model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        model.save_pretrained(f"{folder}/{kind}", state_dict=state, is_main_process=rank == 0)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_sharded_model_saves_what_has_been_gathered(tmp_path):
    torch.multiprocessing.spawn(_save_sharded, args=(free_port(), str(tmp_path)), nprocs=2)
    for kind in ("cartridge", "prompt"):
        loaded, want = peftkern.load_prefix(tmp_path / kind), learned(hybrid(kind)).state_dict()
        assert all(torch.equal(x, want[name]) for name, x in loaded.state_dict().items()), kind
