# SPDX-License-Identifier: Apache-2.0
"""Prints how far a patched model is from PEFT, per model family: ``python -m tests.huggingface.parity_table``.

Relative differences (largest difference over largest value) in fp32 between PEFT and the same model patched, the
worst of four masks: none, all ones, right padding, left padding. ``--backend`` chooses the kernels.
"""

from __future__ import annotations

import argparse

import torch

import peftkern
from tests.huggingface import models

MODES = {"greedy": {"do_sample": False}, "beam": {"do_sample": False, "num_beams": 3}, "sample": {"do_sample": True}}


def parity(family: models.Family, **config: object) -> dict[str, str]:
    """One row: forward and backward, with checkpointing, a native prefix, generation."""
    stock = models.peft_model(family, patched=False, **config)
    patched = models.peft_model(family, patched=True, **config)
    outputs, gradients = zip(*(_compare(patched, stock, family, mask) for mask in models.MASKS.values()), strict=True)
    patched.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = [_compare(patched, stock, family, mask)[1] for mask in models.MASKS.values()]
    row = {
        "logits": f"{max(outputs):.1e}",
        "gradients": f"{max(gradients):.1e}",
        "checkpointed": f"{max(checkpointed):.1e}",
        "native": "-" if config else _native(stock, family),
    }
    for mode, options in MODES.items():
        same = "-"
        if family.generates:
            want, got = (models.generate(m.eval(), family.task, **options) for m in (stock, patched))
            same = "same" if torch.equal(want, got) else "DIFFERENT"
        row[mode] = same
    return row


def _compare(model, reference, family, mask):
    got, want = (models.training_step(m, family.task, mask) for m in (model, reference))
    return models.step_difference(got, want, mask if family.generates else None)


def _native(stock, family):
    prefix = models.native_prefix(stock)
    model = peftkern.patch(models.base_model(family), prefix, freeze=True)
    worst = 0.0
    for mask in models.MASKS.values():
        models.training_step(stock, family.task, mask)
        models.training_step(model, family.task, mask)
        worst = max(worst, models.difference(prefix.trainable[0].grad, models.peft_prefix(stock).grad))
    return f"{worst:.1e}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="auto", help="auto, or one of peftkern.available_backends()")
    backend = parser.parse_args().backend
    torch.set_num_threads(1)
    rows: dict[str, tuple[models.Family, dict[str, object]]] = {
        **{name: (family, {}) for name, family in {**models.FAMILIES, **models.TASKS}.items()},
        "llama + projection": (models.FAMILIES["llama (GQA)"], models.PROJECTION),
        "t5 + projection": (models.FAMILIES["t5"], models.PROJECTION),
        "llama cartridge": (models.FAMILIES["llama (GQA)"], {"num_frozen_tokens": 2}),
    }
    columns = ["logits", "gradients", "checkpointed", "native", *MODES]
    print(f"{'backend ' + backend:26s}" + "".join(f"{column:>13s}" for column in columns))
    with peftkern.use_backend(backend):
        for name, (family, config) in rows.items():
            row = parity(family, **config)
            print(f"{name:26s}" + "".join(f"{row[column]:>13s}" for column in columns), flush=True)


if __name__ == "__main__":
    main()
