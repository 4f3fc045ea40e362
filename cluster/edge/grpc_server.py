"""A gRPC server over the request core: services, health, reflection, limits, and an orderly stop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import _async as aio_health
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import _async as aio_reflection
from grpc_reflection.v1alpha import reflection, reflection_pb2

from moestro.cluster.edge.core import RequestCore
from moestro.cluster.edge.grpc_services import CLUSTER, INFERENCE, ClusterHandlers, ClusterSource, InferenceHandlers
from moestro.cluster.edge.open_calls import OpenCalls
from moestro.cluster.edge.slow_consumers import SlowConsumers
from moestro.protos.errors import ConfigError

REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"
HEARD_S = 0.3  # calls may be on their way while their connection is told to make no more
FAREWELL_S = 0.5  # for last words to reach their clients


@dataclass(frozen=True, slots=True)
class GrpcOptions:
    """How the server listens."""

    host: str = "0.0.0.0"
    port: int = 50051  # 0: any free one
    max_concurrent_streams: int = 1024  # per connection; beyond it a client's calls wait on its side
    reuse_port: bool = False  # several servers on one port, for several gateway processes on one machine
    grace_s: float = 10.0  # what open streams get to finish in when the server stops
    stall_s: float = 30.0  # a client that reads nothing for so long is cut off
    max_unread_tokens: int = 4096  # and so is one for which more is held
    keepalive_s: float = 60.0  # a silent connection is pinged after this long, and dropped if it does not answer


class GrpcServer:
    """Serves until stopped. ``start`` raises ConfigError when the port is taken."""

    def __init__(
        self, core: RequestCore, cluster: ClusterSource, version: str, options: GrpcOptions | None = None
    ) -> None:
        self.options = options or GrpcOptions()
        self.port = 0  # known once started
        self.slow = SlowConsumers(self.options.stall_s, self.options.max_unread_tokens)
        self._health = aio_health.HealthServicer()
        self._open_calls = OpenCalls((INFERENCE, CLUSTER))
        self._server = grpc.aio.server(
            interceptors=(self._open_calls,),
            options=_channel_options(self.options, core.limits.max_message_bytes),
            # A backstop far above the core's own bound, which answers with details.
            maximum_concurrent_rpcs=4 * core.limits.max_open_requests + 64,
        )
        handlers = (InferenceHandlers(core, version, self.slow).generic(), ClusterHandlers(core, cluster).generic())
        self._server.add_generic_rpc_handlers((*handlers, _reflection_v1((INFERENCE, CLUSTER))))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(_service_names((INFERENCE, CLUSTER)), self._server)

    async def start(self) -> int:
        """Listens and serves; returns the port. Healthy from then on."""
        address = f"{self.options.host}:{self.options.port}"
        try:
            self.port = self._server.add_insecure_port(address)
        except RuntimeError:
            raise ConfigError(f"port: cannot listen on {address}; is another server on that port?") from None
        await self._server.start()
        await self.set_serving(True)
        return self.port

    async def set_serving(self, serving: bool) -> None:
        """What health checks say, of the server as a whole and of each service."""
        kind = health_pb2.HealthCheckResponse
        for name in ("", INFERENCE, CLUSTER):
            await self._health.set(name, kind.SERVING if serving else kind.NOT_SERVING)

    async def stop(self, grace_s: float | None = None) -> None:
        """Says NOT_SERVING, closes the port and tells every connection to make new calls elsewhere (GOAWAY), lets open
        calls finish within the grace period, and ends the rest with UNAVAILABLE and RetryInfo."""
        grace_s = self.options.grace_s if grace_s is None else grace_s
        await self._health.enter_graceful_shutdown()
        await asyncio.sleep(0)  # health watchers hear it before the connections go
        stopping = asyncio.create_task(self._server.stop(grace_s + 2 * FAREWELL_S))
        heard_s = min(HEARD_S, grace_s)
        await asyncio.sleep(heard_s)
        if not await self._open_calls.drained(grace_s - heard_s):
            self._open_calls.cut()
            await self._open_calls.drained(FAREWELL_S)
        await self._server.stop(FAREWELL_S)  # what is left only watches
        await stopping

    async def wait(self) -> None:
        """Until stopped."""
        await self._server.wait_for_termination()


def _channel_options(options: GrpcOptions, max_message_bytes: int) -> list[tuple[str, int]]:
    """Keys: https://grpc.github.io/grpc/core/group__grpc__arg__keys.html"""
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_concurrent_streams", options.max_concurrent_streams),
        ("grpc.so_reuseport", int(options.reuse_port)),
        ("grpc.keepalive_time_ms", int(options.keepalive_s * 1000)),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ]


def _service_names(services: Sequence[str]) -> tuple[str, ...]:
    return (*services, health.SERVICE_NAME, reflection.SERVICE_NAME, REFLECTION_V1)


def _reflection_v1(services: Sequence[str]) -> grpc.GenericRpcHandler[Any, Any]:
    """grpcio-reflection offers v1alpha; v1 is the same messages under another name."""
    servicer = aio_reflection.ReflectionServicer(service_names=_service_names(services))
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    return grpc.method_handlers_generic_handler(REFLECTION_V1, {"ServerReflectionInfo": handler})
