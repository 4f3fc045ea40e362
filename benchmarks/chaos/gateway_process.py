"""A gateway as a plain process, with the supervisor in the place of the directory."""

from __future__ import annotations

import asyncio
from typing import Any

from benchmarks.chaos.lines import connect, decode_group


def main(config: dict[str, Any], name: str, secret: str, supervisor: tuple[str, int]) -> None:
    """Returns when the supervisor is gone."""
    asyncio.run(_run(config, name, secret, supervisor))


async def _run(config: dict[str, Any], name: str, secret: str, supervisor: tuple[str, int]) -> None:
    from moestro.cluster.config import Config
    from moestro.cluster.gateway import Gateway

    gateway = Gateway(Config.model_validate(config), secret, name)
    line = await connect(*supervisor)
    line.send({"gateway": name})
    starting = asyncio.create_task(gateway.start())
    async for message in line.messages():
        gateway.update(decode_group(group) for group in message["groups"])
    starting.cancel()
    await gateway.stop()
