"""A rank as a plain process: a Worker in a thread, the server that gateways attach to, a line to the supervisor."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.chaos.lines import Line, connect, decode_view, encode_state


@dataclass(frozen=True, slots=True)
class Place:
    """What a rank is told at its start. Plain values: it may come as JSON."""

    config: dict[str, Any]  # as a configuration file would have it
    group: str
    seat: int
    worker: int
    host: str  # where it listens
    store: tuple[str, int]
    supervisor: tuple[str, int]
    secret: str
    held: list[list[int]] | None = None  # experts to load by layer; None: the seat's own share


def main(place: Place) -> None:
    """Returns when the supervisor is gone or has asked for it."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        asyncio.run(_Rank(place).run())
    finally:
        os._exit(0)  # an engine's thread may hang in a collective


class _Rank:
    def __init__(self, place: Place) -> None:
        self._place = place
        self._line: Line | None = None

    async def run(self) -> None:
        import grpc

        from moestro.cluster.config import Config
        from moestro.cluster.ranks.server import CHANNEL_OPTIONS, RankServer
        from moestro.cluster.serving.rank_spec import rank_spec
        from moestro.protos.gen import rank_pb2_grpc
        from moestro.router.mesh import StoreAddress
        from moestro.workers.device import freeze_heap
        from moestro.workers.worker import Worker

        place, loop = self._place, asyncio.get_running_loop()
        self._line = await connect(*place.supervisor)
        self._line.send({"group": place.group, "worker": place.worker})
        spec = rank_spec(Config.model_validate(place.config))
        worker = Worker(
            spec,
            StoreAddress(*place.store),
            place.seat,
            place.worker,
            hostname=place.host,
            on_state=lambda state: loop.call_soon_threadsafe(self._tell, {"state": encode_state(state)}),
        )
        listening = asyncio.create_task(self._listen(worker))
        loaded = await asyncio.to_thread(worker.load, place.held)
        server: RankServer | None = None
        address = ""
        if place.seat % spec.shape.tp == 0:
            server = RankServer(
                worker.submit,
                loaded.limits,
                loaded.load,
                place.secret,
                experts=worker.experts,
                request_placement=worker.request_placement,
            )
            grpc_server = grpc.aio.server(options=CHANNEL_OPTIONS)
            rank_pb2_grpc.add_RankServiceServicer_to_server(server, grpc_server)
            address = f"{place.host}:{grpc_server.add_insecure_port(f'{place.host}:0')}"
            await grpc_server.start()
        await asyncio.to_thread(freeze_heap)
        publish = _publisher(loop, server)
        threading.Thread(target=worker.run, args=(publish,), name="engine", daemon=True).start()
        self._tell({"address": address, "device": loaded.device, "state": encode_state(worker.state)})
        await listening

    def _tell(self, message: dict[str, Any]) -> None:
        assert self._line is not None
        self._line.send(message)

    async def _listen(self, worker: Any) -> None:
        assert self._line is not None
        async for message in self._line.messages():
            if "form" in message:
                worker.form(decode_view(message["form"]))
            elif "stop" in message:
                return
            self._tell({"state": encode_state(worker.state)})


def _publisher(loop: asyncio.AbstractEventLoop, server: Any) -> Callable[[Any], None]:
    def publish(output: Any) -> None:
        if server is not None:
            loop.call_soon_threadsafe(server.publish, output)

    return publish


def arguments(place: Place) -> str:
    return json.dumps(asdict(place))


if __name__ == "__main__":
    main(Place(**json.loads(sys.argv[1])))
