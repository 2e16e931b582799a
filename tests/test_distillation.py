# SPDX-License-Identifier: Apache-2.0
"""The losses without logits: values and gradients against the reference, bounds, memory, repeatability, errors."""

from __future__ import annotations

import doctest
import math
import re
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

import peftkern
from peftkern import cross_entropy, distillation, distillation_loss, output_layer, reference
from peftkern.distillation import logits_of, top_k_log_probs

OBJECTIVES = ("cross_entropy", "kl_with_tail")
#: Options of an output layer, all at once and none.
LAYERS = {"plain": {}, "all": {"scale": 0.3, "softcap": 2.0, "temperature": 0.7}, "T": {"temperature": 2.0}}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Blocks of 64 columns and 16 rows, so that small tensors have many."""
    monkeypatch.setattr(output_layer, "_MIN_BYTES", 1 << 10)


def _inputs(N=37, V=331, E=12, K=7, *, dtype=torch.float64, seed=0, sharpness=1.5):
    generator = torch.Generator().manual_seed(seed)
    hidden, lm_head = (torch.randn(n, E, generator=generator, dtype=torch.float64).to(dtype) for n in (N, V))
    teacher = (torch.randn(N, V, generator=generator, dtype=torch.float64) * sharpness).log_softmax(-1).topk(K)
    return hidden, lm_head, teacher.indices, teacher.values


def _bias(V, dtype=torch.float64):
    return torch.linspace(-1, 1, V, dtype=dtype)


def _gradient(loss, hidden, *, again=False):
    return torch.autograd.grad(loss, hidden, retain_graph=again)[0]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    "sizes", [(37, 331, 12, 7), (1, 1, 1, 1), (5, 64, 3, 64), (17, 65, 4, 1), (33, 129, 7, 129), (40, 200, 5, 150)]
)
def test_value_and_gradient_are_those_of_the_reference(sizes, layer, objective):
    hidden, lm_head, ids, log_probs = _inputs(*sizes)
    options = {**LAYERS[layer], "objective": objective} | ({"bias": _bias(sizes[1])} if layer == "all" else {})
    hidden.requires_grad_()
    weights = torch.linspace(0.5, 1.5, len(hidden), dtype=torch.float64)
    want = reference.distillation_loss(hidden, lm_head, ids, log_probs, **options)
    got = distillation_loss(hidden, lm_head, ids, log_probs, reduction="none", **options)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    mean = distillation_loss(hidden, lm_head, ids, log_probs, weights=weights, **options)
    torch.testing.assert_close(mean, (want * weights).sum() / weights.sum(), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(
        _gradient(mean, hidden), _gradient((want * weights).sum() / weights.sum(), hidden), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradcheck(objective):
    hidden, lm_head, ids, log_probs = _inputs(17, 66, 2, 5)
    options = {"objective": objective, "scale": 0.5, "softcap": 3.0, "temperature": 1.5, "bias": _bias(66)}

    def losses(x):
        return distillation_loss(x, lm_head, ids, log_probs, reduction="none", **options)

    assert torch.autograd.gradcheck(losses, hidden.requires_grad_())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_student_that_agrees_with_its_teacher_has_no_gradient(objective):
    hidden, lm_head, *_ = _inputs(20, 200, 6, dtype=torch.float32)
    ids, log_probs = top_k_log_probs(hidden, lm_head, 200 if objective == "cross_entropy" else 5)
    hidden.requires_grad_()
    loss = distillation_loss(hidden, lm_head, ids, log_probs, objective=objective, reduction="sum")
    assert _gradient(loss, hidden).abs().max() < 1e-5
    if objective == "kl_with_tail":
        assert loss.abs() < 1e-4


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_is_torchs(reduction):
    hidden, lm_head, *_ = _inputs()
    hidden.requires_grad_()
    labels = torch.arange(len(hidden)) * 8
    labels[::3] = -100
    want = F.cross_entropy(hidden @ lm_head.t(), labels, reduction=reduction)
    got = cross_entropy(hidden, lm_head, labels, reduction=reduction)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(_gradient(got.sum(), hidden), _gradient(want.sum(), hidden), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 7, 70, 331])
def test_top_k(k, temperature):
    hidden, lm_head, *_ = _inputs()
    want = (hidden @ lm_head.t() / temperature).log_softmax(-1).topk(k)
    ids, log_probs = top_k_log_probs(hidden, lm_head, k, temperature=temperature)
    assert torch.equal(ids, want.indices)
    torch.testing.assert_close(log_probs, want.values, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_errors_are_at_most_those_of_eager_in_the_same_dtype(dtype, layer, objective):
    """Root mean square errors against fp64: twice eager's forward, three times backward, and a rounding."""
    hidden, lm_head, ids, log_probs = _inputs(64, 500, 32, 9, dtype=dtype)
    options = {**LAYERS[layer], "objective": objective}

    def run(function, x, weight, log_p, **more):
        x = x.detach().requires_grad_()
        losses = function(x, weight, ids, log_p, **options, **more)
        return losses.double(), _gradient(losses.sum(), x).double()

    exact = run(reference.distillation_loss, hidden.double(), lm_head.double(), log_probs)
    eager = run(reference.distillation_loss, hidden, lm_head, log_probs.float())
    ours = run(distillation_loss, hidden, lm_head, log_probs.float(), reduction="none")
    floors = torch.finfo(torch.float32).eps, torch.finfo(dtype).eps
    for got, same, want, factor, floor in zip(ours, eager, exact, (2, 3), floors, strict=True):
        error, bound = ((x - want).square().mean().sqrt() for x in (got, same))
        assert error <= factor * bound + floor * want.square().mean().sqrt()


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 3), (torch.bfloat16, 1)])
def test_a_student_close_to_its_teacher_has_an_exact_gradient(dtype, factor, monkeypatch):
    """The teacher's share is subtracted before output embeddings are weighted, so that close ones do not cancel."""
    monkeypatch.setattr(distillation, "_product_dtype", lambda *_: dtype)
    hidden, lm_head, *_ = _inputs(30, 300, 16, dtype=dtype)
    ids, log_probs = top_k_log_probs(hidden * 3, lm_head, 3)
    near = hidden * 3.1
    exact, eager, ours = (near.detach().to(kind).requires_grad_() for kind in (torch.float64, dtype, dtype))
    want = reference.distillation_loss(exact, lm_head.double(), ids, log_probs.double()).sum()
    same = reference.distillation_loss(eager, lm_head, ids, log_probs).sum()
    got = distillation_loss(ours, lm_head, ids, log_probs, reduction="sum")
    error, bound = (
        (_gradient(loss, x).double() - _gradient(want, exact, again=True)).square().mean().sqrt()
        for loss, x in ((got, ours), (same, eager))
    )
    assert error <= factor * bound


def test_extreme_logits_give_finite_numbers():
    hidden, lm_head, ids, log_probs = _inputs(20, 200, 6, dtype=torch.float32)
    hidden = hidden.mul_(200).requires_grad_()  # probabilities underflow
    for objective in OBJECTIVES:
        exact = hidden.detach().double().requires_grad_()
        options = {"objective": objective}
        want = reference.distillation_loss(exact, lm_head.double(), ids, log_probs.double(), **options).sum()
        got = distillation_loss(hidden, lm_head, ids, log_probs, reduction="sum", **options)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)
        torch.testing.assert_close(_gradient(got, hidden).double(), _gradient(want, exact), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_empty_batches_and_rows_without_weight(objective):
    hidden, lm_head, ids, log_probs = _inputs(dtype=torch.float32)
    for reduction in ("mean", "sum", "none"):
        none = hidden[:0].clone().requires_grad_()
        loss = distillation_loss(none, lm_head, ids[:0], log_probs[:0], reduction=reduction, objective=objective)
        assert loss.sum() == 0
        assert _gradient(loss.sum(), none).shape == (0, 12)
    hidden[3] = float("nan")
    hidden.requires_grad_()
    weights = torch.ones(len(hidden), dtype=torch.bool)
    weights[3] = False
    loss = distillation_loss(hidden, lm_head, ids, log_probs, weights=weights, objective=objective)
    chosen = hidden.detach()[weights].requires_grad_()
    same = distillation_loss(chosen, lm_head, ids[weights], log_probs[weights], objective=objective)
    torch.testing.assert_close(loss, same)
    gradient = _gradient(loss, hidden)
    torch.testing.assert_close(gradient[weights], _gradient(same, chosen))
    assert (gradient[3] == 0).all()
    assert distillation_loss(hidden, lm_head, ids, log_probs, weights=weights & False) == 0


def test_log_probs_of_minus_infinity_are_probabilities_of_zero():
    hidden, lm_head, ids, log_probs = _inputs()
    log_probs[:, 4:] = -torch.inf
    for objective in OBJECTIVES:
        got = distillation_loss(hidden, lm_head, ids, log_probs, objective=objective)
        assert torch.isfinite(got)
        if objective == "cross_entropy":
            torch.testing.assert_close(got, distillation_loss(hidden, lm_head, ids[:, :4], log_probs[:, :4]))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("k", [200, 331])
def test_excluded_tokens_add_nothing(k, objective):
    """64 tokens have a bias of -inf, a whole block of them: as without them. K may contain all others, and them."""
    hidden, lm_head, *_ = _inputs(9, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    kept = torch.cat([torch.arange(64), torch.arange(128, 331)])
    bias = torch.full((331,), -torch.inf).index_fill(0, kept, 0)
    ids, log_probs = top_k_log_probs(torch.randn(hidden.shape, generator=generator), lm_head, k, bias=bias)
    assert not log_probs.isnan().any()
    assert (log_probs.exp().sum(1) < 1).any() or k == 200
    results = []
    for weight, more in ((lm_head, {"bias": bias}), (lm_head[kept], {})):
        x = hidden.clone().requires_grad_()
        if not more:  # excluded ids come last
            places = torch.full((331,), -1).index_copy(0, kept, torch.arange(len(kept)))
            ids, log_probs = places[ids[:, :267]], log_probs[:, :267]
        losses = distillation_loss(x, weight, ids, log_probs, objective=objective, reduction="none", **more)
        results.append((losses.detach(), _gradient(losses.sum(), x)))
    assert results[0][0].isfinite().all()
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_a_student_that_excludes_what_its_teacher_expects_has_an_infinite_loss():
    hidden, lm_head, ids, log_probs = _inputs()
    bias = torch.zeros(331).index_fill(0, ids[0], -torch.inf)
    losses = distillation_loss(hidden[:1], lm_head, ids[:1], log_probs[:1], bias=bias)
    assert losses == torch.inf
    outside = torch.full((331,), -torch.inf).index_fill(0, ids[0], 0)
    options = {"bias": outside, "objective": "kl_with_tail"}
    assert distillation_loss(hidden[:1], lm_head, ids[:1], log_probs[:1], **options) == torch.inf


@pytest.mark.parametrize(("missing", "expected"), [(0.8, 0.0), (1.25, torch.inf)])
def test_what_a_teacher_s_sum_lacks_by_rounding_is_no_probability_of_others(missing, expected):
    """The student excludes all others. Rounding explains a lack of 2 eps (1 + log K)."""
    hidden, lm_head, *_ = _inputs(2, dtype=torch.float32)
    bias = torch.full((331,), -torch.inf).index_fill(0, torch.tensor([0, 1]), 0)
    lack = missing * 2 * torch.finfo(torch.bfloat16).eps * (1 + math.log(2))
    log_probs = torch.tensor([[(1 - lack) / 2] * 2] * 2, dtype=torch.float64).log().bfloat16()
    assert abs((1 - log_probs.double().exp().sum(1)) / lack - 1).max() < 0.15, "bf16 moves the case too far"
    ids = torch.tensor([[0, 1]] * 2)
    losses = distillation_loss(
        hidden, lm_head, ids, log_probs, objective="kl_with_tail", reduction="none", bias=bias
    )  # fmt: skip
    assert torch.equal(losses.isinf(), torch.full((2,), expected == torch.inf)), losses


def test_buffers_that_start_with_nan_change_nothing():
    hidden, lm_head, ids, log_probs = _inputs(dtype=torch.float32)

    def results():
        x = hidden.clone().requires_grad_()
        loss = distillation_loss(x, lm_head, ids, log_probs, softcap=3.0)
        return [loss.detach(), _gradient(loss, x), *top_k_log_probs(hidden, lm_head, 5)]

    want = results()
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        assert torch.empty(1).isnan().all()
        got = results()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_results_are_bitwise_repeatable():
    hidden, lm_head, ids, log_probs = _inputs(100, 400, 48, 20, dtype=torch.float32)

    def results():
        x = hidden.clone().requires_grad_()
        losses = distillation_loss(x, lm_head, ids, log_probs, reduction="none")
        return losses.detach(), _gradient(losses.sum(), x)

    first, second = results(), results()
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_rows_do_not_depend_on_each_other_across_blocks():
    hidden, lm_head, ids, log_probs = _inputs(200, 700, 8, 5)
    losses = distillation_loss(hidden, lm_head, ids, log_probs, reduction="none")
    for row in (0, 57, 199):
        alone = distillation_loss(hidden[[row]], lm_head, ids[[row]], log_probs[[row]])
        torch.testing.assert_close(alone, losses[row])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    hidden, lm_head, ids, log_probs = _inputs(dtype=torch.float32)
    hidden.requires_grad_()
    exact = distillation_loss(hidden, lm_head, ids, log_probs)
    with torch.autocast("cpu", dtype=dtype):
        loss = distillation_loss(hidden, lm_head, ids, log_probs)
        values = top_k_log_probs(hidden, lm_head, 5)[1]
    assert loss.dtype == values.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=0)
    gradient = _gradient(loss, hidden)
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, _gradient(exact, hidden), rtol=5e-2, atol=1e-3)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_in_half_precision(dtype, native):
    """As on CPUs that multiply in this dtype, and on those that do not."""
    hidden, lm_head, ids, log_probs = _inputs(dtype=dtype)
    hidden.requires_grad_()
    exact = hidden.detach().double().requires_grad_()
    want = reference.distillation_loss(exact, lm_head.double(), ids, log_probs).mean()
    with mock.patch.object(distillation, "_product_dtype", return_value=dtype if native else torch.float32):
        loss = distillation_loss(hidden, lm_head, ids, log_probs.float())
    tolerance = 2e-2 if native else 1e-5
    torch.testing.assert_close(loss.double(), want, rtol=tolerance, atol=0)
    torch.testing.assert_close(_gradient(loss, hidden).double(), _gradient(want, exact), rtol=5e-2, atol=2e-3)


def test_no_gradient_is_computed_that_nobody_needs():
    hidden, lm_head, ids, log_probs = _inputs()
    with mock.patch.object(output_layer, "_add_product", side_effect=AssertionError):
        distillation_loss(hidden, lm_head, ids, log_probs)
        with torch.no_grad():
            distillation_loss(hidden.requires_grad_(), lm_head, ids, log_probs)


def test_double_backward_raises():
    hidden, lm_head, ids, log_probs = _inputs()
    loss = distillation_loss(hidden.requires_grad_(), lm_head, ids, log_probs).square()
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_any_strides():
    hidden, lm_head, ids, log_probs = _inputs()
    want = distillation_loss(hidden, lm_head, ids, log_probs)
    strided = [x.t().contiguous().t() for x in (hidden, lm_head, ids, log_probs)]
    torch.testing.assert_close(distillation_loss(*strided), want)
    torch.testing.assert_close(distillation_loss(hidden, lm_head, ids.int(), log_probs), want)


def test_logits_of_a_few_rows():
    hidden, lm_head, *_ = _inputs()
    want = 2 * torch.tanh((hidden @ lm_head.t() + _bias(331)) * 0.3 / 2)
    torch.testing.assert_close(logits_of(hidden, lm_head, bias=_bias(331), scale=0.3, softcap=2.0), want)


NAN, X = float("nan"), torch.zeros
BAD = [
    ({"hidden": [1.0]}, "hidden: expected a tensor, got list"),
    ({"hidden": X(4, 3, 12)}, "hidden: expected shape [N, E], got [4, 3, 12]"),
    ({"hidden": X(4, 12).long()}, "hidden: expected torch.float32 or torch.float16"),
    ({"lm_head": X(331, 11).double()}, "lm_head: expected shape [V, 12], got [331, 11]"),
    ({"lm_head": X(0, 12).double()}, "lm_head: expected at least one token, got [0, E]"),
    ({"lm_head": X(331, 12).double().requires_grad_()}, "lm_head: expected a frozen tensor"),
    ({"bias": X(330).double()}, "bias: expected shape [331], got [330]"),
    ({"teacher_ids": X(37, 7)}, "teacher_ids: expected torch.int32 or torch.int64, got torch.float32"),
    ({"teacher_ids": X(36, 7).long()}, "teacher_ids: expected shape [37, K], got [36, 7]"),
    ({"teacher_ids": X(37, 0).long()}, "teacher_ids: expected 1 to 331 ids per row, got 0"),
    ({"teacher_ids": torch.arange(332).expand(37, -1)}, "teacher_ids: expected 1 to 331 ids per row, got 332"),
    ({"teacher_ids": torch.arange(7).expand(37, -1) + 325}, "teacher_ids: expected ids in [0, 331)"),
    ({"teacher_ids": torch.arange(7).expand(37, -1) - 1}, "teacher_ids: expected ids in [0, 331)"),
    ({"teacher_ids": X(37, 7).long()}, "teacher_ids: expected distinct ids in each row, got an id twice"),
    ({"teacher_log_probs": X(37, 6)}, "teacher_log_probs: expected shape [37, 7], got [37, 6]"),
    ({"teacher_log_probs": X(37, 7) + 3}, "teacher_log_probs: expected logarithms of probabilities"),
    ({"teacher_log_probs": X(37, 7) + NAN}, "teacher_log_probs: expected logarithms of probabilities"),
    ({"teacher_log_probs": X(37, 7)}, "teacher_log_probs: expected probabilities with a sum of at most 1 per row"),
    ({"teacher_log_probs": X(37, 7).requires_grad_()}, "teacher_log_probs: expected a tensor without gradient"),
    ({"temperature": 0.0}, "temperature: expected a finite number above 0, got 0.0"),
    ({"temperature": torch.tensor(1.0)}, "temperature: expected a finite number above 0, got tensor(1.)"),
    ({"softcap": -1.0}, "softcap: expected a finite number above 0, got -1.0"),
    ({"scale": NAN}, "scale: expected a finite number, got nan"),
    ({"objective": "kl"}, "objective: expected 'cross_entropy' or 'kl_with_tail', got 'kl'"),
    ({"reduction": "batchmean"}, "reduction: expected 'mean', 'sum' or 'none', got 'batchmean'"),
    ({"weights": X(36)}, "weights: expected shape [37], got [36]"),
    ({"weights": X(37) - 1}, "weights: expected finite weights of at least 0"),
    ({"weights": X(37) + NAN}, "weights: expected finite weights of at least 0"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message[:48] for _, message in BAD])
def test_bad_arguments_are_named(changes, message):
    names = ("hidden", "lm_head", "teacher_ids", "teacher_log_probs")
    arguments = dict(zip(names, _inputs(), strict=True)) | changes
    with pytest.raises(ValueError, match=re.escape(message)):
        distillation_loss(**arguments)


def test_bad_arguments_of_the_others_are_named():
    hidden, lm_head, *_ = _inputs()
    for k in (0, 332, 2.0, True):
        with pytest.raises(ValueError, match=re.escape(f"k: expected an int in [1, 331], got {k!r}")):
            top_k_log_probs(hidden, lm_head, k)
    for label in (331, -1):
        with pytest.raises(ValueError, match=re.escape("labels: expected ids in [0, 331) or -100")):
            cross_entropy(hidden, lm_head, torch.full((37,), label))
    with pytest.raises(ValueError, match=re.escape("labels: expected shape [37], got [36]")):
        cross_entropy(hidden, lm_head, torch.zeros(36, dtype=torch.int64))


@pytest.mark.parametrize("fault", ["forgets to rescale", "counts a block twice", "shows a chosen logit"])
def test_planted_faults_are_found(fault):
    """What the comparisons above rely on: each fault changes a value by more than their tolerance."""
    hidden, lm_head, ids, log_probs = _inputs()
    want = reference.distillation_loss(hidden, lm_head, ids, log_probs).mean()
    blocks = output_layer.OutputLayer._blocks

    def twice(self, *args):
        for first, weight, block in blocks(self, *args):
            copy = block.clone()
            yield first, weight, block
            if first == 64:
                yield first, weight, copy

    patches = {
        "forgets to rescale": mock.patch.object(torch.Tensor, "mul_", lambda self, *_: self),
        "counts a block twice": mock.patch.object(output_layer.OutputLayer, "_blocks", twice),
        "shows a chosen logit": mock.patch.object(output_layer, "_hide"),
    }
    with patches[fault]:
        got = distillation_loss(hidden, lm_head, ids, log_probs)
    assert (got - want).abs() > 1e-4


def test_the_examples_in_docstrings_run():
    assert doctest.testmod(distillation).failed == 0
    assert peftkern.distillation_loss is distillation_loss


def test_small_gradients_survive_fp16_under_a_loss_scale():
    """The gradients of a student that is nearly its teacher are below fp16's range without the scale of the loss."""
    hidden, lm_head, *_ = _inputs(64, 1000, 128, dtype=torch.float16)
    lm_head = lm_head * 0.05
    log_probs, ids = (hidden.double() @ lm_head.double().t() * 0.999 / 4).log_softmax(-1).topk(20)

    def gradient(loss, x):
        options = {"temperature": 4.0, "objective": "kl_with_tail"}
        losses = loss(x, lm_head.to(x.dtype), ids, log_probs, **options)
        return _gradient(losses.mean() * 65536 * 16, x).double()

    want = gradient(reference.distillation_loss, hidden.double().requires_grad_())
    got = gradient(distillation_loss, hidden.clone().requires_grad_())
    assert (got - want).norm() < 0.02 * want.norm()
