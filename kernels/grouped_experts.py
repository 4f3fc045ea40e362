"""SwiGLU experts over rows that are sorted by expert.

Legend: T tokens, K experts per token, R rows, D model width, I expert width, L slots for experts; ``counts_L[i]`` rows
belong to the expert in slot i, in order. Rows beyond the sum of the counts are padding, whose results nobody reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moestro.kernels.activations import swiglu
from moestro.kernels.linear import Linear, can_pack, empty_weight, make_linear
from moestro.kernels.weighted_sum import weighted_sum

Fill = Callable[[Tensor, Tensor], None]
"""Writes one expert's weights into the gate_up_2ID and down_DI it is given."""


class GroupedExperts(Protocol):
    """y_RD[r] = down(silu(gate(x)) * up(x)) with the weights of row r's expert.

    An expert is put in a slot in two steps: ``stage`` may take its time, on any thread, beside ``apply``; ``replace_``
    is quick and belongs between two calls of ``apply``.
    """

    @property
    def shape(self) -> ExpertShape: ...

    def apply(self, x_RD: Tensor, counts_L: Tensor) -> Tensor: ...

    def mix(self, x_TD: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Where every slot is here: y_TD, the weighted sum over each token's K slots, and counts_L (int64), the rows
        that each slot computed. The bits are those of ``mix_sorted``: rows are rounded to the dtype of x, then weighed
        and summed in fp32 in the order of K."""

    def stage(self, fill: Fill) -> Any:
        """An expert's weights on this device, as ``replace_`` takes them."""

    def replace_(self, slot: int, staged: Any) -> None:
        """Puts a staged expert into a slot; what was there is gone."""

    def with_slots(self, sources: Sequence[int | None]) -> GroupedExperts:
        """As many slots as ``sources`` has: slot i holds what slot ``sources[i]`` of these holds, None leaves it empty.
        These are not to be used any more: the memory may be the same. Raises ValueError for more than there is room."""


@dataclass(frozen=True, slots=True)
class Expert:
    """One expert's two products."""

    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """What the weights of every expert look like."""

    width: int
    model_width: int
    dtype: torch.dtype
    device: torch.device

    @property
    def num_bytes(self) -> int:
        """Of one expert's weights."""
        return 3 * self.width * self.model_width * self.dtype.itemsize

    def empty(self) -> tuple[Tensor, Tensor]:
        """Unfilled gate_up_2ID and down_DI."""
        return (
            empty_weight(2 * self.width, self.model_width, self.dtype, self.device),
            empty_weight(self.model_width, self.width, self.dtype, self.device),
        )


@dataclass(frozen=True, slots=True)
class LoopedExperts:
    """One product per expert that has rows. Reads ``counts_L`` on the host: for CPU, and for CUDA where
    ``can_stack`` says no."""

    shape: ExpertShape
    expert_L: list[Expert | None]  # None: an empty slot, which has no rows

    def apply(self, x_RD: Tensor, counts_L: Tensor) -> Tensor:
        counts = counts_L.tolist()
        used = [(expert, count) for expert, count in zip(self.expert_L, counts, strict=True) if expert and count]
        if not used:
            return x_RD
        sizes = [count for _, count in used]
        *pieces, padding = torch.split_with_sizes(x_RD, [*sizes, x_RD.shape[0] - sum(sizes)])
        hidden_R2I = torch.cat([expert.gate_up.apply(x) for (expert, _), x in zip(used, pieces, strict=True)])
        hidden = torch.split_with_sizes(swiglu(hidden_R2I), sizes)
        return torch.cat([*(expert.down.apply(x) for (expert, _), x in zip(used, hidden, strict=True)), padding])

    def mix(self, x_TD: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        return mix_sorted(self, len(self.expert_L), x_TD, slots_TK, weights_TK)

    def stage(self, fill: Fill) -> Expert:
        gate_up_2ID, down_DI = self.shape.empty()
        fill(gate_up_2ID, down_DI)
        return Expert(make_linear(gate_up_2ID), make_linear(down_DI))

    def replace_(self, slot: int, staged: Expert) -> None:
        self.expert_L[slot] = staged

    def with_slots(self, sources: Sequence[int | None]) -> LoopedExperts:
        return LoopedExperts(self.shape, [None if source is None else self.expert_L[source] for source in sources])


@dataclass(frozen=True, slots=True)
class StackedExperts:
    """All experts in one grouped product (``torch._grouped_mm``): bf16 on CUDA, no synchronisation with the host."""

    shape: ExpertShape
    gate_up_L2ID: Tensor
    down_LDI: Tensor

    def apply(self, x_RD: Tensor, counts_L: Tensor) -> Tensor:
        if x_RD.shape[0] == 0:
            return x_RD
        ends_L = counts_L.cumsum(0).to(torch.int32)
        hidden_R2I = torch._grouped_mm(x_RD, self.gate_up_L2ID.transpose(1, 2), offs=ends_L)
        return torch._grouped_mm(swiglu(hidden_R2I), self.down_LDI.transpose(1, 2), offs=ends_L)

    def mix(self, x_TD: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        return mix_sorted(self, len(self.down_LDI), x_TD, slots_TK, weights_TK)

    def stage(self, fill: Fill) -> tuple[Tensor, Tensor]:
        staged = self.shape.empty()
        fill(*staged)
        return staged

    def replace_(self, slot: int, staged: tuple[Tensor, Tensor]) -> None:
        self.gate_up_L2ID[slot].copy_(staged[0])
        self.down_LDI[slot].copy_(staged[1])

    def with_slots(self, sources: Sequence[int | None]) -> StackedExperts:
        return StackedExperts(self.shape, take_slots(self.gate_up_L2ID, sources), take_slots(self.down_LDI, sources))


def take_slots(weights_LX: Tensor, sources: Sequence[int | None]) -> Tensor:
    """A copy with one slot for each source, zeros where it is None."""
    taken_LX = weights_LX.new_zeros(len(sources), *weights_LX.shape[1:])
    for slot, source in enumerate(sources):
        if source is not None:
            taken_LX[slot].copy_(weights_LX[source])
    return taken_LX


def sort_by_slot(x_TD: Tensor, slots_TK: Tensor, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """A row for every (token, slot) pair, sorted by slot and among equals by token: x_RD, counts_L, and position_TK,
    where each pair's row went."""
    num_tokens, k = slots_TK.shape
    slots_R = slots_TK.reshape(-1)
    order_R = torch.argsort(slots_R, stable=True)
    # Not bincount, which on an accelerator waits to learn how long its result is.
    counts_L = torch.zeros(num_slots, dtype=torch.int64, device=slots_R.device)
    counts_L.scatter_add_(0, slots_R, torch.ones_like(slots_R))
    position_R = torch.empty_like(order_R)
    position_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    return x_TD[order_R // k], counts_L, position_R.view(num_tokens, k)


def mix_sorted(
    experts: GroupedExperts, num_slots: int, x_TD: Tensor, slots_TK: Tensor, weights_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """``GroupedExperts.mix`` in terms of ``apply``: its definition."""
    x_RD, counts_L, position_TK = sort_by_slot(x_TD, slots_TK, num_slots)
    return weighted_sum(experts.apply(x_RD, counts_L)[position_TK], weights_TK), counts_L


def can_stack(width: int, model_width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether one grouped product can serve experts of this shape: bf16 on CUDA, every row a multiple of 16 bytes
    (what the tensor memory accelerator of ``torch._grouped_mm``'s kernels can address)."""
    return device.type == "cuda" and dtype == torch.bfloat16 and width % 8 == 0 and model_width % 8 == 0


def make_experts(shape: ExpertShape, fills: Sequence[Fill | None]) -> GroupedExperts:
    """One slot per entry of ``fills``; None leaves it empty.

    Where weights are repacked, they pass through the same two tensors one expert after the other.
    """
    if can_stack(shape.width, shape.model_width, shape.dtype, shape.device):
        num = len(fills)
        gate_up_L2ID = torch.zeros(num, 2 * shape.width, shape.model_width, dtype=shape.dtype, device=shape.device)
        down_LDI = torch.zeros(num, shape.model_width, shape.width, dtype=shape.dtype, device=shape.device)
        for slot, fill in enumerate(fills):
            if fill is not None:
                fill(gate_up_L2ID[slot], down_LDI[slot])
        return StackedExperts(shape, gate_up_L2ID, down_LDI)
    passing = shape.empty() if can_pack(shape.device, shape.dtype) else None

    def make(fill: Fill) -> Expert:
        gate_up_2ID, down_DI = passing or shape.empty()
        fill(gate_up_2ID, down_DI)
        return Expert(make_linear(gate_up_2ID), make_linear(down_DI))

    return LoopedExperts(shape, [None if fill is None else make(fill) for fill in fills])


def experts_reference(x_RD: Tensor, counts_L: Tensor, gate_up_L2ID: Tensor, down_LDI: Tensor) -> Tensor:
    """The definition, row by row, in fp64."""
    expert_R = torch.repeat_interleave(torch.arange(len(counts_L), device=counts_L.device), counts_L)
    rows = []
    for x_D, e in zip(x_RD.double(), expert_R.tolist(), strict=True):
        gate_I, up_I = (gate_up_L2ID[e].double() @ x_D).chunk(2)
        rows.append(down_LDI[e].double() @ (gate_I / (1 + torch.exp(-gate_I)) * up_I))
    return torch.stack(rows).to(x_RD.dtype) if rows else x_RD
