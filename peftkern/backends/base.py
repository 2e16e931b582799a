# SPDX-License-Identifier: Apache-2.0
"""The contract of a backend: it turns a call into plans, each of which runs it, and it prices them."""

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

    #: Whether it takes sequences with several prefixes, or with prefixes in k and v. For other plans, the prefixes
    #: are gathered first (:mod:`.gather`), except for a :class:`RowPlan`.
    reads_chains: ClassVar[bool] = False

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
        """Compute (out [B, Hq, S, D_v], lse [B, Hq, S])."""

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


class RowPlan(Plan):
    """A plan that reads each token of a prefix where it lies, in ``prefix_k`` or in k, so that nothing is gathered.

    In ``args`` of these methods, ``prefix_ids`` [n] and ``prefix_lens`` [C] speak of C prefixes. ``rows`` int64
    [C, P, 2] on the CPU says where their tokens lie: (entry of the bank, row), with entry -1 for a row of k and v.
    What it says behind the end of a prefix has no meaning.
    """

    @abstractmethod
    def attention_of_rows(self, args: AttentionArgs, rows: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`Plan.prefix_attention`."""

    @abstractmethod
    def attention_of_rows_backward(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        out: Tensor,
        lse: Tensor,
        args: AttentionArgs,
        needs: list[bool],
        rows: Tensor,
    ) -> AttentionGradients:
        """:meth:`Plan.prefix_attention_backward`.

        dprefix_k is [C, Hkv, P, D] and dprefix_v [C, Hkv, P, D_v], one for each prefix. dk and dv do not contain
        them.
        """


class MergeKernels(ABC):
    """Kernels that merge a prefix into another library's attention, and the attention of the same backend."""

    @property
    @abstractmethod
    def name(self) -> str:
        """A part of a plan's name."""

    @property
    @abstractmethod
    def title(self) -> str:
        """For messages."""

    @property
    @abstractmethod
    def attention(self) -> Plan:
        """The whole attention of the same backend, for gradients that the other library's op does not return."""

    @abstractmethod
    def merge_costs(self, call: Call) -> tuple[Pass, Pass]:
        """The passes of :meth:`merge_prefix` and :meth:`merge_prefix_backward`."""

    @abstractmethod
    def merge_prefix(
        self, args: AttentionArgs, part_out: Tensor | None, part_lse: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Merge the prefix and the sinks into attention over the sequence.

        Args:
            part_out: [B, Hq, S, D_v], out over the sequence's keys, or None if there are none. Unit stride along D_v.
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


class PrefixKernels(MergeKernels):
    """Kernels that also concatenate a prefix and the keys of another library's attention."""

    @abstractmethod
    def concat_prefix(self, args: AttentionArgs) -> tuple[Tensor, Tensor]:
        """Compute [prefix | k] and [prefix | v] in k's dtype.

        [B, Hkv, P + T, D], in memory [B, P + T, Hkv, D], with D_v for the values.
        """

    @abstractmethod
    def sum_prefix_gradient(self, args: AttentionArgs, djoined: Tensor, total: Tensor) -> None:
        """Write to ``total``, shaped like a prefix, the sum of its rows in ``djoined`` over the samples.

        The sum is in fp32 and in a fixed order. ``djoined`` has the shape that :meth:`concat_prefix` returns.
        """


class JoiningKernels(PrefixKernels):
    """Kernels that also concatenate packed sequences, split gradients and merge two results."""

    @abstractmethod
    def concat_prefix(self, args: AttentionArgs, cu_keys: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compute [prefix | k] and [prefix | v] in k's dtype.

        Args:
            cu_keys: int32 [n + 1] on the device, for n packed sequences: the keys of sequence i, its prefix tokens
                first, are rows cu_keys[i] to cu_keys[i + 1] - 1 of the result.

        Returns:
            [B, Hkv, P + T, D], which lie in memory as [B, P + T, Hkv, D]. With ``cu_keys``, [1, Hkv, T + n * P, D];
            rows from cu_keys[n] on are uninitialised. The values have D_v.
        """

    @abstractmethod
    def sum_prefix_gradient(
        self, args: AttentionArgs, djoined: Tensor, total: Tensor, cu_keys: Tensor | None = None
    ) -> None:
        """Write to ``total``, shaped like a prefix, the sum of its rows in ``djoined`` over samples or sequences.

        The sum is in fp32 and in a fixed order. ``djoined`` has the shape that :meth:`concat_prefix` returns.
        """

    @abstractmethod
    def split_gradient(
        self,
        args: AttentionArgs,
        djoined_k: Tensor,
        djoined_v: Tensor,
        cu_keys: Tensor | None,
        dk: Tensor,
        dv: Tensor,
    ) -> None:
        """Write to dk and dv, except those without elements, the gradients' rows behind the prefixes.

        ``djoined_k`` and ``djoined_v`` are shaped like the result of :meth:`concat_prefix`. All have unit stride
        along D.
        """

    @abstractmethod
    def merge_states(self, out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
        """Merge attention over further keys into ``out`` and ``lse``, in place.

        Args:
            out: [B, Hq, S, D_v], with unit stride along D_v.
            lse: [B, Hq, S] fp32, the natural log-sum-exp of each row; -inf or inf where a row sees no key, and there
                out may be anything. Where both parts see no key, out becomes 0 and lse -inf.
            part_out: like ``out``, over keys that ``out`` does not cover.
            part_lse: like ``lse``.
        """


def first_row_with_prefix(args: AttentionArgs) -> int | None:
    """The row from which on all rows see the whole of one prefix, and before which merging changes none; else None.

    A row without a prefix changes if it sees a sink, or if a mask may hide all of its keys: torch's kernel leaves its
    out undefined then. A window over the prefix counts from the start of each sequence.
    """
    windowed = args.window is not None and args.prefix_in_window
    if windowed and args.cu_seqlens is not None:
        return None
    if args.prefix_ids is None:
        return 0
    changing = args.sinks, args.key_mask, args.bias
    if windowed or args.prefix_lens is not None or any(x is not None for x in changing):
        return None
    return args.prefix_start


class Backend(ABC):
    """One way to compute the ops."""

    name: ClassVar[str]

    @abstractmethod
    def limits(self, call: Call) -> list[str]:
        """Reasons why no machine can run a call on this backend. Empty if some machine can."""

    @abstractmethod
    def plans(self, call: Call) -> dict[str, Plan | Refusal]:
        """The plans for a call on this machine by their names, those that are preferred at equal cost first.

        A plan that cannot run the call is replaced by the reasons, the limits among them.
        """

    @abstractmethod
    def restore(self, choices: tuple[str, ...]) -> Plan:
        """The plan with these choices, the parts of its name behind the backend's."""

    @abstractmethod
    def costs(self, call: Call, machine: Machine) -> dict[str, list[Pass]]:
        """The passes over memory of each plan by its name, backward included if ``call.needs_grad``.

        Plans whose passes are unknown are absent.
        """


class OnePlanBackend(Backend):
    """A backend with one plan, which bears its name."""

    @abstractmethod
    def plan(self, call: Call) -> Plan | Refusal:
        """The plan for a call on this machine, or the reasons why there is none."""

    def plans(self, call: Call) -> dict[str, Plan | Refusal]:
        return {self.name: self.plan(call)}

    @abstractmethod
    def cost(self, call: Call, machine: Machine) -> list[Pass] | None:
        """The passes of the plan; None if they are unknown."""

    def costs(self, call: Call, machine: Machine) -> dict[str, list[Pass]]:
        passes = self.cost(call, machine)
        return {} if passes is None else {self.name: passes}
