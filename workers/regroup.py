"""A loaded model goes over to a new group: after a rank was lost or has come, and at the start.

Nobody is asked who should have what: each rank says what it really holds, also when the group broke in the middle of a
change of placement, and all compute from it where the experts go (``router/rehome.py``). What is missing is read from
the checkpoint, each rank for itself, at full speed: until it is there no answer can be computed.

Legend: N ranks, L mixture layers, S slots of a rank before, E experts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moestro.router.collectives import Collectives
from moestro.router.expert_parallel import ExpertParallel
from moestro.router.placement import EMPTY, Placement
from moestro.router.rehome import rehome
from moestro.workers.memory_plan import capacity_of
from moestro.workers.model.decoder import Decoder
from moestro.workers.model.moe import ExpertBank
from moestro.workers.rebalancing.loader import OpenSource


class Superseded(Exception):
    """The group is over before it began."""


@dataclass(frozen=True, slots=True)
class Regrouped:
    """A model that computes over the new group; what it was made from is not to be used any more."""

    model: Decoder
    most_slots: int  # experts of a layer for which every rank of the group has memory
    loaded: int  # experts that this rank read, over all layers


def regroup(
    model: Decoder,
    control: Collectives,
    over: Callable[[tuple[Placement, ...]], ExpertParallel],
    open_source: OpenSource,
    *,
    most_slots: int,
    redundant: int = 0,
    loads_LE: Sequence[Sequence[int]] | None = None,
    superseded: threading.Event | None = None,
) -> Regrouped:
    """Collective over ``control``, which has every rank of the new group and small host tensors.

    ``over`` spreads experts over the group as placements say; ``most_slots`` are the experts of a layer that this rank
    has memory for, ``redundant`` the slots that the group is to have beyond one for each expert, ``loads_LE`` what each
    expert has computed lately, where this rank knows. A seat's tensor-parallel collectives are for the caller to join.

    Raises ExpertsDoNotFit, on all ranks alike and before anything is changed, when the experts do not fit. Raises
    CheckpointError when this rank cannot read what it must: its peers then see it leave. Raises Superseded soon after
    the event is set. Whatever is raised, every bank still says what it holds, and another call goes on from there."""
    banks = tuple(model.banks.values())
    if not banks:
        return Regrouped(model.over(over(())), most_slots, 0)
    num_experts = model.config.num_experts
    held_LNS, loads, most_slots = _exchange(control, banks, num_experts, most_slots, loads_LE)
    capacity = capacity_of(num_experts, redundant, control.size, most_slots)
    placements = tuple(
        rehome(held_NS, num_experts, capacity, load_E) for held_NS, load_E in zip(held_LNS, loads, strict=True)
    )
    loaded = 0
    with open_source() as source:
        for bank, placement in zip(banks, placements, strict=True):
            wanted = placement.slots[control.rank]
            _keep_(bank, wanted)
            for slot, expert in enumerate(wanted):
                if superseded is not None and superseded.is_set():
                    raise Superseded
                if expert != bank.held[slot]:
                    bank.load_(slot, expert, source)
                    loaded += 1
    return Regrouped(model.over(over(placements)), most_slots, loaded)


def _exchange(
    control: Collectives,
    banks: Sequence[ExpertBank],
    num_experts: int,
    most_slots: int,
    loads_LE: Sequence[Sequence[int]] | None,
) -> tuple[list[list[list[int]]], list[list[int]], int]:
    """held_LNS, loads_LE, and the slots for which all ranks have memory: the same on every rank."""
    widest = max(len(bank.held) for bank in banks)
    most_slots_N, widest_N = control.all_gather(torch.tensor([most_slots, widest])).T.tolist()
    held_LS = torch.full((len(banks), max(widest_N)), EMPTY)
    for layer, bank in enumerate(banks):
        held_LS[layer, : len(bank.held)] = torch.tensor(bank.held, dtype=torch.int64)
    known_LE: Tensor = torch.zeros(len(banks), num_experts, dtype=torch.int64)
    if loads_LE is not None:
        known_LE += torch.tensor(loads_LE)
    # Who was in a group together knows the same loads, who has just come knows none: what is added up is in proportion.
    all_NLX = control.all_gather(torch.cat((held_LS, known_LE), dim=1))
    held_NLS, loads_NLE = all_NLX[:, :, : max(widest_N)], all_NLX[:, :, max(widest_N) :]
    return held_NLS.transpose(0, 1).tolist(), loads_NLE.sum(0).tolist(), min(most_slots_N)


def _keep_(bank: ExpertBank, wanted: Sequence[int]) -> None:
    """Gives the bank as many slots as are wanted, with what it has of them in place, and no others filled."""
    if bank.held != tuple(wanted):
        where = {expert: slot for slot, expert in reversed(list(enumerate(bank.held))) if expert != EMPTY}
        bank.resize_([where.get(expert) for expert in wanted])
