"""The processes of a cluster without Ray, one function for each. What they run is what runs under Ray; here ``keeper``
starts it, and it is reached by ``calls``.

    python -m benchmarks.chaos.plain.parts directory|group|rank|gateway ORDERS
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from benchmarks.chaos.plain.calls import LONGEST, Redialling, answer
from pydantic import TypeAdapter

from moestro.cluster.config import Config
from moestro.cluster.directory import GatewayEntry
from moestro.cluster.directory_calls import DirectoryCalls, DirectoryServer
from moestro.cluster.directory_follower import DirectoryFollower
from moestro.cluster.gateway import Gateway
from moestro.cluster.heap import freeze_heap


@dataclass(frozen=True, slots=True)
class Orders:
    """What every process is told at its start. It comes as JSON."""

    config: Config
    secret: str
    name: str  # of this process
    here: str  # the address of this machine that ranks can reach
    directory_port: int
    folder: str  # where the group says which processes its ranks are
    hosts: tuple[tuple[str, str], ...] = ()  # name and address of those that ranks are spread over

    @property
    def directory(self) -> DirectoryCalls:
        return cast(DirectoryCalls, Redialling((self.here, self.directory_port), DirectoryCalls))


ORDERS = TypeAdapter(Orders)


async def directory(orders: Orders) -> None:
    """For ever. One that is started again does not know whom to expect."""
    known = frozenset(f"group-{number}" for number in range(orders.config.cluster.groups))
    server = DirectoryServer(frozenset() if _is_first(orders) else known)
    listening = await asyncio.start_server(
        lambda reader, writer: answer(reader, writer, server, DirectoryCalls),
        orders.here,
        orders.directory_port,
        limit=LONGEST,
    )
    await listening.serve_forever()


def _is_first(orders: Orders) -> bool:
    mark = Path(orders.folder, "directory")
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


async def gateway(orders: Orders) -> None:
    """For ever."""
    edge = Gateway(orders.config, orders.secret, orders.name)
    follower = DirectoryFollower(orders.directory, edge.update, edge.attached_groups)
    following = asyncio.create_task(follower.follow())
    port = await edge.start()
    freeze_heap()
    await follower.arrive(GatewayEntry(orders.name, f"127.0.0.1:{port}"))
    await asyncio.gather(following, follower.report())


async def group(orders: Orders) -> None:
    """Until the group is over. Raises GroupFailed."""
    from benchmarks.chaos.plain.group import run_group

    await run_group(orders)


def main(role: str, orders: str) -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    run: dict[str, Any] = {"directory": directory, "gateway": gateway, "group": group}
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    asyncio.run(run[role](ORDERS.validate_json(orders)))


def command(role: str, orders: Orders) -> list[str]:
    """Starts such a process."""
    return [
        sys.executable,
        "-m",
        "benchmarks.chaos.plain.parts",
        role,
        ORDERS.dump_json(orders).decode(),
    ]


if __name__ == "__main__":
    main(*sys.argv[1:])
