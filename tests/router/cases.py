"""Token loads that expert-parallel transports must survive, and a small expert layer to run over them.

Legend: T tokens, D model width, K experts per token, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal
from zlib import crc32

import torch
from torch import Tensor

from moestro.router.placement import EMPTY, Placement
from moestro.router.reference import moe_layer
from moestro.router.transport import Transport

SEED = 20261120
WIDTH = 10


@dataclass(frozen=True, slots=True)
class Case:
    """``load`` says how many tokens each data-parallel rank has, ``routing`` where they go."""

    name: str
    num_experts: int
    k: int
    load: Literal["none", "one", "first_only", "last_only", "uneven", "many"]
    routing: Literal["random", "one_expert", "last_experts"] = "random"

    def tokens_per_rank(self, dp: int) -> list[int]:
        if self.load == "none":
            return [0] * dp
        if self.load == "one":
            return [1] * dp
        if self.load == "first_only":
            return [5] + [0] * (dp - 1)
        if self.load == "last_only":
            return [0] * (dp - 1) + [4]
        if self.load == "uneven":
            return [(3 * rank + 2) % 7 for rank in range(dp)]
        return [16 + rank for rank in range(dp)]


CASES = (
    Case("nobody has a token", 8, 2, "none"),
    Case("one token each", 8, 2, "one"),
    Case("first rank only", 8, 3, "first_only"),
    Case("last rank only", 7, 3, "last_only"),
    Case("uneven tokens, uneven experts", 7, 4, "uneven"),
    Case("many tokens", 8, 4, "many"),
    Case("all to one expert", 8, 1, "many", "one_expert"),
    Case("all to one expert, one token each", 6, 1, "one", "one_expert"),
    Case("only the last experts", 8, 2, "uneven", "last_experts"),
    Case("fewer experts than ranks", 2, 2, "uneven"),
    Case("one expert", 1, 1, "uneven"),
    Case("every expert for every token", 5, 5, "uneven"),
)


def make_tokens(case: Case, dp_rank: int, num_tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x_TD, topk_ids_TK, weights_TK of one data-parallel rank."""
    generator = torch.Generator().manual_seed(SEED + crc32(case.name.encode()) + dp_rank)
    x_TD = torch.randn(num_tokens, WIDTH, generator=generator).to(dtype)
    if case.routing == "one_expert":
        ids_TK = torch.full((num_tokens, 1), case.num_experts // 2)
    else:
        ids_TK = torch.rand(num_tokens, case.num_experts, generator=generator).topk(case.k, dim=1).indices
        if case.routing == "last_experts":
            ids_TK = torch.arange(case.num_experts - case.k, case.num_experts).expand(num_tokens, -1)
    return x_TD, ids_TK, torch.rand(num_tokens, case.k, generator=generator)


def expert_weights(num_experts: int, dtype: torch.dtype) -> Tensor:
    """[E, D, D], the same in every process."""
    generator = torch.Generator().manual_seed(SEED)
    return (torch.randn(num_experts, WIDTH, WIDTH, generator=generator) / WIDTH**0.5).to(dtype)


def replicated(num_experts: int, num_ranks: int, seed: int) -> Placement:
    """Experts in no order, up to two replicas more on each rank, empty slots between."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(num_experts, generator=generator).tolist()
    held = [order[rank::num_ranks] for rank in range(num_ranks)]
    for experts in held:
        others = sorted(set(range(num_experts)) - set(experts))
        extra = torch.randperm(len(others), generator=generator).tolist()
        experts += [others[index] for index in extra[: int(torch.randint(0, 3, (1,), generator=generator))]]
    capacity = max(len(experts) for experts in held) + 1
    slots = []
    for experts in held:
        padded = experts + [EMPTY] * (capacity - len(experts))
        slots.append(tuple(padded[index] for index in torch.randperm(capacity, generator=generator).tolist()))
    return Placement(num_experts, tuple(slots))


def any_slots(ids_TK: Tensor, placement: Placement, seed: int) -> Tensor:
    """slots_TK: any of the slots that hold each expert."""
    choices = placement.slots_of_expert
    draws_TK = torch.rand(ids_TK.shape, generator=torch.Generator().manual_seed(seed))
    picked = [
        [choices[e][int(draw * len(choices[e]))] for e, draw in zip(experts, draws, strict=True)]
        for experts, draws in zip(ids_TK.tolist(), draws_TK.tolist(), strict=True)
    ]
    return torch.tensor(picked, dtype=torch.int64).reshape(ids_TK.shape)


def run_rows(x_RD: Tensor, counts_L: Tensor, local_experts: tuple[int, ...], weights_EDD: Tensor) -> Tensor:
    """The experts, row by row, so that no row depends on its neighbours. What is padding becomes NaN."""
    experts = [e for e, n in zip(local_experts, counts_L.tolist(), strict=True) for _ in range(n)]
    y_RD = torch.full_like(x_RD, float("nan"))
    for r, expert in enumerate(experts):
        # A fresh copy of each row, since a BLAS may add in another order for another alignment.
        y_RD[r] = weights_EDD[expert] @ x_RD[r].clone()
    return y_RD


def expert_layer(
    transport: Transport[Any],
    local_experts: tuple[int, ...],
    num_tokens_N: tuple[int, ...],
    x_TD: Tensor,
    slots_TK: Tensor,
    w_TK: Tensor,
    weights_EDD: Tensor,
) -> Tensor:
    """dispatch, the experts, combine."""
    dispatched, handle = transport.dispatch(x_TD, slots_TK, num_tokens_N)()
    y_RD = run_rows(dispatched.x_RD, dispatched.counts_L, local_experts, weights_EDD)
    return transport.combine(y_RD, w_TK, handle)()


def reference(x_TD: Tensor, ids_TK: Tensor, w_TK: Tensor, weights_EDD: Tensor) -> Tensor:
    return moe_layer(x_TD, ids_TK, w_TK, [weight.float().mv for weight in weights_EDD])
