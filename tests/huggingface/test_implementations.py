# SPDX-License-Identifier: Apache-2.0
"""An attention implementation that is set while a model is patched is refused by name, in all kinds of models."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import peftkern
from peftkern import PrefixKV
from peftkern.huggingface.attention import attention_forward
from tests.huggingface import models, speech_models, uncommon, vision_models
from tests.huggingface.kinds import KINDS, patched_model
from tests.huggingface.models import FAMILIES, IDS, RIGHT, TARGETS, TASKS
from tests.huggingface.speech_models import SPEECH
from tests.huggingface.uncommon import UNCOMMON
from tests.huggingface.vision_models import VISION

MESSAGE = "expected 'peftkern' as attention implementation, got '{}'; unpatch the model and patch it again"


def inputs_of(task):
    inputs = {"input_ids": IDS, "attention_mask": RIGHT}
    return inputs | ({"decoder_input_ids": TARGETS} if task == "SEQ_2_SEQ_LM" else {})


@torch.no_grad()
def assert_refused(model, inputs, implementation="eager"):
    """The model refuses to run with another implementation, and runs again when it has ours."""
    model.eval()
    model(**inputs)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.set_attn_implementation(implementation)
    with pytest.raises(ValueError, match=r"model: attention .* without its prefix") as error:
        model(**inputs)
    assert MESSAGE.format(implementation) in str(error.value)
    peftkern.unpatch(model)
    model(**inputs)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", [*FAMILIES, *TASKS])
def test_each_family(family, kind):
    found = {**FAMILIES, **TASKS}[family]
    try:
        model = patched_model(kind, found)
    except ValueError as error:  # a prompt runs through causal models only, for example
        pytest.skip(str(error).splitlines()[0][:100])
    if type(models.patch_of(model)).__name__ in ("FallbackPatch", "ConcatenationPatch"):
        pytest.skip("it runs stock code")
    assert_refused(model, inputs_of(found.task))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", UNCOMMON)
def test_uncommon_families(family):
    """Recurrent layers, compressed keys, encoder-decoders, images."""
    model = uncommon.base_model(UNCOMMON[family])
    try:
        peftkern.patch(model, PrefixKV(model, 3, std=0.5))
    except ValueError as error:
        pytest.skip(str(error).splitlines()[0][:100])
    assert_refused(model, inputs_of(UNCOMMON[family].task) | uncommon.inputs_of(family))


@pytest.mark.parametrize("family", VISION)
def test_models_with_images(family):
    model = vision_models.vision_model(family)
    peftkern.patch(model, PrefixKV(model, 3, std=0.5))
    assert_refused(model, vision_models.batch_of(family, labels=False))


@pytest.mark.parametrize("family", SPEECH)
def test_models_with_sound(family):
    model = speech_models.speech_model(family)
    peftkern.patch(model, speech_models.module_of(family))
    assert_refused(model, speech_models.batch_of(family))


@pytest.mark.parametrize("parts", [("encoder",), ("cross",), ("encoder", "cross", "decoder")], ids=str)
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_parts_of_encoder_decoders(family, parts):
    model = models.base_model(FAMILIES[family])
    peftkern.patch(model, PrefixKV(model, 3, parts=parts, std=0.5))
    assert_refused(model, inputs_of("SEQ_2_SEQ_LM"))


def test_a_function_of_others_may_call_ours():
    """As loggers of attention do."""
    model = models.base_model(FAMILIES["llama (GQA)"]).eval()
    peftkern.patch(model, PrefixKV(model, 3, std=0.5))
    calls = []

    def attention(*args, **kwargs):
        calls.append(len(args))
        return attention_forward(*args, **kwargs)

    with torch.no_grad():
        want = model(**inputs_of("CAUSAL_LM")).logits
        AttentionInterface.register("listening", attention)
        AttentionMaskInterface.register("listening", eager_mask)
        try:
            model.set_attn_implementation("listening")
            got = model(**inputs_of("CAUSAL_LM")).logits
        finally:
            del AttentionInterface._global_mapping["listening"], AttentionMaskInterface._global_mapping["listening"]
    assert calls
    assert models.difference(got[RIGHT.bool()], want[RIGHT.bool()]) <= 1e-5
