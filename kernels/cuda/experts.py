"""Experts on CUDA.

Legend: T tokens, K experts per token, P = T * K pairs, R rows, D model width, I expert width, L slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from moestro.kernels.cuda.expert_weights import SILU, Activation, ExpertWeights, zero_weights
from moestro.kernels.cuda.mixture import down_kernel, gate_up_kernel, sum_kernel
from moestro.kernels.cuda.rows import Tiles, padded_slots, sort_pairs, tiles_of_sorted
from moestro.kernels.cuda.tiles import Kernel, Tile, bucket, choose_tile, tile_count
from moestro.kernels.grouped_experts import ExpertShape, Fill

MOST_COMPARED = 128
"""Pairs up to which programs find their rows by comparison; for more, sorting is the lesser work."""
_SUMMED_AT_ONCE = 1024  # columns


@dataclass(frozen=True, slots=True)
class CudaExperts:
    """``GroupedExperts`` in bf16 or e4m3; reference: ``experts_reference``. Unlike the plain ones, gate, up and their
    product are not rounded on the way to the hidden row.

    Nothing waits for the device, and every size follows from the shapes of the arguments, so that calls can be captured
    in a CUDA graph. ``apply`` and ``mix`` give a row the same bits.
    """

    shape: ExpertShape
    gate_up: ExpertWeights  # of all slots
    down: ExpertWeights
    activation: Activation = SILU

    @property
    def num_slots(self) -> int:
        return self.down.weight_OH.shape[0]

    def apply(self, x_RD: Tensor, counts_L: Tensor) -> Tensor:
        num_rows = x_RD.shape[0]
        if num_rows == 0 or self.num_slots == 0:
            return x_RD
        tiles = self.tiles(num_rows)
        rows = tiles_of_sorted(counts_L, num_rows, tiles[0].rows)
        return self._products(x_RD.contiguous(), num_rows, 1, tiles, rows)

    def mix(self, x_TD: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        if slots_TK.numel() == 0:
            return x_TD, torch.zeros(self.num_slots, dtype=torch.int64, device=x_TD.device)
        tiles = self.tiles(slots_TK.numel())
        mix = self.mix_compared if slots_TK.numel() <= MOST_COMPARED else self.mix_sorted
        return mix(x_TD.contiguous(), slots_TK.contiguous(), weights_TK.float().contiguous(), tiles)

    def mix_sorted(
        self, x_TD: Tensor, slots_TK: Tensor, weights_TK: Tensor, tiles: tuple[Tile, Tile]
    ) -> tuple[Tensor, Tensor]:
        """``mix`` for any number of contiguous rows, one at least: five launches."""
        (num_tokens, model_width), top_k = x_TD.shape, slots_TK.shape[1]
        rows, counts_L = sort_pairs(slots_TK, self.num_slots, tiles[0].rows)
        y_PD = self._products(x_TD, num_tokens * top_k, top_k, tiles, rows)
        out_TD = torch.empty_like(x_TD)
        sum_kernel[(num_tokens * tile_count(model_width, _SUMMED_AT_ONCE),)](
            y_PD, weights_TK, out_TD, K=top_k, D=model_width, BLOCK_O=_SUMMED_AT_ONCE, enable_fp_fusion=False
        )
        return out_TD, counts_L

    def mix_compared(
        self, x_TD: Tensor, slots_TK: Tensor, weights_TK: Tensor, tiles: tuple[Tile, Tile]
    ) -> tuple[Tensor, Tensor]:
        """``mix`` for few contiguous rows, one at least: two launches. The work of finding rows grows with the square
        of the pairs."""
        (num_tokens, model_width), top_k = x_TD.shape, slots_TK.shape[1]
        num_pairs, num_slots, width = slots_TK.numel(), self.num_slots, self.shape.width
        pairs = max(16, triton.next_power_of_2(num_pairs))
        num_sums = num_tokens * tile_count(model_width, tiles[1].out)
        counts_L = torch.empty(num_slots, dtype=torch.int64, device=x_TD.device)
        arrived = torch.empty(num_sums, dtype=torch.int32, device=x_TD.device)
        hidden_PI = x_TD.new_empty(num_pairs, width)
        y_PD = x_TD.new_empty(num_pairs, model_width)
        out_TD = torch.empty_like(x_TD)
        gate_up_kernel[(num_pairs * tile_count(width, tiles[0].out // 2),)](
            self.gate_up.weight_OH,
            self.gate_up.scale_oh,
            self.gate_up.bias_O,
            x_TD,
            hidden_PI,
            slots_TK,
            counts_L,
            arrived,
            None,
            None,
            num_pairs,
            0,
            num_slots,
            num_sums,
            PAIRS=pairs,
            SLOTS=padded_slots(num_slots),
            **self._gate_up_constants(top_k, tiles[0]),
        )
        down_kernel[(num_pairs * tile_count(model_width, tiles[1].out),)](
            self.down.weight_OH,
            self.down.scale_oh,
            self.down.bias_O,
            hidden_PI,
            y_PD,
            weights_TK,
            out_TD,
            arrived,
            slots_TK,
            None,
            None,
            num_pairs,
            0,
            PAIRS=pairs,
            **self._constants(top_k, tiles[1]),
        )
        return out_TD, counts_L

    def stage(self, fill: Fill) -> tuple[ExpertWeights, ExpertWeights]:
        staged = self.gate_up.empty_one(), self.down.empty_one()
        fill_one(self.shape, fill, *staged)
        return staged

    def replace_(self, slot: int, staged: tuple[ExpertWeights, ExpertWeights]) -> None:
        self.gate_up[slot].copy_(staged[0])
        self.down[slot].copy_(staged[1])

    def with_slots(self, sources: Sequence[int | None]) -> CudaExperts:
        """In new memory: graphs that were captured over the old must be captured again."""
        return replace(self, gate_up=self.gate_up.with_slots(sources), down=self.down.with_slots(sources))

    def tiles(self, num_rows: int) -> tuple[Tile, Tile]:
        """For gate-up and down, which share their tiles' rows."""
        width, model_width = self.shape.width, self.shape.model_width
        rows = bucket(tile_count(2 * num_rows, self.num_slots))
        fp8 = self.down.scale_oh is not None
        kernels: tuple[Kernel, Kernel] = ("gate_up_fp8", "down_fp8") if fp8 else ("gate_up", "down")
        gate_up = choose_tile(kernels[0], 2 * width, model_width, rows)
        return gate_up, replace(choose_tile(kernels[1], model_width, width, rows), rows=gate_up.rows)

    def _products(self, x_TD: Tensor, num_pairs: int, top_k: int, tiles: tuple[Tile, Tile], rows: Tiles) -> Tensor:
        """y_PD of rows that a table lists; pair p is of ``x_TD[p // top_k]``."""
        width, model_width = self.shape.width, self.shape.model_width
        hidden_PI = x_TD.new_empty(num_pairs, width)
        y_PD = x_TD.new_empty(num_pairs, model_width)
        gate_up_kernel[(rows.most * tile_count(width, tiles[0].out // 2),)](
            self.gate_up.weight_OH,
            self.gate_up.scale_oh,
            self.gate_up.bias_O,
            x_TD,
            hidden_PI,
            None,
            None,
            None,
            rows.table_3B,
            rows.order_P,
            num_pairs,
            rows.most,
            0,
            0,
            PAIRS=0,
            SLOTS=0,
            **self._gate_up_constants(top_k, tiles[0]),
        )
        down_kernel[(rows.most * tile_count(model_width, tiles[1].out),)](
            self.down.weight_OH,
            self.down.scale_oh,
            self.down.bias_O,
            hidden_PI,
            y_PD,
            None,
            None,
            None,
            None,
            rows.table_3B,
            rows.order_P,
            num_pairs,
            rows.most,
            PAIRS=0,
            **self._constants(top_k, tiles[1]),
        )
        return y_PD

    def _constants(self, top_k: int, tile: Tile) -> dict[str, int | bool]:
        return {
            "K": top_k,
            "I": self.shape.width,
            "D": self.shape.model_width,
            "BLOCK_O": tile.out,
            "BLOCK_N": tile.rows,
            "BLOCK_K": tile.features,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
            "enable_fp_fusion": False,
        }

    def _gate_up_constants(self, top_k: int, tile: Tile) -> dict[str, int | float | bool]:
        act = self.activation
        return {**self._constants(top_k, tile), "ALPHA": act.alpha, "LIMIT": act.limit, "UP_SHIFT": act.up_shift}


def make_cuda_experts(
    shape: ExpertShape,
    fills: Sequence[Fill | None],
    *,
    fp8: bool = False,
    bias: bool = False,
    activation: Activation = SILU,
) -> CudaExperts:
    """One slot per entry of ``fills``; None leaves it empty. Biases begin as zeros."""
    num, width, model_width = len(fills), shape.width, shape.model_width
    gate_up = zero_weights(num, 2 * width, model_width, shape.device, fp8=fp8, bias=bias)
    down = zero_weights(num, model_width, width, shape.device, fp8=fp8, bias=bias)
    for slot, fill in enumerate(fills):
        if fill is not None:
            fill_one(shape, fill, gate_up[slot], down[slot])
    return CudaExperts(shape, gate_up, down, activation)


def fill_one(shape: ExpertShape, fill: Fill, gate_up: ExpertWeights, down: ExpertWeights) -> None:
    """bf16 goes straight to its place."""
    if gate_up.scale_oh is None:
        fill(gate_up.weight_OH, down.weight_OH)
        return
    gate_up_2ID, down_DI = shape.empty()
    fill(gate_up_2ID, down_DI)
    gate_up.fill_(gate_up_2ID)
    down.fill_(down_DI)
