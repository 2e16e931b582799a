# SPDX-License-Identifier: Apache-2.0
"""The contract of a backend: it turns a call into a plan, which runs it, and it prices a call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from ..arguments import AttentionArgs, AttentionGradients, Call

if TYPE_CHECKING:
    from torch import Tensor

    from .cost.model import Machine, Pass


class Refusal(NamedTuple):
    """Why a backend cannot run a call.

    Attributes:
        reasons: sentences that say what is missing and what to do about it.
        other_device: whether the backend is for another kind of device than the call's.
    """

    reasons: tuple[str, ...]
    other_device: bool = False


class Plan(ABC):
    """How a call runs: every decision that does not depend on the tensors' values or sizes.

    The forward's plan is also the backward's. It crosses the op boundary by its name, from which
    :func:`peftkern.backends.registry.plan_named` restores it, in another process too. A plan writes into outputs laid
    out by :func:`~peftkern.arguments.allocate_outputs` and :func:`~peftkern.arguments.allocate_gradients`.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The backend's name, followed by its choices: ``"cpu"``, ``"merge/flash/triton"``."""

    @property
    def kernels(self) -> str:
        """The kernels that were chosen, for messages. Empty if there was no choice."""
        return ""

    def bind(self, args: AttentionArgs) -> Plan:
        """This plan for calls like this one, for which it may prepare what their forwards share.

        They have tensors of the same sizes, strides, dtypes and devices, the same numbers, no dropout, and the same
        number of CPU threads. The backward's tensors may have other strides: hooks on saved tensors may copy them.
        ``args`` may be fake tensors; nothing is to be computed or kept of them.
        """
        return self

    @abstractmethod
    def prefix_attention(self, args: AttentionArgs) -> tuple[Tensor, Tensor]:
        """Compute (out [B, Hq, S, D], lse [B, Hq, S])."""

    @abstractmethod
    def prefix_attention_backward(
        self, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, args: AttentionArgs, needs: list[bool]
    ) -> AttentionGradients:
        """Compute the gradients whose flag in ``needs`` is set. ``dlse`` is None if lse is unused."""

    @abstractmethod
    def soft_prompt_embedding(
        self, input_ids: Tensor, weight: Tensor, prompt: Tensor, prompt_ids: Tensor | None
    ) -> Tensor:
        """Compute [B, P+S, E], contiguous, in the weight's dtype."""

    @abstractmethod
    def soft_prompt_embedding_backward(
        self,
        dout: Tensor,
        input_ids: Tensor,
        weight: Tensor,
        prompt: Tensor,
        prompt_ids: Tensor | None,
        needs: list[bool],
    ) -> tuple[Tensor, Tensor]:
        """Compute (dweight, dprompt): fp32 (fp64 for fp64 weights), contiguous, empty where ``needs`` is false."""


class PrefixKernels(ABC):
    """Kernels that add a prefix to another library's attention, and the attention of the same backend."""

    name: ClassVar[str]
    #: For messages.
    title: ClassVar[str]

    @property
    @abstractmethod
    def attention(self) -> Plan:
        """The whole attention of the same backend, for gradients that the other library's op does not return."""

    @abstractmethod
    def merge_prefix(
        self, args: AttentionArgs, part_out: Tensor | None, part_lse: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Merge the prefix and the sinks into attention over the sequence.

        Args:
            part_out: [B, Hq, S, D], out over the sequence's keys, or None if there are none. Unit stride along D.
            part_lse: [B, Hq, S], its natural log-sum-exp.

        Returns:
            (out, lse), in the memory of the parts if that has the layout of the op's outputs.
        """

    @abstractmethod
    def merge_prefix_backward(
        self,
        dout: Tensor,
        out: Tensor,
        lse: Tensor,
        args: AttentionArgs,
        part_dq: Tensor | None,
        gradients: AttentionGradients,
    ) -> None:
        """Write dq = ``part_dq`` + the prefix's share, dprefix_k and dprefix_v, except those without elements."""

    @abstractmethod
    def concat_prefix(self, args: AttentionArgs) -> tuple[Tensor, Tensor]:
        """Compute [prefix | k] and [prefix | v]: [B, Hkv, P + T, D], which lie in memory as [B, P + T, Hkv, D]."""

    @abstractmethod
    def sum_prefix_gradient(self, args: AttentionArgs, djoined: Tensor, total: Tensor) -> None:
        """Write to ``total``, shaped like a prefix, the sum over the batch of djoined [B, Hkv, P + T, D] before the
        sequence, in fp32 and in a fixed order.
        """


class Backend(ABC):
    """One way to compute the ops."""

    name: ClassVar[str]

    @abstractmethod
    def limits(self, call: Call) -> list[str]:
        """Reasons why no machine can run a call on this backend. Empty if some machine can."""

    @abstractmethod
    def plan(self, call: Call) -> Plan | Refusal:
        """The plan for a call on this machine, or the reasons why there is none, the limits among them."""

    @abstractmethod
    def restore(self, choices: tuple[str, ...]) -> Plan:
        """The plan with these choices, the parts of its name behind the backend's."""

    @abstractmethod
    def cost(self, call: Call, machine: Machine) -> list[Pass] | None:
        """The passes of a call over memory, backward included if ``call.needs_grad``; None if no rate is known."""
