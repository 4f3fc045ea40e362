"""Metrics over HTTP, in Prometheus' text format. prometheus_client serves them from threads of its own; what they show
is asked for on the gateway's loop."""

from __future__ import annotations

import asyncio
import errno
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from moestro.cluster.metrics.series import Observed, series
from moestro.protos.errors import ConfigError

FRESH_S = 1.0  # scrapes closer than this see the same: they must not keep the ranks busy
OBSERVE_S = 8.0  # longer than a rank gets to answer, shorter than Prometheus waits

Observe = Callable[[], Awaitable[Observed]]


class ObservedCollector(Collector):
    """Asks when it is scraped. ``collect`` may be called from any thread but the loop's."""

    def __init__(self, observe: Observe, loop: asyncio.AbstractEventLoop) -> None:
        self._observe = observe
        self._loop = loop
        self._lock = threading.Lock()
        self._observed: Observed | None = None
        self._observed_s = 0.0

    def collect(self) -> Iterable[Metric]:
        with self._lock:
            if self._observed is None or time.monotonic() - self._observed_s > FRESH_S:
                self._observed = asyncio.run_coroutine_threadsafe(self._ask(), self._loop).result(OBSERVE_S)
                self._observed_s = time.monotonic()
            return list(series(self._observed))

    async def _ask(self) -> Observed:
        return await self._observe()


class MetricsServer:
    """Listens on the first of ``ports`` that is free: gateways of one host have one each."""

    def __init__(self, observe: Observe, host: str, ports: Sequence[int]) -> None:
        self._observe = observe
        self._host = host
        self._ports = ports
        self._serving: tuple[Any, threading.Thread] | None = None

    def start(self) -> int:
        """Serves from now on; returns the port. Call on the loop. Raises ConfigError when none can be had."""
        registry = CollectorRegistry()
        registry.register(ObservedCollector(self._observe, asyncio.get_running_loop()))
        for port in self._ports:
            try:
                self._serving = start_http_server(port, self._host, registry)
                return int(self._serving[0].server_port)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise ConfigError(
                        f"server.metrics_port: cannot listen on {self._host} port {port}: {error.strerror or error}"
                    ) from None
        raise ConfigError(
            f"server.metrics_port: no free port on {self._host} from {self._ports[0]} to {self._ports[-1]}"
        )

    async def stop(self) -> None:
        """Returns when nobody listens any more."""
        if self._serving is not None:
            server, thread = self._serving
            # In a thread: a scrape under way needs the loop to come to its end.
            await asyncio.to_thread(server.shutdown)
            server.server_close()
            await asyncio.to_thread(thread.join)
            self._serving = None
