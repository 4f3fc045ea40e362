"""One epoch of a worker: how it comes into a group, and what it does there.

    join the mesh ──▶ kernels alike? ──▶ tensor-parallel peers at the same turn? ──▶ regroup the experts
        ──▶ capture ──▶ wait until all are ready ──▶ turns, until the group stops, breaks, or a newer view comes

What outlives it is the worker's share (weights, cache) and its scheduler.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from moestro.kernels.backend import NAMES as BACKEND_NAMES
from moestro.kernels.backend import BackendName
from moestro.protos.errors import ConfigError
from moestro.router.collectives import GroupBroken
from moestro.router.mesh import Mesh, StoreAddress, alone, join
from moestro.router.view import View
from moestro.workers.interruption import Interruption
from moestro.workers.lockstep import Lockstep, make_lockstep
from moestro.workers.memory_plan import spare_ranks
from moestro.workers.rank_loop import Account
from moestro.workers.rank_setup import RankSpec, Share, runner_over, spread_over
from moestro.workers.rebalancing.group_experts import GroupExperts, NoExperts
from moestro.workers.rebalancing.setup import group_experts, topology
from moestro.workers.regroup import regroup
from moestro.workers.runner import StepRunner
from moestro.workers.watched_runner import WatchedRunner

log = logging.getLogger(__name__)

FORMING_S = 60.0  # for all members to come, and then to be ready
WATCHDOG_S = {"cpu": 3.0, "cuda": 30.0}


@dataclass(frozen=True, slots=True)
class Meeting:
    """With whom a worker comes together, and where."""

    view: View
    rank: int
    store: StoreAddress
    hostname: str  # this machine as its peers call it
    interruption: Interruption

    @property
    def is_alone(self) -> bool:
        return len(self.view.members) == 1


@dataclass(frozen=True, slots=True)
class Epoch:
    """What a worker has while its group stands."""

    mesh: Mesh
    lockstep: Lockstep
    runner: StepRunner
    experts: GroupExperts | NoExperts
    spare_ranks: int  # that the group can lose before the others cannot hold all experts


@contextmanager
def formed(
    meeting: Meeting,
    share: Share,
    account: Account,
    begin_anew: Callable[[], None],
    loads_LE: Sequence[Sequence[int]] | None,
) -> Iterator[Epoch]:
    """Comes together with the other members of a view; leaves them when the block ends, or the interruption comes.
    ``begin_anew`` is called when the ranks of this tensor-parallel set are no replicas of each other any more.
    ``loads_LE``: what each expert computed lately, if this worker was in a group before; experts without a rank are
    spread evenly by it.

    Raises GroupBroken when the group cannot form or is broken again, ExpertsDoNotFit when it is too small, Superseded
    when the interruption comes, ConfigError and CheckpointError for what is this worker's own fault."""
    view, interruption, spec = meeting.view, meeting.interruption, share.spec
    with ExitStack() as leaving:
        mesh = _meet(meeting, spec, share.device)
        leaving.callback(mesh.close)
        interruption.then(mesh.close)
        _agree(mesh, share.backend.name, account.turns)
        if not _are_replicas(mesh, account):
            begin_anew()
        share.seat.join(mesh.tp)
        config, node_of_rank = share.model.config, _nodes(spec, view)
        regrouped = regroup(
            share.model,
            mesh.control,
            partial(spread_over, mesh, spec, config, share.model.cache_spec.dtype, node_of_rank),
            share.open_source,
            most_slots=share.most_slots,
            redundant=spec.experts.redundant,
            loads_LE=loads_LE,
            superseded=interruption.event,
        )
        runner = runner_over(spec, regrouped.model, share.cache, share.limits, view.shape, share.device)
        if share.device.type == "cuda":
            runner = WatchedRunner(runner, mesh.check)
        lockstep = make_lockstep(mesh, meeting.store, timeout_s=FORMING_S)
        leaving.callback(lockstep.close)
        interruption.then(lockstep.close)
        experts = group_experts(
            spec.experts,
            regrouped.model,
            lockstep,
            rank=meeting.rank,
            seats=tuple(member.seat for member in view.members),
            node_of_rank=node_of_rank,
            open_source=share.open_source,
        )
        leaving.callback(experts.close)
        _await_all(meeting)
        spare = spare_ranks(config.num_experts, len(view.members), view.tp, regrouped.most_slots)
        yield Epoch(mesh, lockstep, runner, experts, spare)


def _meet(meeting: Meeting, spec: RankSpec, device: torch.device) -> Mesh:
    if meeting.is_alone:
        return alone(device)

    def meet() -> Mesh:
        return join(
            meeting.view.shape,
            meeting.rank,
            meeting.store.connect(FORMING_S),
            device_kind="cuda" if device.type == "cuda" else "cpu",
            epoch=meeting.view.epoch,
            timeout_s=spec.watchdog_s or WATCHDOG_S[device.type],
            forming_s=FORMING_S,
            hostname=meeting.hostname,
        )

    try:
        return meeting.interruption.bounds(meet, Mesh.close)
    except RuntimeError as error:  # torch says no more of it: a member did not come, or is gone again
        raise GroupBroken(f"the group did not form: {error}") from error


def _await_all(meeting: Meeting) -> None:
    """Reading experts and capturing steps may take one rank longer than a collective waits for it."""
    if meeting.is_alone:
        return

    def wait() -> None:
        ready = meeting.store.connect(FORMING_S, f"epoch/{meeting.view.epoch}/ready")
        ready.set(str(meeting.rank), "")
        ready.wait([str(rank) for rank in range(len(meeting.view.members))])

    try:
        meeting.interruption.bounds(wait, lambda _: None)
    except RuntimeError as error:
        raise GroupBroken(f"not all ranks became ready: {error}") from error


def _agree(mesh: Mesh, backend: BackendName, turns: int) -> None:
    """Backends differ from each other by rounding, so within a group an answer would depend on where its experts are.
    Collective. Those who differ from the rank that has served longest raise ConfigError, the others GroupBroken."""
    mine = torch.tensor([BACKEND_NAMES.index(backend), turns])
    codes, turns_N = mesh.control.all_gather(mine).T.tolist()
    first = turns_N.index(max(turns_N))
    others = [rank for rank, code in enumerate(codes) if code != codes[first]]
    if not others:
        return
    problem = (
        f"rank.kernels: all ranks of a group must have the same, but rank {first} has {BACKEND_NAMES[codes[first]]} "
        f'and rank {others[0]} {BACKEND_NAMES[codes[others[0]]]}; "plain" can serve everywhere'
    )
    raise ConfigError(problem) if mesh.rank in others else GroupBroken(problem)


def _are_replicas(mesh: Mesh, account: Account) -> bool:
    """Whether the ranks of this tensor-parallel set went the same way so far. Collective within the set."""
    if mesh.tp_control is None:
        return True
    histories = mesh.tp_control.all_gather(torch.tensor(account.history)).tolist()
    return all(history == histories[0] for history in histories)


def _nodes(spec: RankSpec, view: View) -> tuple[int, ...]:
    """A seat stays on its node, whoever sits on the others."""
    of_seat = topology(spec.experts, spec.shape.world_size).node_of_rank
    return tuple(of_seat[member.seat] for member in view.members)
