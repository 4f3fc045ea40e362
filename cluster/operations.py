"""What a gateway answers to operators: the state of the cluster from the directory and the links, and the experts of
its groups from their ranks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Iterator

from moestro.cluster.directory import GroupEntry, RankState
from moestro.cluster.ranks.backend import ClusterBackend
from moestro.cluster.ranks.link import RankLink
from moestro.protos.errors import FieldViolation, InvalidRequest, Unavailable
from moestro.protos.gen import inference_pb2 as pb
from moestro.protos.sequences import EngineLoad

log = logging.getLogger(__name__)

_STATES = {
    RankState.STARTING: pb.RANK_STATE_STARTING,
    RankState.SERVING: pb.RANK_STATE_SERVING,
    RankState.DRAINING: pb.RANK_STATE_DRAINING,
    RankState.LOST: pb.RANK_STATE_LOST,
}


class ClusterOperations:
    """Implements ``ClusterSource`` for the ranks behind a backend. All methods on one asyncio loop."""

    def __init__(self, backend: ClusterBackend) -> None:
        self._backend = backend
        self._groups: tuple[GroupEntry, ...] = ()

    def update(self, groups: Iterable[GroupEntry]) -> None:
        """Takes the directory's latest picture."""
        self._groups = tuple(groups)

    @property
    def groups(self) -> tuple[GroupEntry, ...]:
        """As the directory has them."""
        return self._groups

    async def status(self) -> pb.GetClusterStatusResponse:
        loads, unreachable = self._backend.loads(), self._backend.unreachable()
        return pb.GetClusterStatusResponse(groups=[group_message(group, loads, unreachable) for group in self._groups])

    async def experts(self, request: pb.GetExpertsRequest) -> pb.GetExpertsResponse:
        """Of the named group, or of every group that answers. Raises InvalidRequest for a name that is not known,
        Unavailable or TimeoutError when none answers."""
        groups = self._asked(request.group)
        answers = await asyncio.gather(*(self._experts_of(group) for group in groups), return_exceptions=True)
        failures = [answer for answer in answers if isinstance(answer, BaseException)]
        if len(failures) == len(answers):
            raise failures[0]
        for failure in failures:  # a group that goes takes nothing from the view of the others
            log.warning("experts: %s", failure)
        return pb.GetExpertsResponse(groups=[answer for answer in answers if isinstance(answer, pb.GroupExperts)])

    async def set_placement(self, request: pb.SetPlacementRequest) -> pb.SetPlacementResponse:
        """Asks one group after the other, and stops at the first that refuses. Raises as ``experts`` does."""
        response = pb.SetPlacementResponse()
        for group in self._asked(request.group):
            begun = f"; moving already: {', '.join(response.groups)}" if response.groups else ""
            with _naming(group, begun):
                await self._leader(group).set_placement(request)
            response.groups.append(group.name)
        return response

    def _asked(self, name: str) -> list[GroupEntry]:
        if not name:
            serving = [group for group in self._groups if group.is_serving]
            if not serving:
                raise Unavailable("no group is serving now")
            return serving
        found = [group for group in self._groups if group.name == name]
        if not found:
            known = ", ".join(group.name for group in self._groups) or "none"
            raise InvalidRequest([FieldViolation("group", f"no group {name[:64]!r}; known: {known}")])
        return found

    async def _experts_of(self, group: GroupEntry) -> pb.GroupExperts:
        with _naming(group):
            message = await self._leader(group).experts()
        message.group = group.name
        return message

    def _leader(self, group: GroupEntry) -> RankLink:
        """The link to the first rank of a group that is attached: each of them knows what all know."""
        links = (self._backend.link_of(rank.address) for rank in group.ranks if rank.address)
        link = next((link for link in links if link is not None), None)
        if link is None:
            raise Unavailable("none of its ranks is attached")
        return link


@contextlib.contextmanager
def _naming(group: GroupEntry, more: str = "") -> Iterator[None]:
    """Says whose rank it is that is not available."""
    try:
        yield
    except Unavailable as error:
        raise Unavailable(f"{group.name}: {error}{more}", error.retry_after_s) from None


def group_message(group: GroupEntry, loads: dict[str, EngineLoad], unreachable: frozenset[str]) -> pb.Group:
    """``loads``: by address. A rank whose leader is ``unreachable`` is lost, whatever the directory still believes."""
    message = pb.Group(
        name=group.name,
        dp=group.dp,
        tp=group.tp,
        epoch=group.epoch,
        activity=group.activity,
        spare_ranks=group.spare_ranks,
    )
    for number, rank in enumerate(group.ranks):
        # A tensor-parallel peer does what its leader does, so the leader's load is its load too.
        leader = group.leader(number).address
        load = loads.get(leader, EngineLoad())
        message.ranks.add(
            name=group.rank_name(number),
            dp_rank=rank.dp_rank,
            tp_rank=rank.tp_rank,
            state=_STATES[RankState.LOST if leader in unreachable else rank.state],
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            kv_blocks_used=load.kv_blocks_used,
            kv_blocks_total=load.kv_blocks_total,
            num_steps=load.num_steps,
            step_seconds=load.step_s,
            resident_bytes=rank.resident_bytes,
            device=rank.device,
            slowness=load.slowness,
            straggler=load.slowness > 1,
        )
    return message
