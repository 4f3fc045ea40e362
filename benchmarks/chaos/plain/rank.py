"""A rank as a plain process: ``RankProcess``, answering the supervisor over the connection that it opens to it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import asdict
from typing import Any

from benchmarks.chaos.plain.calls import LONGEST, answer

from moestro.cluster.config import Config
from moestro.cluster.ranks.process import RankProcess
from moestro.cluster.ranks.report import RankPlace
from moestro.cluster.supervisor import WorkerHandle
from moestro.router.mesh import StoreAddress


def orders_of(config: Config, place: RankPlace, supervisor: tuple[str, int]) -> str:
    """What the process is told."""
    told = {
        "config": config.model_dump(mode="json"),
        "place": asdict(place),
        "supervisor": supervisor,
    }
    return json.dumps(told)


def main(orders: str) -> None:
    """Returns when the supervisor is gone: a group ends with it."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        asyncio.run(_run(json.loads(orders)))
    finally:
        os._exit(0)  # an engine's thread may be in a collective


async def _run(told: dict[str, Any]) -> None:
    from moestro.cluster.serving.rank_spec import rank_spec

    place = RankPlace(**{**told["place"], "store": StoreAddress(**told["place"]["store"])})
    reader, writer = await asyncio.open_connection(*told["supervisor"], limit=LONGEST)
    writer.write(json.dumps({"worker": place.worker}).encode() + b"\n")
    process = RankProcess(rank_spec(Config.model_validate(told["config"])), place)
    process.start()
    await answer(reader, writer, process, WorkerHandle)


if __name__ == "__main__":
    main(sys.argv[1])
