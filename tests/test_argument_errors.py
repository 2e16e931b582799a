# SPDX-License-Identifier: Apache-2.0
"""Arguments of a wrong type: the error names the argument, for every argument of every public function."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import peftkern
from peftkern import PrefixKV, SoftPrompt
from peftkern.argument_types import checks_arguments

#: Values of which none fits most arguments.
WRONG = {
    "str": "nonsense", "None": None, "object": object(), "list": [object()], "dict": {"x": object()}, "-1": -1,
    "nan": float("nan"), "huge": 2**70, "True": True, "tensor": torch.zeros(1, 1, 1, 1, 1, 1),
}  # fmt: skip


class Public(NamedTuple):
    """A public function.

    Attributes:
        call: the function.
        arguments: a valid call's arguments.
        fits: names of :data:`WRONG` by argument, which fit it after all. None fits where it is the default.
    """

    call: Callable[..., Any]
    arguments: dict[str, Any]
    fits: Mapping[str, str] = MappingProxyType({})


def _tokenizer(text):
    return {"input_ids": [3, 1, 4, 1, 5]}


def _entered(block):
    with block:
        pass


def _model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def _peft_model():
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return get_peft_model(_model(), config)


def _functions(folder) -> dict[str, Public]:
    torch.manual_seed(0)
    model, patched = _model(), _model()
    prefix = PrefixKV(model, 3)
    peftkern.patch(patched, PrefixKV(model, 3))
    peftkern.save_prefix(prefix, folder / "prefix")
    q, kv, shared = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(2, 3, 8)
    hidden, head = torch.randn(4, 8), torch.randn(16, 8)
    teacher = torch.randn(4, 16).log_softmax(-1).topk(3)
    ids = torch.tensor([[3, 1, 4, 1]])
    batch = {"input_ids": ids, "labels": ids}
    logits = {"hidden": hidden, "lm_head": head}
    like = {"teacher_ids": teacher.indices, "teacher_log_probs": teacher.values}
    top = {"teacher_ids": teacher.indices[:3], "teacher_log_probs": teacher.values[:3]}
    attention = {"q": q, "k": kv, "v": kv, "prefix_k": shared, "prefix_v": shared}
    geometry = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 8}
    cache = [(torch.randn(2, 7, 8), torch.randn(2, 7, 8))] * 2
    flags = dict.fromkeys(
        ("shift_positions", "prefix_in_window", "freeze", "packing", "peft_bugs", "strict", "causal", "return_lse",
         "fix_seq2seq_layout", "force", "trainable", "peft_seq2seq_layout", "learn_length", "state"), "True",
    )  # fmt: skip

    def patch(**arguments):
        peftkern.unpatch(peftkern.patch(**arguments))

    return {
        "prefix_attention": Public(
            peftkern.prefix_attention, attention, flags | {"dropout_seed": "None -1", "scale": "-1"},
        ),
        "soft_prompt_embedding": Public(
            peftkern.soft_prompt_embedding,
            {"input_ids": ids, "weight": head, "prompt": torch.randn(3, 8)}, {"prompt_ids": "tensor"},
        ),
        "explain": Public(
            peftkern.explain, attention, flags | {"dropout_seed": "None -1", "scale": "-1"},
        ),
        "distillation_loss": Public(
            peftkern.distillation_loss, {**logits, **like}, {"scale": "-1"}
        ),
        "cross_entropy": Public(
            peftkern.cross_entropy, {**logits, "labels": torch.tensor([1, 2, 3, 4])},
            {"scale": "-1", "ignore_index": "-1"},
        ),
        "capture_top_k": Public(peftkern.capture_top_k, {"model": model, "batch": batch, "k": 3}, {"batch": "dict"}),
        "distil": Public(peftkern.distil, {"model": model, "batch": batch, **top}, {"batch": "dict"}),
        "label_loss": Public(peftkern.label_loss, {"model": model, "batch": batch}),
        "available_backends": Public(peftkern.available_backends, {}),
        "use_backend": Public(lambda **x: _entered(peftkern.use_backend(**x)), {"name": "reference"}),
        "patch": Public(patch, {"model": model, "prefix": prefix}, flags),
        "patched": Public(
            lambda **x: _entered(peftkern.patched(**x)), {"model": model, "prefix": prefix}, flags
        ),
        "unpatch": Public(peftkern.unpatch, {"model": patched}),
        "switched": Public(lambda **x: _entered(peftkern.switched(**x)), {"model": patched, "prefix": prefix}),
        "save_prefix": Public(
            peftkern.save_prefix, {"prefix": prefix, "folder": folder / "saved"}, {"folder": "str"}
        ),
        "load_prefix": Public(
            peftkern.load_prefix, {"folder": folder / "prefix"}, flags | {"folder": "str"}
        ),
        "export": Public(
            peftkern.export, {"prefix": prefix, "folder": folder / "exported", "to": "kv", "force": True},
            flags | {"prefix": "str", "name": "str", "folder": "str"},
        ),
        "PrefixKV": Public(
            PrefixKV, {"model_or_config": None, "length": 3, **geometry}, flags | {"model_or_config": "None"},
        ),
        "SoftPrompt": Public(SoftPrompt, {"model_or_embedding": head, "length": 3}),
        "PrefixKV.from_text": Public(
            PrefixKV.from_text, {"model": model, "tokenizer": _tokenizer, "text": "a text", "length": 3},
            {"text": "str"},
        ),
        "PrefixKV.from_cache": Public(PrefixKV.from_cache, {"cache": cache, "length": 3}),
        "PrefixKV.from_peft": Public(PrefixKV.from_peft, {"peft_model": _peft_model()}),
        "PrefixKV.from_vocabulary": Public(PrefixKV.from_vocabulary, {"model": model, "length": 3}),
        "PrefixKV.stack": Public(PrefixKV.stack, {"prefixes": [prefix, prefix]}),
        "PrefixKV.select": Public(PrefixKV.stack([prefix, prefix]).select, {"index": 0}),
        "PrefixKV.replace": Public(PrefixKV.stack([prefix, prefix]).replace, {"index": 0, "prefix": prefix}),
        "PrefixKV.prune": Public(
            PrefixKV(None, 3, learn_length=True, **geometry).prune, {"threshold": 0.5}, {"threshold": "-1"}
        ),
        "PrefixKV.grow": Public(PrefixKV(None, 3, **geometry).grow, {"n": 2, "cache": cache}),
        "SoftPrompt.from_text": Public(
            SoftPrompt.from_text, {"model": model, "tokenizer": _tokenizer, "text": "a text", "length": 3},
            {"text": "str"},
        ),
        "SoftPrompt.forward": Public(
            SoftPrompt(head, 3).forward, {"input_ids": ids, "embedding_weight": head},
            {"embedding_weight": "tensor", "prompt_ids": "tensor"},
        ),
    }  # fmt: skip


NAMES = [name for name in peftkern.__all__ if name != "BackendUnavailable"] + [
    f"{cls}.{method}"
    for cls, methods in {
        "PrefixKV": "from_text from_cache from_peft from_vocabulary stack select replace prune grow",
        "SoftPrompt": "from_text forward",
    }.items()
    for method in methods.split()
]


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    return _functions(tmp_path_factory.mktemp("prefixes"))


def test_every_public_function_is_here(functions):
    assert set(functions) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_an_error_names_the_argument(name, functions, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # a string may be a folder
    public = functions[name]
    wrong = []
    for argument, parameter in _parameters(name).items():
        fits = public.fits.get(argument, "").split()
        fits += ["None"] if parameter.default is None else []
        fits += ["huge"] if "float" in parameter.annotation else []
        for label in WRONG.keys() - set(fits):
            got = _error(public, argument, WRONG[label])
            if not re.search(rf"^(ValueError|TypeError): (.*\b)?{argument}\b.*: expected ", got):
                wrong.append(f"{argument}={label}: {got}"[:200])
    assert not wrong, f"{len(wrong)} errors do not name the argument:\n" + "\n".join(sorted(wrong))


def _parameters(name: str) -> dict[str, inspect.Parameter]:
    function: Any = peftkern
    for part in ("prefix_attention" if name == "explain" else name).split("."):
        function = getattr(function, part)
    parameters = inspect.signature(function).parameters
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name: x for name, x in parameters.items() if x.kind not in several and name != "self"}


def _error(public: Public, argument: str, value: object) -> str:
    """The first line of the error of a call with another value of one argument."""
    try:
        public.call(**{**public.arguments, argument: value})
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "no error"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "unpatch"])
def test_the_calls_that_are_changed_are_valid(name, functions):
    functions[name].call(**functions[name].arguments)


def test_a_checked_function_keeps_its_signature_and_name():
    assert str(inspect.signature(peftkern.patch)).startswith("(model: 'Model', prefix: 'nn.Module | None' = None")
    assert peftkern.patch.__name__ == "patch"


@pytest.mark.parametrize(
    ("annotation", "fits", "others"),
    [
        (int, [0, -3, 2**62], [True, 1.0, "1", 2**63, None]),
        (float, [1, 0.5, float("inf")], [True, "1", None]),
        (int | None, [None, 4], [True, 1.5]),
        (Sequence[int], [[1, 2], (3,), torch.Size([2])], ["12", 3, None]),
        (Mapping[str, Any], [{}, {"x": 1}], [[], "x", None]),
        (Literal["a", "b"], ["a"], ["c", None, ["a"]]),
        (torch.device | str | None, ["cpu", torch.device("meta"), None], ["nonsense", 1.5, True]),
        (str | os.PathLike[str], ["x", Path("x")], [None, 3, b"x"]),
        (torch.Tensor | None, [None, torch.ones(1)], [True, [1.0]]),
    ],
    ids=str,
)
def test_kinds(annotation, fits, others):
    @checks_arguments()
    def function(argument: annotation):
        return argument

    function.__wrapped__.__annotations__["argument"] = annotation
    for x in fits:
        assert function(x) is x
    for x in others:
        with pytest.raises(ValueError, match=r"^argument: expected .*, got "):
            function(x)
