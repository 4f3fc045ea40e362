"""What the ranks of a group tell each other about their experts, every other second.

Legend: L mixture layers, R ranks, C slots of a rank, X numbers that a rank tells.

Between two observations a rank only adds to counters; an observation is one small collective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
import torch

from moestro.router.parallel import TensorParallel
from moestro.router.rebalance.messages import Observation
from moestro.router.stragglers import Work
from moestro.workers.lockstep import Lockstep
from moestro.workers.model.moe import ExpertBank

_NS = 1e9


@dataclass(slots=True)
class Counters:
    """One rank's account since it started, beside what its banks count. Nanoseconds and bytes."""

    tokens: int = 0
    step_ns: int = 0
    expert_ns: int = 0
    wait_ns: int = 0
    loaded_bytes: int = 0
    switch_ns: int = 0
    own_ns: int = 0
    kv_blocks: int = 0  # in use, summed over steps


class Observer:
    """Counts on one rank, and gathers what all have counted."""

    def __init__(self, banks: Sequence[ExpertBank], tp: TensorParallel, lockstep: Lockstep) -> None:
        self._banks = banks
        self._tp = tp
        self._waited_ns = self._wait_ns()
        self._lockstep = lockstep
        self._steps = 0  # since the last observation
        self.counters = Counters()
        self._told_X = self._totals()

    @property
    def has_counted(self) -> bool:
        """There were steps since the last observation. The same on every rank."""
        return self._steps > 0

    def stepped(self, seconds: float, num_tokens: int, kv_blocks: int) -> int:
        """Counts one step. Returns the nanoseconds of it that this rank waited for rows of others."""
        self._steps += 1
        counters = self.counters
        counters.tokens += num_tokens
        counters.step_ns += int(seconds * _NS)
        before = counters.wait_ns
        counters.wait_ns = int(sum(bank.wait_s for bank in self._banks) * _NS)
        waited_ns, self._waited_ns = self._waited_ns, self._wait_ns()
        counters.own_ns += max(0, int(seconds * _NS) - (self._waited_ns - waited_ns))
        counters.kv_blocks += kv_blocks
        return counters.wait_ns - before

    def observe(self, now_s: float) -> tuple[Observation, tuple[Work, ...]]:
        """What all ranks counted since the last call, for the rebalancer, and by rank for who looks for stragglers.
        Collective."""
        self.counters.expert_ns = int(sum(bank.compute_s for bank in self._banks) * _NS)
        totals_X = self._totals()
        all_RX = self._lockstep.gather(totals_X - self._told_X).numpy()
        self._told_X = totals_X
        num = len(astuple(self.counters))
        tokens_R, step_R, expert_R, wait_R, loaded_R, switch_R, own_R, kv_blocks_R = all_RX[:, :num].T
        rows_RLC = all_RX[:, num:].reshape(len(all_RX), len(self._banks), -1)
        steps, self._steps = self._steps, 0
        observation = Observation(
            now=now_s,
            steps=steps,
            rows_LRC=np.ascontiguousarray(rows_RLC.swapaxes(0, 1)),
            tokens_R=tokens_R,
            steps_s_R=step_R / _NS,
            experts_s_R=expert_R / _NS,
            waiting_s_R=wait_R / _NS,
            loaded_bytes_R=loaded_R,
            switch_s_R=switch_R / _NS,
        )
        works_RX = zip(tokens_R, rows_RLC.sum(axis=(1, 2)), kv_blocks_R, own_R, strict=True)
        return observation, tuple(
            Work(int(tokens), int(rows), int(blocks), float(own_ns) / _NS) for tokens, rows, blocks, own_ns in works_RX
        )

    def _wait_ns(self) -> int:
        """For any peer, since the start."""
        return int((sum(bank.wait_s for bank in self._banks) + self._tp.wait_s) * _NS)

    def _totals(self) -> torch.Tensor:
        rows_LC = torch.stack([bank.rows_L for bank in self._banks]).cpu()
        return torch.cat((torch.tensor(astuple(self.counters)), rows_LC.flatten()))
