"""Ten thousand clients that leave as they like: what do they leave behind?

    python -m benchmarks.cancels

A gateway on real sockets before a rank with real scheduler, KV blocks and wire (``paced_rank``), in this process, where
everything can be counted. Each request ends in a way drawn from the seed: it is read to its end, cancelled after some
messages, cancelled at once, left by its deadline, cut with its connection, or by a client that does not read and then
hangs up. Bursts are larger than the rank, so that many leave while they wait. Afterwards nothing may be left: KV
blocks, sequences at the rank, requests, permits and places in line at the gateway, asyncio tasks, file descriptors.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import grpc
import psutil
import typer
from benchmarks.hardware import hardware_record
from benchmarks.paced_gateway import PacedGateway, paced_gateway
from benchmarks.paced_rank import Pace, PacedRank, config
from rich.console import Console
from rich.table import Table

from moestro.cluster.edge.served import EdgeLimits, RecoveryLimits, ServedModel
from moestro.cluster.edge.tickets import AdmissionLimits
from moestro.protos.gen import inference_pb2 as pb

CALL = "/moestro.v1.InferenceService/Generate"
WAYS = ("to the end", "cancelled", "cancelled at once", "deadline", "connection", "not read")
BURST = 60  # requests at a time
SEATS = 16
PATIENCE_S = 30.0


@dataclass(frozen=True, slots=True)
class Left:
    """What there is of everything that can leak."""

    kv_blocks: int
    rank_sequences: int
    open_requests: int
    permits: int
    queued: int
    parked: int
    tasks: int
    descriptors: int

    def beyond(self, before: Left) -> dict[str, int]:
        """What there is more of now than before."""
        now, then = asdict(self), asdict(before)
        return {name: now[name] - then[name] for name in now if now[name] > then[name]}


def left(rank: PacedRank, gateway: PacedGateway) -> Left:
    (permits,) = gateway.core.permits.values()
    return Left(
        kv_blocks=rank.scheduler.load().kv_blocks_used,
        rank_sequences=rank.server.num_open + rank.scheduler.load().num_running + rank.scheduler.load().num_waiting,
        open_requests=gateway.core.num_open,
        permits=permits.num_open,
        queued=gateway.core.num_queued,
        parked=gateway.core.num_parked,
        tasks=len(asyncio.all_tasks()),
        descriptors=psutil.Process().num_fds(),
    )


class Leavers:
    """Clients that leave in the ways of ``WAYS``."""

    def __init__(self, address: str, draw: random.Random) -> None:
        self._address = address
        self._draw = draw
        self.outcomes: Counter[str] = Counter()

    def _channel(self) -> Any:
        return grpc.aio.insecure_channel(self._address, options=[("grpc.use_local_subchannel_pool", 1)])

    async def burst(self, count: int) -> None:
        """All at once; most of them over one connection."""
        async with self._channel() as shared:
            await asyncio.gather(*(self._one(shared, self._draw.choice(WAYS)) for _ in range(count)))

    async def _one(self, shared: grpc.aio.Channel, way: str) -> None:
        draw = self._draw
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=[draw.randrange(95) for _ in range(draw.randint(1, 200))]),
            stop=pb.StopParams(max_tokens=draw.randint(1, 60), ignore_eos=True),
            output=pb.OutputParams(n=draw.choice((1, 1, 1, 3))),
        )
        channel = self._channel() if way in ("connection", "not read") else shared
        timeout = draw.uniform(0.001, 0.3) if way == "deadline" else None
        call = channel.unary_stream(CALL)(request.SerializeToString(), timeout=timeout)
        try:
            await asyncio.wait_for(self._leave(call, way), PATIENCE_S)
            self.outcomes[way] += 1
        except grpc.aio.AioRpcError as error:
            self.outcomes[f"{way}: {error.code().name}"] += 1
        except asyncio.CancelledError:  # grpc.aio's word for a call that was cancelled here
            self.outcomes[way] += 1
        finally:
            if channel is not shared:
                await channel.close(None)

    async def _leave(self, call: Any, way: str) -> None:
        messages = aiter(call)
        if way in ("to the end", "deadline"):
            async for _ in messages:
                pass
        elif way == "not read":
            await asyncio.sleep(self._draw.uniform(0.0, 0.2))
        else:
            for _ in range(0 if way == "cancelled at once" else self._draw.randrange(8)):
                await anext(messages, None)
        if way.startswith("cancelled"):
            call.cancel()


async def leave(count: int, seed: int, model: ServedModel, report: Callable[[int], None]) -> dict[str, Any]:
    """Everything that was left behind, and how the requests ended."""
    rank = PacedRank(config(SEATS, blocks=400), Pace(0.002, 0.00001))
    limits = EdgeLimits(
        admission=AdmissionLimits(max_queued=40), recovery=RecoveryLimits(max_parked=0), max_open_requests=50
    )
    async with rank.serving() as group, paced_gateway(group, model, limits) as gateway:
        leavers = Leavers(gateway.address, random.Random(seed))
        await leavers.burst(BURST // 2)  # what is made once and kept
        before = await _settled(rank, gateway)
        began_s, done = time.perf_counter(), 0
        while done < count:
            await leavers.burst(min(BURST, count - done))
            done += min(BURST, count - done)
            report(done)
        seconds = time.perf_counter() - began_s
        after = await _settled(rank, gateway)
        rank.scheduler.check_integrity()
        (permits,) = gateway.core.permits.values()
        return {
            "seed": seed,
            "requests": done,
            "leaked": after.beyond(before),
            "before": asdict(before),
            "after": asdict(after),
            "outcomes": dict(sorted(leavers.outcomes.items())),
            "refused": {reason.value: number for reason, number in permits.counts.refused.items()},
            "seconds": seconds,
            "resident_mb": psutil.Process().memory_info().rss / 1e6,
        }


async def _settled(rank: PacedRank, gateway: PacedGateway) -> Left:
    """Once nothing changes any more, or time is up."""
    gc.collect()
    now = left(rank, gateway)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(PATIENCE_S):
            still = 0
            while still < 5:
                await asyncio.sleep(0.1)
                before, now = now, left(rank, gateway)
                still = still + 1 if now == before and not now.open_requests and not now.kv_blocks else 0
    return now


def main(
    count: Annotated[int, typer.Option(min=1, help="Requests.")] = 10_000,
    seed: int = 0,
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/cancels.json"),
) -> None:
    """Exit code 1 when anything was left behind."""
    import tempfile

    from benchmarks.gateway import make_tokenizer, served_model

    with tempfile.TemporaryDirectory() as scratch:
        make_tokenizer(Path(scratch))
        model = served_model(Path(scratch), max_context=1024)
    console = Console()
    with console.status("") as status:
        result = asyncio.run(leave(count, seed, model, lambda done: status.update(f"{done} of {count}")))
    table = Table("", "before", "after", title=f"{result['requests']} requests, seed {seed}")
    for name, value in result["before"].items():
        table.add_row(name, str(value), str(result["after"][name]))
    console.print(table)
    console.print(result["outcomes"])
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"hardware": hardware_record(), "result": result}, indent=2) + "\n")
    raise typer.Exit(bool(result["leaked"]))


if __name__ == "__main__":
    typer.run(main)
