"""SwiGLU experts of one layer in panels, computed by ``experts.cpp``: sorting, both products and the sum in one call.

Legend: T tokens, K experts per token, R rows, D model width, I expert width, L slots, X slots that there is room for, P
elements of a packed expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType

from torch import Tensor

from moestro.kernels.cpu.build import load
from moestro.kernels.grouped_experts import ExpertShape, Fill


@dataclass(frozen=True, slots=True)
class CpuExperts:
    """``GroupedExperts`` in bf16. ``silu(gate) * up`` is taken in fp32 and rounded once."""

    kernels: ModuleType
    shape: ExpertShape
    packed_LP: Tensor
    room_XP: Tensor  # begins with packed_LP

    def apply(self, x_RD: Tensor, counts_L: Tensor) -> Tensor:
        y_RD: Tensor = self.kernels.apply_experts(self.packed_LP, self.shape.width, x_RD, counts_L)
        return y_RD

    def mix(self, x_TD: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        mixed: tuple[Tensor, Tensor] = self.kernels.mix_experts(
            self.packed_LP, self.shape.width, x_TD, slots_TK, weights_TK
        )
        return mixed

    def stage(self, fill: Fill) -> Tensor:
        packed_P = self.packed_LP.new_empty(self.packed_LP.shape[1])
        self._pack(fill, self.shape.empty(), packed_P)
        return packed_P

    def replace_(self, slot: int, staged: Tensor) -> None:
        self.packed_LP[slot].copy_(staged)

    def with_slots(self, sources: Sequence[int | None]) -> CpuExperts:
        """In the same memory. Slots that are given up keep their pages, for the next time they are wanted."""
        if len(sources) > len(self.room_XP):
            raise ValueError(f"{len(sources)} slots, but there is room for {len(self.room_XP)}")
        moved = {
            slot: self.packed_LP[source].clone()
            for slot, source in enumerate(sources)
            if source is not None and source != slot
        }
        for slot, packed_P in moved.items():
            self.room_XP[slot].copy_(packed_P)
        return replace(self, packed_LP=self.room_XP[: len(sources)])

    def _pack(self, fill: Fill, passing: tuple[Tensor, Tensor], packed_P: Tensor) -> None:
        fill(*passing)
        self.kernels.pack_expert(*passing, packed_P)


def make_cpu_experts(shape: ExpertShape, fills: Sequence[Fill | None], room: int = 0) -> CpuExperts:
    """One slot per entry of ``fills``; None leaves it empty, and its pages untouched, as are those of the slots up to
    ``room``. Weights pass through the same two tensors one expert after the other.

    Raises ``BuildError`` where the kernels cannot be built.
    """
    kernels = load()
    room_XP = kernels.allocate_experts(max(room, len(fills)), shape.width, shape.model_width)
    experts = CpuExperts(kernels, shape, room_XP[: len(fills)], room_XP)
    passing = shape.empty()
    for packed_P, fill in zip(experts.packed_LP, fills, strict=True):
        if fill is not None:
            experts._pack(fill, passing, packed_P)
    return experts
