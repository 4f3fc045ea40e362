"""What one rank process of ``test_regroup`` does: go from group to group with one model, and go on with its answer in
each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from typing import Any

import torch
from tests.model.oracle import Driver
from torch import Tensor

from moestro.router.expert_parallel import over_group
from moestro.router.mesh import StoreAddress, join
from moestro.router.parallel import GroupShape, TensorParallelSeat
from moestro.router.placement import spread
from moestro.workers.batch import Batch
from moestro.workers.checkpoint import open_checkpoint
from moestro.workers.loading import load_share, open_source
from moestro.workers.regroup import regroup

MOST_SLOTS = 1000  # more than there are experts


@dataclass
class GroupDriver(Driver):
    """Every rank of the group computes as many tokens as this one."""

    num_ranks: int = 1

    def batch(self, spans: Any) -> Batch:
        batch = super().batch(spans)
        return replace(batch, num_tokens_N=batch.num_tokens_N * self.num_ranks)


def digest(logits_TV: Tensor) -> str:
    return sha256(logits_TV.float().numpy().tobytes()).hexdigest()[:16]


def steps(driver: Driver, ids: list[int], num_steps: int) -> tuple[list[int], list[str]]:
    """Computes ``ids`` and then, greedily, what follows: the tokens drawn and a digest of every step's logits."""
    tokens, digests = list(ids), []
    for _ in range(num_steps):
        (logits_TV,) = driver.step([(0, tokens)])
        digests.append(digest(logits_TV))
        tokens = [int(logits_TV[-1].argmax())]
        ids = [*ids, *tokens]
    return ids, digests


def through_groups(
    rank: int,
    world_size: int,
    address: StoreAddress,
    model: str,
    groups: list[list[int]],
    tp: int,
    prompt: list[int],
    num_steps: int,
) -> list[dict[str, Any]]:
    """By group this process is in: what ``steps`` says, how many experts were read and what is held."""
    torch.set_num_threads(1)
    checkpoint = open_checkpoint(model)
    config = checkpoint.config
    seat = TensorParallelSeat(rank % tp, tp)
    whole = spread(config.num_experts, world_size)
    decoder = load_share(checkpoint, [whole.slots[rank]] * config.num_moe_layers, tp=seat)
    source = partial(open_source, checkpoint, config.dtype, torch.device("cpu"))
    driver = GroupDriver(decoder, num_blocks=64)
    ids = prompt
    told: list[dict[str, Any]] = []
    for epoch, group in enumerate(groups):
        if rank not in group:
            continue
        shape = GroupShape(len(group) // tp, tp)
        with join(shape, group.index(rank), address.connect(30.0), epoch=epoch, timeout_s=30.0) as mesh:
            seat.join(mesh.tp)
            done = regroup(driver.decoder, mesh.control, partial(over_group, mesh), source, most_slots=MOST_SLOTS)
            driver.decoder, driver.num_ranks = done.model, shape.world_size
            all_ids, digests = steps(driver, ids, num_steps)
            ids = all_ids[-1:]
            held = [list(bank.held) for bank in done.model.banks.values()]
            told.append({"digests": digests, "loaded": done.loaded, "held": held})
    return told
