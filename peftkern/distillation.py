# SPDX-License-Identifier: Apache-2.0
"""Losses of hidden states against a teacher or labels, without logits [N, V]."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .argument_types import checks_arguments
from .output_layer import BlockSizes, OutputLayer
from .validation import FLOATS, argument_error, check_device, check_dtype, check_index_tensor, check_shape

__all__ = ["Objective", "Reduction", "cross_entropy", "distillation_loss", "logits_of", "top_k_log_probs"]

Reduction = Literal["mean", "sum", "none"]
Objective = Literal["cross_entropy", "kl_with_tail"]
#: By how much a teacher's probability, or their sum, may exceed 1: rounding of log-probabilities in bf16.
_ROUNDING = 0.05


def distillation_loss(
    hidden: Tensor,
    lm_head: Tensor,
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
    *,
    temperature: float = 1.0,
    objective: Objective = "cross_entropy",
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Distillation from the K most likely tokens of a teacher, without the student's logits [N, V].

    ::

        z_iv = softcap(scale * (<hidden_i, lm_head_v> + bias_v)) / temperature       softcap(x) = c tanh(x / c)
        q_iv = exp(z_iv) / sum over all V tokens of exp(z_i)
        p_ik = exp(teacher_log_probs_ik)

        "cross_entropy":  loss_i = -sum_k p_ik log q_i,ids_ik
        "kl_with_tail":   loss_i = sum_k p_ik (log p_ik - log q_i,ids_ik) + p_i,rest (log p_i,rest - log q_i,rest)

    The partition is exact: it contains all V tokens. ``rest`` is the event that the token is none of the K, so that
    "kl_with_tail" is a lower bound of the KL divergence of the whole distributions, zero only if the K + 1
    probabilities agree. "cross_entropy" is the loss of Cartridges (Eyuboglu et al. 2025); where the K probabilities
    sum to less than 1, its minimum puts all of the student's mass on the K tokens.

    Logits are computed in blocks of rows and tokens and stay in a buffer of about 1 / 32 of their bytes. The gradient
    of ``hidden`` is computed in the forward pass, in the same pass over the vocabulary.

    Args:
        hidden: [N, E], fp32, fp16, bf16 or fp64: what the model's output layer reads.
        lm_head: [V, E], the weight of the output layer. It is frozen: a weight that requires a gradient is refused.
        teacher_ids: int32 or int64 [N, K], 1 <= K <= V, distinct in each row.
        teacher_log_probs: [N, K], the teacher's log-probabilities of them, normalized over all V tokens.
            -inf is a probability of 0.
        temperature: T > 0. Both distributions must be at the same temperature (Hinton et al. 2015): the student's
            logits are divided by T here, the teacher's before ``teacher_log_probs`` were computed. Gradients
            decrease as 1 / T^2; multiply the loss by T^2 to compensate for it.
        objective: ``"cross_entropy"`` or ``"kl_with_tail"``, see above.
        weights: bool or float [N], at least 0: factors of the rows' losses. Rows of weight 0 are skipped.
        reduction: ``"mean"`` (sum of the losses over the sum of the weights; 0 if that is 0), ``"sum"``, or
            ``"none"`` for the losses [N].
        bias: [V], of the output layer; frozen. -inf excludes a token, which then adds nothing to the loss if its
            ``teacher_log_probs`` are -inf too; if they are not, the loss is infinite.
        scale: of the logits (Cohere, Granite).
        softcap: c in the formula above (Gemma 2), or None to disable it.

    Returns:
        The loss in fp32 (fp64 for fp64). Only ``hidden`` gets a gradient, in its dtype. Sums are in fp32 and in a
        fixed order: loss and gradient are bitwise repeatable. Double backward is unsupported. Under autocast,
        products are computed in its dtype.

    Raises:
        ValueError: naming the argument, what was expected and what was passed. The values of ``teacher_ids``,
            ``teacher_log_probs`` and ``weights`` are checked too, for which the host waits for the device once.

    >>> import torch, peftkern
    >>> hidden, lm_head = torch.randn(5, 16, requires_grad=True), torch.randn(100, 16)
    >>> teacher = torch.randn(5, 100).log_softmax(-1).topk(20)
    >>> loss = peftkern.distillation_loss(hidden, lm_head, teacher.indices, teacher.values)
    >>> loss.backward()
    """
    _check_layer(hidden, lm_head, bias, scale, softcap, temperature)
    _check_options(hidden, weights, reduction, objective)
    _check_teacher(hidden, lm_head, teacher_ids, teacher_log_probs)
    _check_values(lm_head, teacher_ids, teacher_log_probs, weights)
    layer = _layer(hidden, lm_head, bias, scale, softcap, temperature)
    teacher = _Teacher(teacher_ids, teacher_log_probs.detach(), objective)
    return _reduced(hidden, layer, teacher, weights, reduction)


@checks_arguments()
def cross_entropy(
    hidden: Tensor,
    lm_head: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """The cross-entropy of labels, without logits [N, V]: :func:`distillation_loss` from a teacher who is certain.

    Equal to ``torch.nn.functional.cross_entropy(logits.float(), labels)``, except that the mean over no rows is 0.

    Args:
        labels: int32 or int64 [N], in [0, V) or ``ignore_index``. Ignored rows are skipped.
        hidden, lm_head, reduction, bias, scale, softcap: as for :func:`distillation_loss`.

    Raises:
        ValueError: naming the argument, what was expected and what was passed.
    """
    _check_layer(hidden, lm_head, bias, scale, softcap, 1.0)
    _check_options(hidden, None, reduction, "cross_entropy")
    check_index_tensor("labels", labels, hidden.shape[0])
    check_device("labels", labels, "hidden", hidden.device)
    counts = labels != ignore_index
    ids = labels.masked_fill(~counts, 0)[:, None]
    if bool(((ids < 0) | (ids >= len(lm_head))).any()):
        raise argument_error("labels", f"ids in [0, {len(lm_head)}) or {ignore_index}", "others")
    teacher = _Teacher(ids, hidden.new_zeros(ids.shape, dtype=torch.float32), "cross_entropy")
    layer = _layer(hidden, lm_head, bias, scale, softcap, 1.0)
    return _reduced(hidden, layer, teacher, counts, reduction)


@torch.no_grad()
def top_k_log_probs(
    hidden: Tensor,
    lm_head: Tensor,
    k: int,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """What :func:`distillation_loss` needs of a teacher, without its logits [N, V].

    Args:
        k: 1 <= k <= V.
        hidden, lm_head, temperature, bias, scale, softcap: as for :func:`distillation_loss`.

    Returns:
        (ids int64 [N, k], log_probs fp32 [N, k]) of the k most likely tokens, most likely first. ``log_probs`` are
        normalized over all V tokens.

    Raises:
        ValueError: naming the argument, what was expected and what was passed.
    """
    _check_layer(hidden, lm_head, bias, scale, softcap, temperature)
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= len(lm_head):
        raise argument_error("k", f"an int in [1, {len(lm_head)}]", repr(k))
    layer = _layer(hidden, lm_head, bias, scale, softcap, temperature)
    sizes = BlockSizes.of(len(hidden), lm_head, hidden.itemsize, per_row=6 * k)
    ids = hidden.new_empty((len(hidden), k), dtype=torch.int64)
    log_probs = hidden.new_empty((len(hidden), k), dtype=layer.sum_dtype)
    with _without_autocast(hidden):
        for first in range(0, len(hidden), sizes.rows):
            rows = slice(first, first + sizes.rows)
            log_probs[rows], ids[rows] = layer.top_k(hidden[rows], k, sizes)
    return ids, log_probs


@torch.no_grad()
def logits_of(
    hidden: Tensor, lm_head: Tensor, *, bias: Tensor | None = None, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """The logits [N, V] of a few rows as the functions of this module compute them, in fp32 and without gradients."""
    _check_layer(hidden, lm_head, bias, scale, softcap, 1.0)
    layer = _layer(hidden, lm_head, bias, scale, softcap, 1.0)
    with _without_autocast(hidden):
        return layer.logits(hidden)


@dataclass(frozen=True)
class _Teacher:
    """Validated ids [N, K] and log-probabilities [N, K] of a teacher, and how the student is compared to them."""

    ids: Tensor
    log_probs: Tensor
    objective: Objective


def _reduced(
    hidden: Tensor, layer: OutputLayer, teacher: _Teacher, weights: Tensor | None, reduction: Reduction
) -> Tensor:
    rows = None if weights is None else weights.detach().nonzero().squeeze(1)
    needs_grad = hidden.requires_grad and torch.is_grad_enabled()  # ctx.needs_input_grad is true under no_grad too
    losses: Tensor = _DistillationLoss.apply(hidden, layer, teacher, rows, needs_grad)
    if weights is not None:
        weights = weights.detach().to(losses.dtype)
        losses = losses * weights
    if reduction == "none":
        return losses
    total = losses.sum()
    if reduction == "sum":
        return total
    count = losses.new_tensor(len(losses)) if weights is None else weights.sum()
    return total / torch.where(count > 0, count, 1)


class _DistillationLoss(torch.autograd.Function):
    """The losses [N] of the rows. Saves their gradients by ``hidden`` and nothing else.

    A row's gradient is saved as a power of two [N] times numbers up to 1 [N, E], because fp16 would round the small
    gradients of a good student to 0 before backward multiplies them by the scale of the loss.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, layer: OutputLayer, teacher: _Teacher, rows: Tensor | None, needs_grad: bool
    ) -> Tensor:
        losses = hidden.new_zeros(len(hidden), dtype=layer.sum_dtype)
        grad, scales = (torch.zeros_like(hidden), losses.new_zeros(len(hidden))) if needs_grad else (None, None)
        count = len(hidden) if rows is None else len(rows)
        sizes = BlockSizes.of(count, layer.weight, hidden.itemsize, per_row=8 * teacher.ids.shape[1])
        with _without_autocast(hidden):
            for first in range(0, count, sizes.rows):
                block = slice(first, first + sizes.rows) if rows is None else rows[first : first + sizes.rows]
                losses[block], grad_block = _losses(hidden[block], layer, teacher, block, sizes, needs_grad)
                if grad is not None and scales is not None:
                    scale = _powers_of_two(grad_block)
                    grad[block] = grad_block.div_(scale[:, None]).to(grad.dtype)
                    scales[block] = scale
        if grad is not None:
            ctx.save_for_backward(grad, scales)
            ctx.block = sizes.rows
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        grad, scales = ctx.saved_tensors
        scaled = torch.empty_like(grad)
        for first in range(0, len(grad), ctx.block):
            rows = slice(first, first + ctx.block)
            scaled[rows] = grad[rows] * (scales[rows] * grad_losses[rows])[:, None]  # in fp32
        return scaled, None, None, None, None


def _powers_of_two(rows: Tensor) -> Tensor:
    """The smallest power of two [R] that is larger than all magnitudes of a row [R, E]; 1 for a row of zeros."""
    return torch.ldexp(rows.new_ones(len(rows)), rows.abs().amax(1).frexp().exponent)


def _losses(
    hidden: Tensor, layer: OutputLayer, teacher: _Teacher, block: Any, sizes: BlockSizes, needs_grad: bool
) -> tuple[Tensor, Any]:
    """The losses [R] of rows with hidden states [R, E], and their gradients [R, E]; None if nobody needs them.

    With m = sum of all p, the derivative of a loss by the logit of one of the K tokens is m q_k - p_k. By the
    logarithm of the sum of the exponentials of all other logits, it is m q_rest - p_rest.
    """
    ids, log_p = teacher.ids[block].long(), teacher.log_probs[block].to(layer.sum_dtype)
    soft = layer.softmax(hidden, ids, sizes, needs_mean=needs_grad)
    p, log_q, log_q_rest = log_p.exp(), soft.chosen - soft.lse[:, None], soft.others_lse - soft.lse
    losses, mass, p_rest = -_product(p, log_q).sum(1), p.sum(1), torch.zeros_like(soft.lse)
    if teacher.objective == "kl_with_tail":
        if ids.shape[1] < len(layer.weight):
            p_rest = (1 - mass).clamp_(min=0)
            # Where no other token is possible, what the teacher's sum lacks by rounding is no probability of others.
            rounding = 2 * torch.finfo(teacher.log_probs.dtype).eps * (1 + math.log(ids.shape[1]))
            p_rest[(p_rest <= rounding) & (log_q_rest == -math.inf)] = 0
        losses += torch.xlogy(p, p).sum(1) + torch.xlogy(p_rest, p_rest)
        losses -= _product(p_rest, log_q_rest)
        mass += p_rest
    if soft.others_mean is None:
        return losses, None
    grad = soft.others_mean.mul_((mass * log_q_rest.exp() - p_rest)[:, None])
    layer.add_gradient(grad, mass[:, None] * log_q.exp() - p, soft.chosen, ids, sizes)
    return losses, grad


def _product(p: Tensor, log_q: Tensor) -> Tensor:
    """p log q, which is 0 where p is 0, even for a q of 0."""
    return torch.where(p > 0, p * log_q, 0)


def _layer(
    hidden: Tensor, lm_head: Tensor, bias: Tensor | None, scale: float, softcap: float | None, temperature: float
) -> OutputLayer:
    bias = None if bias is None else bias.detach()
    return OutputLayer(lm_head.detach(), bias, scale, softcap, temperature, _product_dtype(hidden, lm_head))


def _product_dtype(hidden: Tensor, lm_head: Tensor) -> torch.dtype:
    """The dtype in which a matrix product runs: fp32 on CPUs whose matrix products are slower in a 16-bit dtype."""
    dtype, device = torch.promote_types(hidden.dtype, lm_head.dtype), hidden.device.type
    if dtype == torch.float32 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if device == "cpu" and dtype.itemsize == 2:
        name = "bf16" if dtype == torch.bfloat16 else "fp16"
        fast = torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")()
        return dtype if fast else torch.float32
    return dtype


def _without_autocast(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)


def _check_layer(
    hidden: Tensor, lm_head: Tensor, bias: Tensor | None, scale: float, softcap: float | None, temperature: float
) -> None:
    for name, x, shape in (("hidden", hidden, ("N", "E")), ("lm_head", lm_head, ("V", "E")), ("bias", bias, ("V",))):
        if name == "bias" and x is None:
            continue
        if not isinstance(x, Tensor):
            raise argument_error(name, "a tensor", type(x).__name__)
        check_dtype(name, x, *FLOATS)
        check_shape(name, x, *shape)
        check_device(name, x, "hidden", hidden.device)
        if name != "hidden" and x.requires_grad and torch.is_grad_enabled():
            raise argument_error(name, "a frozen tensor, because only hidden gets a gradient", "requires_grad=True")
    check_shape("lm_head", lm_head, "V", hidden.shape[1])
    if len(lm_head) == 0:
        raise argument_error("lm_head", "at least one token", "[0, E]")
    if bias is not None:
        check_shape("bias", bias, len(lm_head))
    numbers: dict[str, Any] = {"temperature": temperature, "scale": scale, "softcap": softcap}
    for name, number in numbers.items():
        if name == "softcap" and number is None:
            continue
        is_finite = isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
        if not is_finite or (name != "scale" and not number > 0):
            raise argument_error(name, "a finite number" + " above 0" * (name != "scale"), repr(number))


def _check_options(hidden: Tensor, weights: Tensor | None, reduction: str, objective: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise argument_error("reduction", "'mean', 'sum' or 'none'", repr(reduction))
    if objective not in ("cross_entropy", "kl_with_tail"):
        raise argument_error("objective", "'cross_entropy' or 'kl_with_tail'", repr(objective))
    if weights is not None:
        if not isinstance(weights, Tensor):
            raise argument_error("weights", "a tensor or None", type(weights).__name__)
        check_dtype("weights", weights, torch.bool, *FLOATS)
        check_shape("weights", weights, hidden.shape[0])
        check_device("weights", weights, "hidden", hidden.device)
        if weights.requires_grad and torch.is_grad_enabled():
            raise argument_error("weights", "a tensor without gradient", "requires_grad=True")


def _check_teacher(hidden: Tensor, lm_head: Tensor, ids: Tensor, log_probs: Tensor) -> None:
    for name, x in (("teacher_ids", ids), ("teacher_log_probs", log_probs)):
        if not isinstance(x, Tensor):
            raise argument_error(name, "a tensor", type(x).__name__)
    check_index_tensor("teacher_ids", ids, hidden.shape[0], "K")
    if not 1 <= ids.shape[1] <= len(lm_head):
        raise argument_error("teacher_ids", f"1 to {len(lm_head)} ids per row", f"{ids.shape[1]}")
    check_dtype("teacher_log_probs", log_probs, *FLOATS)
    check_shape("teacher_log_probs", log_probs, *ids.shape)
    check_device("teacher_ids", ids, "hidden", hidden.device)
    check_device("teacher_log_probs", log_probs, "hidden", hidden.device)
    if log_probs.requires_grad and torch.is_grad_enabled():
        raise argument_error("teacher_log_probs", "a tensor without gradient", "requires_grad=True")


def _check_values(lm_head: Tensor, ids: Tensor, log_probs: Tensor, weights: Tensor | None) -> None:
    """Check the values of a teacher, all in one question, because the host waits for each answer of a device."""
    ordered = ids.sort(1).values
    log_probs = log_probs.detach()
    faults = [
        ((ids < 0) | (ids >= len(lm_head))).any(),
        (ordered[:, 1:] == ordered[:, :-1]).any(),
        ~(log_probs <= _ROUNDING).all(),
        (log_probs.float().exp().sum(1) > 1 + _ROUNDING).any(),
        ~((weights >= 0) & (weights < math.inf)).all() if weights is not None else ids.new_tensor(False),
    ]
    expected = [
        ("teacher_ids", f"ids in [0, {len(lm_head)})", "others"),
        ("teacher_ids", "distinct ids in each row", "an id twice"),
        ("teacher_log_probs", "logarithms of probabilities", "values above 0 or NaN"),
        ("teacher_log_probs", "probabilities with a sum of at most 1 per row", "more"),
        ("weights", "finite weights of at least 0", "others"),
    ]
    for is_fault, texts in zip(torch.stack([fault.bool() for fault in faults]).tolist(), expected, strict=True):
        if is_fault:
            raise argument_error(*texts)
