"""A running cluster, through one of its gateways."""

from __future__ import annotations

from types import TracebackType

import grpc

from moestro.cluster.client import AsyncClient
from moestro.cluster.client_attempts import error_from
from moestro.cluster.client_calls import CHANNEL_OPTIONS, Options
from moestro.cluster.client_results import ClusterStatus, ModelInfo
from moestro.cluster.edge.events import Completion, gather
from moestro.cluster.verify.suite import Case
from moestro.cluster.verify.target import ExpertState, NotApplicable
from moestro.protos.errors import UnknownModel
from moestro.protos.gen import inference_pb2 as pb
from moestro.protos.gen.inference_pb2_grpc import ClusterServiceStub
from moestro.protos.sequences import Diagnostics


class GrpcTarget:
    """Implements ``Target``. ``timeout_s`` is the deadline of each request."""

    def __init__(self, address: str, model: str, timeout_s: float) -> None:
        self._client = AsyncClient(address, timeout_s)
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._cluster = ClusterServiceStub(self._channel)
        self._model = model
        self._timeout_s = timeout_s

    async def model(self) -> ModelInfo:
        models = await self._client.models()
        for model in models:
            if model.name == self._model or (not self._model and len(models) == 1):
                return model
        raise UnknownModel(self._model, [model.name for model in models])

    async def tokenize(self, text: str) -> list[int]:
        return await self._client.tokenize(text, self._model)

    async def status(self) -> ClusterStatus:
        return await self._client.status()

    async def ask(self, case: Case, diagnostics: Diagnostics) -> Completion:
        options: Options = {**case.options, "model": self._model, "diagnostics": diagnostics}
        if isinstance(case.prompt, str):
            return gather([event async for event in self._client.stream_chat(case.prompt, **options)])
        return gather([event async for event in self._client.stream(case.prompt, **options)])

    async def experts(self, group: str) -> ExpertState:
        try:
            response = await self._cluster.GetExperts(pb.GetExpertsRequest(group=group), timeout=self._timeout_s)
        except grpc.aio.AioRpcError as failure:
            raise _not_applicable(failure, "GetExperts") from failure
        if len(response.groups) != 1:
            raise NotApplicable(f"the server says nothing of the experts of {group}")
        found = response.groups[0]
        is_moving = any(decision.outcome == "loading" for decision in found.decisions)
        return ExpertState(found.rebalancer.switched_layers, is_moving)

    async def set_placement(self, group: str, random_seed: int | None) -> None:
        request = pb.SetPlacementRequest(group=group)
        if random_seed is None:
            request.even = True
        else:
            request.random_seed = random_seed
        try:
            await self._cluster.SetPlacement(request, timeout=self._timeout_s)
        except grpc.aio.AioRpcError as failure:
            raise _not_applicable(failure, "SetPlacement") from failure

    async def __aenter__(self) -> GrpcTarget:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()
        await self._channel.close(None)


def _not_applicable(failure: grpc.aio.AioRpcError, method: str) -> Exception:
    """A refusal is a reason; anything else is an error."""
    if failure.code() is grpc.StatusCode.UNIMPLEMENTED:
        return NotApplicable(f"the server has no {method}")
    if failure.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION):
        return NotApplicable(f"the server refuses: {failure.details()}")
    return error_from(failure)
