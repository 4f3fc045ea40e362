"""GetExperts and SetPlacement from a client through a real gateway to rank servers, whose engines are fakes."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from tests.cluster.expert_cluster import DENSE, SECRET, Cluster, FakeGroup, cluster, report_of
from tests.edge.serving import refused

from moestro.cluster.client import AsyncClient
from moestro.cluster.client_results import GroupExperts
from moestro.cluster.edge.statuses import status_of
from moestro.cluster.ranks import link
from moestro.cluster.ranks.link import RankLink
from moestro.protos.errors import FieldViolation, InvalidRequest, MoestroError, Unavailable
from moestro.protos.experts import PlacementRequest
from moestro.protos.gen import inference_pb2 as pb
from moestro.protos.gen import inference_pb2_grpc as pb_grpc

REPORT = report_of(4)
SLOTS = ((0, 1, -1), (2, 3, 1))


def client_of(it: Cluster) -> AsyncClient:
    return AsyncClient(it.address, timeout_s=10.0, retries=0)


def test_reports_of_all_groups_and_of_one() -> None:
    async def scenario() -> None:
        one, two = FakeGroup("group-0", REPORT), FakeGroup("group-1", DENSE, epoch=9)
        async with cluster(one, two) as it, client_of(it) as client:
            assert await client.experts() == (GroupExperts("group-0", 3, REPORT), GroupExperts("group-1", 9, DENSE))
            assert [group.name for group in await client.experts("group-1")] == ["group-1"]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "request_",
    [
        PlacementRequest(even=True),
        PlacementRequest(random_seed=2**64 - 1, rebalance=False),
        PlacementRequest(rebalance=True),
        PlacementRequest(layers=(SLOTS, SLOTS)),
    ],
)
def test_a_placement_reaches_the_groups_it_is_meant_for(request_: PlacementRequest) -> None:
    async def scenario() -> None:
        one, two = FakeGroup("group-0", REPORT), FakeGroup("group-1", REPORT)
        async with cluster(one, two) as it, client_of(it) as client:
            assert await client.set_placement(request_) == ("group-0", "group-1")
            assert await client.set_placement(request_, "group-1") == ("group-1",)
            assert (one.asked, two.asked) == ([request_], [request_, request_])

    asyncio.run(scenario())


BAD = (
    (((0, 1), (2, 3)), "experts.layers[1].slots", "layer 2: 2 ranks of 3 slots are 6, got 4"),
    (((0, 1, 9), (2, 3, -1)), "experts.layers[1].slots", "layer 2, rank 0, slot 2: expert must be in [0, 4), or -1"),
    (((0, 1, -2), (2, 3, -1)), "experts.layers[1].slots", "layer 2, rank 0, slot 2: expert must be in [0, 4), or -1"),
    (((0, 1, -1), (2, 3, 2)), "experts.layers[1].slots", "layer 2, rank 1, slot 2: expert 2 is on this rank already"),
    (((0, 1, -1), (2, 1, -1)), "experts.layers[1].slots", "layer 2: no rank holds experts [3]"),
)


@pytest.mark.parametrize(("slots", "field", "reason"), BAD)
def test_a_placement_that_does_not_fit_names_layer_rank_and_slot(
    slots: tuple[tuple[int, ...], ...], field: str, reason: str
) -> None:
    async def scenario() -> None:
        group = FakeGroup("group-0", REPORT)
        async with cluster(group) as it, client_of(it) as client:
            with pytest.raises(InvalidRequest) as error:
                await client.set_placement(PlacementRequest(layers=(SLOTS, slots)))
            (violation,) = error.value.violations
            assert violation.field == field
            assert violation.description.startswith(reason)
            assert group.asked == []

    asyncio.run(scenario())


def test_what_can_never_work_names_its_field() -> None:
    async def scenario() -> None:
        refusing = FakeGroup("group-1", REPORT, refusal=InvalidRequest([FieldViolation("even", "tp is not 1")]))
        async with cluster(FakeGroup("group-0", DENSE), refusing) as it, client_of(it) as client:

            async def fields(request: PlacementRequest, group: str) -> dict[str, str]:
                with pytest.raises(InvalidRequest) as error:
                    await client.set_placement(request, group)
                return {v.field: v.description for v in error.value.violations}

            assert await fields(PlacementRequest(), "") == {
                "placement": "set one of experts, random_seed and even, or rebalance"
            }
            unknown = {"group": "no group 'group-7'; known: group-0, group-1"}
            assert await fields(PlacementRequest(even=True), "group-7") == unknown
            assert await fields(PlacementRequest(even=True), "group-1") == {"even": "tp is not 1"}
            dense = await fields(PlacementRequest(random_seed=1), "group-0")
            assert dense == {"random_seed": "DenseModel has no mixture layers: nothing to place"}
            one_layer = await fields(PlacementRequest(layers=(SLOTS,)), "group-1")
            assert one_layer == {"experts.layers": "the model has 2 mixture layers, got 1"}
            with pytest.raises(InvalidRequest, match="no group 'group-7'"):
                await client.experts("group-7")
            with pytest.raises(InvalidRequest, match="placement: cannot be sent"):
                await client.set_placement(PlacementRequest(random_seed=-1))

    asyncio.run(scenario())


def test_even_false_is_not_a_placement() -> None:
    async def scenario() -> None:
        async with (
            cluster(FakeGroup("group-0", REPORT)) as it,
            grpc.aio.insecure_channel(it.address) as channel,
        ):
            stub = pb_grpc.ClusterServiceStub(channel)
            answer = await refused(stub.SetPlacement(pb.SetPlacementRequest(even=False)))
            assert answer.code is grpc.StatusCode.INVALID_ARGUMENT
            assert answer.fields == {"even": "must be true or absent, got false"}

    asyncio.run(scenario())


def test_a_lost_group_takes_nothing_from_the_others() -> None:
    async def scenario() -> None:
        one, two = FakeGroup("group-0", REPORT), FakeGroup("group-1", REPORT)
        async with cluster(one, two) as it, client_of(it) as client:
            it.ranks[1].fail("its engine died")
            assert [group.name for group in await client.experts()] == ["group-0"]
            with pytest.raises(Unavailable, match=r"group-1: (its engine died|none of its ranks is attached)"):
                await client.experts("group-1")
            with pytest.raises(Unavailable, match="moving already: group-0"):
                await client.set_placement(PlacementRequest(even=True))
            it.lose(two)
            assert await client.set_placement(PlacementRequest(even=True)) == ("group-0",)
            it.operations.update([])
            with pytest.raises(Unavailable, match="no group is serving now"):
                await client.experts()

    asyncio.run(scenario())


def test_a_group_that_hangs_does_not_hold_up_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "ASK_S", 0.2)

    async def scenario() -> None:
        async with (
            cluster(FakeGroup("group-0", REPORT), FakeGroup("group-1", REPORT, delay_s=0.6)) as it,
            client_of(it) as client,
        ):
            assert [group.name for group in await client.experts()] == ["group-0"]
            with pytest.raises(TimeoutError):
                await client.experts("group-1")

    asyncio.run(scenario())


def test_what_fails_in_a_rank_tells_no_secrets() -> None:
    async def scenario() -> None:
        group = FakeGroup("group-0", REPORT, refusal=RuntimeError("in /some/path"))
        async with cluster(group) as it, client_of(it) as client:
            with pytest.raises(MoestroError, match="INTERNAL: internal error in request req-") as error:
                await client.set_placement(PlacementRequest(even=True))
            assert "/some/path" not in str(error.value)

    asyncio.run(scenario())


def test_strangers_learn_and_move_nothing() -> None:
    async def scenario() -> None:
        group = FakeGroup("group-0", REPORT)
        async with group.serving():
            assert group.entry is not None
            stranger = RankLink(group.entry.ranks[0].address, "gw", f"not {SECRET}", 3, lambda _: None)
            for call in (stranger.experts(), stranger.set_placement(pb.SetPlacementRequest(even=True))):
                with pytest.raises(MoestroError, match="UNAUTHENTICATED") as error:
                    await call
                assert status_of(error.value, "id").code is grpc.StatusCode.INTERNAL  # our fault, not the caller's
            await stranger.close()
            assert group.asked == []

    asyncio.run(scenario())
