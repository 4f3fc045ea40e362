"""One epoch of a worker: how it comes into a group, and what it does there.

    join the mesh ──▶ kernels alike? ──▶ tensor-parallel peers at the same turn? ──▶ regroup the experts
        ──▶ capture ──▶ wait until all are ready ──▶ turns, until the group stops, breaks, or a newer view comes

What outlives it is the worker's share (weights, cache) and its scheduler.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
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
from moestro.workers.model.decoder import Decoder
from moestro.workers.rank_loop import Account
from moestro.workers.rank_setup import RankSpec, Share, runner_over, spread_over
from moestro.workers.rebalancing.group_experts import GroupExperts, NoExperts
from moestro.workers.rebalancing.setup import group_experts, topology
from moestro.workers.regroup import regroup
from moestro.workers.runner import StepRunner

log = logging.getLogger(__name__)

FORMING_S = 60.0  # for all members to come, and then to be ready
WATCHDOG_S = {"cpu": 3.0, "cuda": 30.0}


@dataclass(frozen=True, slots=True)
class Epoch:
    """What a worker has while its group stands."""

    mesh: Mesh
    lockstep: Lockstep
    model: Decoder
    runner: StepRunner
    experts: GroupExperts | NoExperts
    is_same_turn: bool  # this rank's tensor-parallel set came with one history, and goes on with it


@contextmanager
def formed(
    view: View, rank: int, share: Share, model: Decoder, account: Account, store: StoreAddress, hostname: str,
    interruption: Interruption,
) -> Iterator[Epoch]:  # fmt: skip
    """Comes together with the other members of ``view``, as ``rank``; leaves them when the block ends, or the
    interruption comes. ``model`` is what the last epoch left, or the share's own.

    Raises GroupBroken when the group cannot form or is broken again, Superseded when the interruption comes,
    ConfigError and CheckpointError for what is this worker's own fault."""
    with ExitStack() as leaving:
        mesh = _meet(view, rank, share.spec, store, hostname, share.device, interruption)
        leaving.callback(mesh.close)
        interruption.then(mesh.close)
        _agree(mesh, share.backend.name, account.turns)
        is_same_turn = _compare(mesh, account)
        share.seat.join(mesh.tp)
        node_of_rank = _nodes(share.spec, view)
        regrouped = regroup(
            model,
            mesh.control,
            partial(spread_over, mesh, share.spec, model.config, model.cache_spec.dtype, node_of_rank),
            share.open_source,
            most_slots=model.config.num_experts,
            redundant=share.spec.experts.redundant,
            superseded=interruption.event,
        )
        model = regrouped.model
        runner = runner_over(share.spec, model, share.cache, share.limits, view.shape, share.device)
        lockstep = make_lockstep(mesh, store, timeout_s=FORMING_S)
        leaving.callback(lockstep.close)
        interruption.then(lockstep.close)
        experts = group_experts(
            share.spec.experts, model, lockstep, rank=rank, node_of_rank=node_of_rank, open_source=share.open_source
        )
        leaving.callback(experts.close)
        _await_all(view, rank, store, interruption)
        yield Epoch(mesh, lockstep, model, runner, experts, is_same_turn)


def _meet(
    view: View, rank: int, spec: RankSpec, store: StoreAddress, hostname: str, device: torch.device,
    interruption: Interruption,
) -> Mesh:  # fmt: skip
    if len(view.members) == 1:
        return alone(device)

    def meet() -> Mesh:
        return join(
            view.shape,
            rank,
            store.connect(FORMING_S),
            device_kind="cuda" if device.type == "cuda" else "cpu",
            epoch=view.epoch,
            timeout_s=spec.watchdog_s or WATCHDOG_S[device.type],
            forming_s=FORMING_S,
            hostname=hostname,
        )

    try:
        return interruption.bounds(meet, Mesh.close)
    except RuntimeError as error:  # torch says no more of it: a member did not come, or is gone again
        raise GroupBroken(f"the group did not form: {error}") from error


def _await_all(view: View, rank: int, store: StoreAddress, interruption: Interruption) -> None:
    """Reading experts and capturing steps may take one rank longer than a collective waits for it."""
    if len(view.members) == 1:
        return

    def wait() -> None:
        ready = store.connect(FORMING_S, f"epoch/{view.epoch}/ready")
        ready.set(str(rank), "")
        ready.wait([str(each) for each in range(len(view.members))])

    try:
        interruption.bounds(wait, lambda _: None)
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


def _compare(mesh: Mesh, account: Account) -> bool:
    """Whether this tensor-parallel set's ranks are replicas of each other. All have one account when this returns.
    Collective within the set."""
    if mesh.tp_control is None:
        return True
    histories = mesh.tp_control.all_gather(torch.tensor(account.history)).tolist()
    account.turns, account.applied, account.messages = map(max, zip(*histories, strict=True))
    return all(history == histories[0] for history in histories)


def _nodes(spec: RankSpec, view: View) -> tuple[int, ...]:
    """A seat stays on its node, whoever sits on the others."""
    of_seat = topology(spec.experts, spec.shape.world_size).node_of_rank
    return tuple(of_seat[member.seat] for member in view.members)
