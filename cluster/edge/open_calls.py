"""The calls that a server has open, and how those that outlast its stop come to their end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from moestro.cluster.edge.statuses import status_of
from moestro.protos.errors import Unavailable

Context = grpc.aio.ServicerContext[Any, Any]
Behaviour = Callable[[Any, Context], Awaitable[Any]]
RETRY_S = 0.2  # another gateway is there already, or soon


class OpenCalls(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Counts the calls of the named services, whose handlers are coroutines. Others, such as health and reflection, may
    stay open for ever, and no stop waits for them."""

    def __init__(self, services: tuple[str, ...]) -> None:
        self._prefixes = tuple(f"/{service}/" for service in services)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._is_cut = False
        self._none_open = asyncio.Event()
        self._none_open.set()

    async def drained(self, timeout_s: float) -> bool:
        """Returns when none is open, or the time is up: False then."""
        try:
            await asyncio.wait_for(self._none_open.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def cut(self) -> None:
        """Ends what is open with UNAVAILABLE and RetryInfo: whoever called may go on elsewhere."""
        self._is_cut = True
        for task in self._tasks:
            task.cancel()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or not str(handler_call_details.method).startswith(self._prefixes):
            return handler
        kind = "unary_stream" if handler.response_streaming else "unary_unary"
        return handler._replace(**{kind: self._counted(getattr(handler, kind))})

    def _counted(self, behaviour: Behaviour) -> Behaviour:
        async def handle(request: Any, context: Context) -> Any:
            task = asyncio.current_task()
            assert task is not None
            self._tasks.add(task)
            self._none_open.clear()
            try:
                return await behaviour(request, context)
            except asyncio.CancelledError:
                if not self._is_cut:
                    raise  # the client's doing
                task.uncancel()
                status = status_of(Unavailable("this gateway is stopping", RETRY_S), request_id="")
                await context.abort(status.code, status.message, status.metadata)
            finally:
                self._tasks.discard(task)
                if not self._tasks:
                    self._none_open.set()

        return handle
