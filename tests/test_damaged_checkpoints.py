# SPDX-License-Identifier: Apache-2.0
"""Damaged and crafted checkpoints: each loads, or is refused by file and field before anything is allocated."""

from __future__ import annotations

import json
import os
import random
import resource
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from peftkern import PrefixKV, load_prefix, save_prefix
from peftkern.recurrent_state import RecurrentState
from tests.checkpoints import GEOMETRY, ONLY_OURS, OURS, assert_same
from tests.integrations.files import raw_safetensors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def _stack():
    return PrefixKV.stack([PrefixKV(None, n, **GEOMETRY) for n in (2, 4)])


def _recurrent():
    shapes = [[], [([1, 6, 3], [1, 2, 4, 4])], [(None, [1, 5])]]
    return PrefixKV(None, 3, num_layers=3, num_kv_heads=[2, 0, 2], head_dim=4, state=RecurrentState(shapes))


#: Each kind of file that `save_prefix` writes.
KINDS = {
    **OURS,
    **ONLY_OURS,
    "gates": lambda: PrefixKV(None, 4, **GEOMETRY, num_frozen_tokens=1, learn_length=True),
    "pruned": lambda: PrefixKV(None, [3, 1], **GEOMETRY, learn_length=True, positions=6),
    "bank": _stack,
    "bank of prompts": ONLY_OURS["bank"],
    "states": _recurrent,
    "other values": lambda: PrefixKV(None, 3, num_layers=2, num_kv_heads=2, head_dim=8, value_head_dim=4),
    "other layers": lambda: PrefixKV(None, 3, num_layers=2, num_kv_heads=[2, 1], head_dim=[4, 8]),
    "no tokens": lambda: PrefixKV(None, 0, num_layers=2, num_kv_heads=2, head_dim=8, value_head_dim=4),
    "encoder": lambda: PrefixKV(None, 3, num_kv_heads=2, head_dim=8, parts={"encoder": 1, "decoder": 1}),
    "doubles": lambda: PrefixKV(None, 3, **GEOMETRY, dtype=torch.float64),
}


@pytest.fixture(autouse=True)
def little_memory():
    """2 GiB more than the process has."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def _contents(folder):
    with safe_open(folder / WEIGHTS, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        return tensors, file.metadata()["peftkern"]


def _metadata(text):
    """The folder with another text as the config in its weights."""
    return lambda folder: save_file(_contents(folder)[0], folder / WEIGHTS, {"peftkern": text})


def _own(**changes):
    def edit(folder):
        tensors, text = _contents(folder)
        save_file(tensors, folder / WEIGHTS, {"peftkern": json.dumps({**json.loads(text), **changes})})

    return edit


def _tensors(change):
    def edit(folder):
        tensors, text = _contents(folder)
        save_file(change(tensors), folder / WEIGHTS, {"peftkern": text})

    return edit


def _peft(text=None, **changes):
    """The folder as PEFT saves it, without a config in the weights, and with a changed config file."""

    def edit(folder):
        save_file(_contents(folder)[0], folder / WEIGHTS)
        path = folder / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}) if text is None else text)

    return edit


def _many_layers(folder):
    """A small file that claims 10 ** 8 layers."""
    config = {**json.loads(_contents(folder)[1]), "num_layers": 10**8, "num_virtual_tokens": 0, "lengths": [0]}
    header = {"prompt_embeddings": {"dtype": "F32", "shape": [0, 32 * 10**8], "data_offsets": [0, 0]}}
    raw_safetensors(folder / WEIGHTS, {"__metadata__": {"peftkern": json.dumps(config)}, **header}, b"")


def _half_a_bank(tensors):
    return {**tensors, "peftkern.prefix_lens": tensors["peftkern.prefix_lens"][:1].clone()}


DEEP = '{"a":' * 100_000
FLAT = "prompt_embeddings"
#: Kinds, what happens to their weights, and what the message says.
DAMAGES = {
    # the weights' metadata
    "metadata a list": ("prefix", _metadata("[]"), "metadata: expected the prefix's config, a JSON object, got"),
    "deep metadata": ("prefix", _metadata(DEEP), "got brackets that are nested too deeply"),
    "metadata cut": ("prefix", _metadata('{"peft'), "a JSON object, got text that is not JSON (Unterminated string"),
    "a constant": ("prefix", _own(token_dim=float("nan")), "a JSON object, got the number NaN"),
    "infinity": ("prefix", _own(positions=float("-inf")), "a JSON object, got the number -Infinity"),
    "400 digits": ("prefix", _own(token_dim=10**399), "a JSON object, got a number of 400 digits"),
    "a huge float": ("prefix", _metadata('{"a": 1e999}'), "a JSON object, got the number 1e999"),
    "no format": ("prefix", _metadata("{}"), "expected peftkern_format 1, got None"),
    "another format": ("prefix", _own(peftkern_format=[1]), "expected peftkern_format 1, got [1]"),
    # types of fields
    "peft_type": ("prefix", _own(peft_type=[1]), "expected peft_type to be one of PREFIX_TUNING, "),
    "num_layers": ("prefix", _own(num_layers=True), "num_layers: expected an int from 1 to 65536, got True"),
    "2 ** 70 dims": ("prefix", _own(token_dim=2**70), "a JSON object, got a number of 22 digits"),
    "2 ** 60 dims": ("prefix", _own(token_dim=2**60), "token_dim: expected an int from 1 to 2147483647, got"),
    "float dims": ("prefix", _own(token_dim=16.0), "token_dim: expected an int from 1 to 2147483647, got 16.0"),
    "lengths null": ("prefix", _own(lengths=None), "lengths: expected a list of 2 ints, one for each layer, got N"),
    "lengths of too few": ("prefix", _own(lengths=[5]), "expected a list of 2 ints, one for each layer, got [5]"),
    "lengths that differ": ("prefix", _own(num_virtual_tokens=4), "num_virtual_tokens: expected 5, the long"),
    "negative lengths": ("prefix", _own(lengths=[5, -5]), "lengths: expected a list of 2 ints"),
    "head_dim": ("prefix", _own(head_dim="8"), "head_dim: expected an int from 1 to 2147483647, got '8'"),
    "heads of layers": ("prefix", _own(num_kv_heads=[2, [2]]), "num_kv_heads: expected a list of 2 ints"),
    "no keys": ("prefix", _own(num_kv_heads=[0, 0]), "length: expected 0 in layer 0, which has no keys"),
    "num_prefixes": ("bank", _own(num_prefixes="2"), "num_prefixes: expected an int from 1 to 2147483647, got '2'"),
    "projection": ("projection", _own(projection=6.5), "projection: expected an int from 1 to 2147483647, got 6.5"),
    "learn_length": ("gates", _own(learn_length=1), "learn_length: expected true or false, got 1"),
    "positions": ("pruned", _own(positions=-1), "positions: expected an int from 0 to 2147483647, got -1"),
    "parts": ("encoder", _own(parts=["encoder"]), "parts: expected the number of layers of each of"),
    "unknown parts": ("encoder", _own(parts={"head": 2}), "parts: expected the number of layers of each of"),
    "num_frozen_tokens": ("cartridge", _own(num_frozen_tokens=9), "num_frozen_tokens: expected 0 to length = 5"),
    "state null": ("states", _own(state=None), "state: expected a list of states for each layer, got None"),
    "state of another depth": ("states", _own(state=[[[1, 2, 3]]]), "state: expected the shapes of two states"),
    "no states": ("states", _own(state=[[], []]), "state: expected the shape of at least one state, got none"),
    "huge states": ("states", _own(state=[[[[2**31 - 1] * 8, None]]]), "peftkern.state.weights.0_conv_0'] in"),
    # tensors
    "10 ** 8 layers": ("prefix", _many_layers, "num_layers: expected an int from 1 to 65536, got 100000000"),
    "an extra tensor": (
        "gates", _tensors(lambda x: {**x, "peftkern.more": torch.zeros(1)}), "got also peftkern.more",
    ),
    "an extra tensor of a prompt": (
        "prompt", _tensors(lambda x: {**x, "peftkern.trainable.0": torch.zeros(1)}),
        "expected 'prompt_embeddings' alone in the weights of a prompt, got also ['peftkern.trainable.0']",
    ),
    "a tensor less": (
        "gates", _tensors(lambda x: {n: t for n, t in x.items() if "gate" not in n}),
        "expected ['peftkern.gate_logits'] in the weights, got none",
    ),
    "no tensors": ("prefix", _tensors(lambda x: {}), "expected 'prompt_embeddings' in the weights, got []"),
    "float8": (
        "prefix", _tensors(lambda x: {FLAT: x[FLAT].to(torch.float8_e4m3fn)}),
        "prompt_embeddings: expected floats (F64, F32, F16, BF16) [5, 64], got F8_E4M3 [5, 64]",
    ),
    "float8 of a prompt": (
        "prompt", _tensors(lambda x: {FLAT: x[FLAT].to(torch.float8_e5m2)}),
        "prompt_embeddings: expected floats (F64, F32, F16, BF16) [5, 32], got F8_E5M2 [5, 32]",
    ),
    "complex numbers": ("prefix", _tensors(lambda x: {FLAT: x[FLAT] + 0j}), "got C64 [5, 64]"),
    "bools": ("prefix", _tensors(lambda x: {FLAT: x[FLAT] > 0}), "got BOOL [5, 64]"),
    "a row less": ("prefix", _tensors(lambda x: {FLAT: x[FLAT][1:].clone()}), "got F32 [4, 64]"),
    "a scalar": ("prompt", _tensors(lambda x: {FLAT: torch.tensor(1.0)}), "[5, 32], got F32 []"),
    "lens as floats": (
        "bank", _tensors(lambda x: {**x, "peftkern.prefix_lens": torch.tensor([2.0, 4.0])}),
        "peftkern.prefix_lens: expected integers (I32) [2], got F32 [2]",
    ),
    "a length less": ("bank", _tensors(_half_a_bank), "prefix_lens: expected integers (I32) [2], got I32 [1]"),
    "lengths beyond the bank": (
        "bank", _tensors(lambda x: {**x, "peftkern.prefix_lens": torch.tensor([2, 5], dtype=torch.int32)}),
        "peftkern.prefix_lens: expected from 0 to 4 tokens, got [2, 5]",
    ),
}  # fmt: skip
#: The same for the config file.
CONFIG_DAMAGES = {
    "the model's name": ("prefix", _peft(base_model_name_or_path=["a"]), "base_model_name_or_path: expected a str"),
    "the task": ("prompt", _peft(task_type=7), "task_type: expected a string or null, got 7"),
    "deep config": ("prefix", _peft(DEEP), "got brackets that are nested too deeply"),
    "config a number": ("prefix", _peft("3"), "expected PEFT's config, a JSON object, got a JSON int"),
    "a missing field": ("prefix", _peft('{"peft_type": "PREFIX_TUNING"}'), "num_layers: expected an int from 1 to"),
    "submodules": ("prompt", _peft(num_transformer_submodules="2"), "num_transformer_submodules: expected an int"),
    "frozen": ("cartridge", _peft(num_frozen_tokens=[1]), "num_frozen_tokens: expected an int from 0 to"),
}  # fmt: skip


@pytest.mark.parametrize("name", [*DAMAGES, *CONFIG_DAMAGES])
def test_a_damaged_checkpoint_is_refused(name, tmp_path):
    kind, damage, message = (DAMAGES | CONFIG_DAMAGES)[name]
    file = CONFIG if name in CONFIG_DAMAGES else WEIGHTS
    save_prefix(KINDS[kind](), tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match="expected") as error:
        load_prefix(tmp_path)
    assert message in str(error.value)
    assert str(error.value).startswith(f"{tmp_path / file}: ")
    assert len(str(error.value)) < 1000


def test_a_config_that_is_no_file_is_refused(tmp_path):
    save_prefix(OURS["prefix"](), tmp_path)
    _peft()(tmp_path)
    (tmp_path / CONFIG).unlink()
    os.mkfifo(tmp_path / CONFIG)
    with pytest.raises(ValueError, match=r"adapter_config.json: .*got something that is not a file"):
        load_prefix(tmp_path)


@pytest.mark.parametrize("name", KINDS)
def test_what_the_config_says_of_tensors_is_what_a_module_has(name, tmp_path):
    """All kinds load, so the sizes that loading compares with the weights are those of the modules."""
    prefix = KINDS[name]()
    save_prefix(prefix, tmp_path)
    assert_same(load_prefix(tmp_path), prefix)


#: Values that damage a field.
VALUES = [
    None, True, -1, 0, 1, 2, 3, 2**31, 2**62, 2**63, 10**400, 0.5, 1e308, float("nan"), float("inf"), "", "x", "5",
    [], [1], [1, 1], [[]], [[[]]], [None], [[[1, 2], None]], [2**40, 2**40], {}, {"encoder": 1}, {"decoder": 2},
    {"a": []},
]  # fmt: skip
FIELDS = [
    "lengths", "num_frozen_tokens", "projection", "num_prefixes", "learn_length", "positions", "state", "parts",
    "head_dim", "num_kv_heads", "value_head_dim", "num_prompts", "num_transformer_submodules", "revision",
    "peft_type", "task_type",
]  # fmt: skip
DTYPES = [torch.float16, torch.float64, torch.int32, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64]
TYPES = ["PREFIX_TUNING", "CARTRIDGE", "PEFTKERN_PREFIX", "PROMPT_TUNING", "P_TUNING", "PEFTKERN_PROMPT", "LORA"]


def _mutate_json(rng, text):
    """Change one or two fields of a JSON object, or bytes of what is none any more."""
    try:
        config = json.loads(text)
    except ValueError:
        config = None
    if not isinstance(config, dict) or rng.random() < 0.2:
        return _mutate_bytes(rng, text.encode()).decode(errors="replace")
    for _ in range(rng.randint(1, 2)):
        action, name = rng.randrange(5), rng.choice([*config, *FIELDS])
        if action == 0:
            config.pop(name, None)
        elif action == 1 and isinstance(config.get(name), list) and config[name]:
            config[name][rng.randrange(len(config[name]))] = rng.choice(VALUES)
        elif action == 2:
            config["peft_type"] = rng.choice(TYPES)
        else:
            config[name] = rng.choice(VALUES)
    return json.dumps(config)


def _mutate_bytes(rng, data):
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if data:
            data[rng.randrange(min(len(data), 4096))] = rng.choice(b'\x00"[]{},:019eE-truN\xff')
    return bytes(data[: rng.randrange(len(data) + 1)]) if rng.random() < 0.2 else bytes(data)


def _mutate_tensors(rng, tensors):
    name = rng.choice([*tensors, FLAT])
    x = tensors.pop(name, torch.zeros(5, 64))
    action = rng.randrange(6)
    if action == 0:
        tensors[rng.choice([FLAT, "peftkern.trainable.0", "peftkern.x", "x"])] = x
    elif action == 1:
        tensors[name] = x.to(rng.choice(DTYPES))
    elif action == 2:
        tensors[name] = x.flatten()
    elif action == 3:
        tensors[name] = x[None] if rng.random() < 0.5 else x[..., :1].clone() if x.dim() else x
    elif action == 4:
        tensors[name], tensors["peftkern.more"] = x, torch.zeros(2)
    return tensors


def _mutate(rng, folder):
    """Damage a valid folder in one or two places."""
    for _ in range(rng.randint(1, 2)):
        place = rng.randrange(5)
        path = folder / (CONFIG if place == 0 else WEIGHTS)
        if place == 0 and path.exists():
            path.write_text(_mutate_json(rng, path.read_text()))
        elif place == 1:
            path.write_bytes(_mutate_bytes(rng, path.read_bytes()))
            return
        else:
            tensors, text = _contents(folder)
            tensors = _mutate_tensors(rng, tensors) if place == 2 else tensors
            own = {"peftkern": _mutate_json(rng, text)} if place == 3 else {"peftkern": text}
            save_file(tensors, path, own if place != 4 else None)
            if place == 4:
                return


@pytest.mark.parametrize("name", KINDS)
def test_a_mutated_checkpoint_loads_or_is_refused(name, tmp_path):
    rng = random.Random(name)
    original = tmp_path / "original"
    save_prefix(KINDS[name](), original)
    contents = {path.name: path.read_bytes() for path in original.iterdir()}
    folder = tmp_path / "damaged"
    folder.mkdir()
    outcomes = {"loads": 0, "refused": 0}
    for _ in range(100):
        for file, data in contents.items():
            (folder / file).write_bytes(data)
        _mutate(rng, folder)
        refusal = None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                loaded = load_prefix(folder)
        except ValueError as error:
            refusal = str(error)
        if refusal is not None:
            assert str(folder) in refusal
            assert len(refusal) < 1500
            outcomes["refused"] += 1
            continue
        loaded.layer_kv() if isinstance(loaded, PrefixKV) else loaded.length
        outcomes["loads"] += 1
    assert min(outcomes.values()) > 5, outcomes
