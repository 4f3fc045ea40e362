"""What a server says of its experts, and what it is asked, over a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import grpc
import pytest

from moestro.cluster.verify.grpc_target import GrpcTarget
from moestro.cluster.verify.target import ExpertState, NotApplicable
from moestro.protos.errors import Unavailable
from moestro.protos.gen import inference_pb2 as pb
from moestro.protos.gen import inference_pb2_grpc as pb_grpc


class Server(pb_grpc.ClusterServiceServicer):
    """Says what it is told to say."""

    def __init__(self, refusal: grpc.StatusCode | None = None) -> None:
        self.refusal = refusal
        self.asked: list[pb.SetPlacementRequest] = []
        self.outcome = "loading"

    async def GetExperts(self, request: pb.GetExpertsRequest, context: Any) -> pb.GetExpertsResponse:
        group = pb.GroupExperts(
            group=request.group,
            rebalancer=pb.RebalancerState(switched_layers=7),
            decisions=[pb.RebalanceDecision(outcome="kept"), pb.RebalanceDecision(outcome=self.outcome)],
        )
        return pb.GetExpertsResponse(groups=[group] if request.group == "g" else [])

    async def SetPlacement(self, request: pb.SetPlacementRequest, context: Any) -> pb.SetPlacementResponse:
        if self.refusal is not None:
            await context.abort(self.refusal, "because")
        self.asked.append(request)
        return pb.SetPlacementResponse(groups=[request.group])


def against(server: pb_grpc.ClusterServiceServicer, scenario: Any) -> None:
    async def run() -> None:
        listening = grpc.aio.server()
        pb_grpc.add_ClusterServiceServicer_to_server(server, listening)
        port = listening.add_insecure_port("127.0.0.1:0")
        await listening.start()
        try:
            async with GrpcTarget(f"127.0.0.1:{port}", "", 5.0) as target:
                await _checked(scenario(target))
        finally:
            await listening.stop(0)

    asyncio.run(asyncio.wait_for(run(), 20))


async def _checked(scenario: Coroutine[Any, Any, None]) -> None:
    await scenario


def test_how_far_experts_have_moved_and_where_they_are_sent() -> None:
    server = Server()

    async def scenario(target: GrpcTarget) -> None:
        assert await target.experts("g") == ExpertState(7, is_moving=True)
        server.outcome = "kept"
        assert await target.experts("g") == ExpertState(7, is_moving=False)
        with pytest.raises(NotApplicable, match="says nothing of the experts of h"):
            await target.experts("h")
        await target.set_placement("g", 2**64 - 1)
        await target.set_placement("g", None)
        assert [(a.group, a.WhichOneof("placement")) for a in server.asked] == [("g", "random_seed"), ("g", "even")]
        assert server.asked[0].random_seed == 2**64 - 1

    against(server, scenario)


@pytest.mark.parametrize("code", [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION])
def test_a_refusal_is_a_reason(code: grpc.StatusCode) -> None:
    async def scenario(target: GrpcTarget) -> None:
        with pytest.raises(NotApplicable, match="the server refuses: because"):
            await target.set_placement("g", 1)

    against(Server(code), scenario)


def test_an_older_server_has_neither() -> None:
    async def scenario(target: GrpcTarget) -> None:
        with pytest.raises(NotApplicable, match="no GetExperts"):
            await target.experts("g")
        with pytest.raises(NotApplicable, match="no SetPlacement"):
            await target.set_placement("g", 1)

    against(pb_grpc.ClusterServiceServicer(), scenario)


def test_an_error_is_not_a_reason() -> None:
    async def scenario(target: GrpcTarget) -> None:
        with pytest.raises(Unavailable):
            await target.set_placement("g", 1)

    against(Server(grpc.StatusCode.UNAVAILABLE), scenario)
