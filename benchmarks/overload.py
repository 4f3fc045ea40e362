"""More load than there is room for: what is still served, how fast the rest is refused, and who gets what.

    python -m benchmarks.overload

A gateway and a rank, in processes of their own; the rank is the real one but for the model, whose steps take a given
time (``paced_rank``). Peak is the best of a closed loop of many clients and of every level, round by round. Each level
is an open loop with Poisson arrivals at so many times the closed loop's rate; every request has a deadline. Goodput
counts the tokens of requests that came to their end in time. Beside it the same gateway without admission: everything
goes to the rank's own line. ``filled`` is the share of the rank's seats that were taken in its steps, ``useful`` the
share that made goodput: neither depends on how fast this machine is meanwhile. In ``fairness`` one client keeps some
hundred requests open while another asks for one at a time.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from benchmarks.hardware import hardware_record
from benchmarks.paced_gateway import gateway_process, rank_process
from benchmarks.paced_rank import Pace
from benchmarks.rounds import spread
from rich.console import Console
from rich.table import Table

from moestro.cluster.edge.admission import GIVEN_UP
from moestro.cluster.edge.grpc_services import CLIENT_KEY
from moestro.cluster.edge.tickets import AdmissionLimits
from moestro.cluster.heap import freeze_heap
from moestro.protos.gen import inference_pb2 as pb

SEATS = 32
PACE = Pace(step_s=0.02)
OUTPUT = 16, 112  # tokens, evenly drawn
PROMPT = 16, 64
DEADLINE_S = 8.0
LIMITS = AdmissionLimits(max_queue_s=5.0)
WARM_S = 5.0  # of each level, not counted
PROBE_S = 0.02
FLOOD = 150  # requests that the flood keeps open
CALL = "/moestro.v1.InferenceService/Generate"
FACTORS = (1, 2, 5)


@dataclass(slots=True)
class Answer:
    """What became of one request; times since the start of its level."""

    sent_s: float
    first_s: float | None = None
    done_s: float = 0.0
    token_times_s: list[float] = field(default_factory=list)
    code: str = "OK"
    message: str = ""

    @property
    def was_let_in(self) -> bool:
        """And given up in the line, of one that was refused."""
        return self.message in GIVEN_UP.values()


class LoopDelay:
    """How late this process is woken: what it measures of others is late by as much."""

    def __init__(self) -> None:
        self.delays_s: list[float] = []

    async def sample(self) -> None:
        while True:
            due_s = time.perf_counter() + PROBE_S
            await asyncio.sleep(PROBE_S)
            self.delays_s.append(time.perf_counter() - due_s)


class Side:
    """One gateway and its rank, and connections to it."""

    def __init__(self, gateway: Connection, rank: Connection, address: str) -> None:
        self._gateway, self._rank, self._address = gateway, rank, address

    async def ask(self, channel: grpc.aio.Channel, draw: random.Random, start_s: float, client: str = "") -> Answer:
        """One request to its end."""
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=[draw.randrange(95) for _ in range(draw.randint(*PROMPT))]),
            sampling=pb.SamplingParams(seed=1),
            stop=pb.StopParams(max_tokens=draw.randint(*OUTPUT), ignore_eos=True),
        )
        answer = Answer(time.perf_counter() - start_s)
        metadata = ((CLIENT_KEY, client),) if client else ()
        try:
            call = channel.unary_stream(CALL)(request.SerializeToString(), timeout=DEADLINE_S, metadata=metadata)
            async for _ in call:
                answer.token_times_s.append(time.perf_counter() - start_s)
        except grpc.aio.AioRpcError as error:
            answer.code, answer.message = error.code().name, error.details() or ""
        answer.done_s = time.perf_counter() - start_s
        return answer

    @property
    def channel(self) -> Any:
        return grpc.aio.insecure_channel(self._address, options=[("grpc.use_local_subchannel_pool", 1)])

    def observe(self) -> tuple[int, dict[str, int], int, list[tuple[float, int]]]:
        """Resident bytes of the gateway, refusals by reason; since the last time the rank's prefilled sequences and its
        steps."""
        self._gateway.send("observe")
        resident, refused = self._gateway.recv()
        self._rank.send("observe")
        return resident, refused, *self._rank.recv()


@contextmanager
def side(has_admission: bool) -> Iterator[Side]:
    context = multiprocessing.get_context("spawn")
    rank, far_rank = context.Pipe()
    gateway, far_gateway = context.Pipe()
    processes = [context.Process(target=rank_process, args=(far_rank, SEATS, PACE), daemon=True)]
    processes[0].start()
    arguments = (far_gateway, rank.recv(), LIMITS, has_admission)
    processes.append(context.Process(target=gateway_process, args=arguments, daemon=True))
    processes[1].start()
    try:
        yield Side(gateway, rank, gateway.recv())
    finally:
        gateway.send(None)
        rank.send(None)
        for process in processes:
            process.join(20)


async def closed_loop(it: Side, seed: int, seconds: float) -> list[Answer]:
    """Twice as many clients as seats, each asking again as soon as it has its answer."""
    draw, answers, start_s = random.Random(seed), list[Answer](), time.perf_counter()
    async with it.channel as channel:

        async def client() -> None:
            while time.perf_counter() - start_s < seconds:
                answers.append(await it.ask(channel, draw, start_s))

        await asyncio.gather(*(client() for _ in range(2 * SEATS)))
    return answers


async def open_loop(it: Side, seed: int, seconds: float, rate: float) -> list[Answer]:
    """Poisson arrivals; returns when all have ended."""
    draw, start_s, due_s = random.Random(seed), time.perf_counter(), 0.0
    async with it.channel as channel, asyncio.TaskGroup() as group:
        tasks = []
        while (due_s := due_s + draw.expovariate(rate)) < seconds:
            await asyncio.sleep(max(0.0, start_s + due_s - time.perf_counter()))
            tasks.append(group.create_task(it.ask(channel, draw, start_s, f"client-{draw.randrange(8)}")))
    return [task.result() for task in tasks]


async def fairness(it: Side, seed: int, seconds: float) -> dict[str, float]:
    """First tokens of a client that asks for one thing after the other, beside one that floods."""
    start_s, polite = time.perf_counter(), list[Answer]()
    async with it.channel as channel:

        async def client(name: str, number: int) -> None:
            draw = random.Random(f"{seed} {name} {number}")
            await asyncio.sleep(number / FLOOD)
            while time.perf_counter() - start_s < seconds:
                answer = await it.ask(channel, draw, start_s, name)
                if name == "polite":
                    polite.append(answer)
                if answer.code != "OK":
                    await asyncio.sleep(0.2)

        await asyncio.gather(client("polite", 0), *(client("flood", i) for i in range(FLOOD)))
    served = [a.token_times_s[0] - a.sent_s for a in polite if a.code == "OK" and a.sent_s > WARM_S]
    tokens = sum(len(a.token_times_s) for a in polite if a.code == "OK")
    return {
        "polite_first_token_p50_s": statistics.median(served) if served else float("nan"),
        "polite_first_token_max_s": max(served, default=float("nan")),
        "polite_tokens_per_s": tokens / seconds,
        "polite_failed": sum(a.code != "OK" for a in polite),
    }


def goodput(answers: list[Answer], seconds: float) -> float:
    """Tokens a second of requests that came to their end, from WARM_S on."""
    times = [time_s for each in answers if each.code == "OK" for time_s in each.token_times_s]
    return sum(WARM_S < time_s <= seconds for time_s in times) / (seconds - WARM_S)


async def beside(delay: LoopDelay, work: Awaitable[list[Answer]]) -> list[Answer]:
    sampling = asyncio.create_task(delay.sample())
    try:
        return await work
    finally:
        sampling.cancel()


def level(it: Side, seconds: float, run: Callable[[], Awaitable[list[Answer]]]) -> dict[str, float]:
    it.observe()
    start_s, delay = time.perf_counter(), LoopDelay()
    answers = asyncio.run(beside(delay, run()))
    resident, _, prefilled, steps = it.observe()
    taken = [count for time_s, count in steps if WARM_S < time_s - start_s <= seconds]
    refused = [a for a in answers if a.code == "RESOURCE_EXHAUSTED"]
    refusals = sorted(a.done_s - a.sent_s for a in refused if not a.was_let_in)
    useful = goodput(answers, seconds) * (seconds - WARM_S)
    completed = sum(a.code == "OK" for a in answers)
    return {
        "goodput": goodput(answers, seconds),
        "filled": sum(taken) / (SEATS * len(taken)),
        "useful": useful / (SEATS * len(taken)),
        "requests": len(answers),
        "completed": completed,
        "refused_on_arrival": len(refusals),
        "given_up_in_line": len(refused) - len(refusals),
        "deadline_passed": sum(a.code == "DEADLINE_EXCEEDED" for a in answers),
        "prefilled_in_vain": prefilled - completed,
        "refusal_p50_ms": 1e3 * refusals[len(refusals) // 2] if refusals else 0.0,
        "refusal_p99_ms": 1e3 * refusals[int(len(refusals) * 0.99)] if refusals else 0.0,
        "loop_delay_p99_ms": 1e3 * sorted(delay.delays_s)[int(len(delay.delays_s) * 0.99)],
        "resident_mb": resident / 1e6,
    }


def one_round(with_it: Side, without: Side, seed: int, seconds: float) -> dict[str, float]:
    closed = asyncio.run(closed_loop(with_it, seed, seconds))
    row = {"closed_loop": goodput(closed, seconds)}
    rate = row["closed_loop"] / statistics.mean(OUTPUT)
    for factor in FACTORS:
        for name, it in (("", with_it), ("fifo_", without)):
            run = lambda it=it, factor=factor: open_loop(it, seed, seconds, factor * rate)  # noqa: E731
            row |= {f"{name}{factor}x_{key}": value for key, value in level(it, seconds, run).items()}
    for name, it in (("", with_it), ("fifo_", without)):
        row |= {f"{name}{key}": value for key, value in asyncio.run(fairness(it, seed, seconds)).items()}
    peak = max(value for key, value in row.items() if key.endswith("goodput") or key == "closed_loop")
    most = max(value for key, value in row.items() if key.endswith("useful"))
    row |= {f"{factor}x_useful_of_most": row[f"{factor}x_useful"] / most for factor in FACTORS}
    row |= {f"{factor}x_of_peak": row[f"{factor}x_goodput"] / peak for factor in FACTORS}
    row |= {f"fifo_{factor}x_of_peak": row[f"fifo_{factor}x_goodput"] / peak for factor in FACTORS}
    return row | {"peak": peak}


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of all levels.")] = 3,
    seconds: Annotated[float, typer.Option(min=6, help="Of each level.")] = 20.0,
    seed: int = 0,
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/overload.json"),
) -> None:
    """Goodput, refusals, memory and fairness; median and range over rounds."""
    freeze_heap()  # refusals cannot be seen while the one who measures collects garbage
    with ExitStack() as stack:
        with_it, without = stack.enter_context(side(True)), stack.enter_context(side(False))
        rows = [one_round(with_it, without, seed + number, seconds) for number in range(rounds)]
        refused = with_it.observe()[1]
    results = spread(rows)
    table = Table("figure", "admission", "range", "the ranks' own line", title=f"{SEATS} seats, {rounds} rounds")
    for name, figure in results.items():
        if not name.startswith("fifo_"):
            other = results.get(f"fifo_{name}")
            values = f"{figure['median']:.3g}", f"{figure['min']:.3g} to {figure['max']:.3g}"
            table.add_row(name, *values, f"{other['median']:.3g}" if other else "")
    Console().print(table)
    settings = {
        "rounds": rounds,
        "seconds": seconds,
        "seed": seed,
        "seats": SEATS,
        "step_s": PACE.step_s,
        "output_tokens": OUTPUT,
        "prompt_tokens": PROMPT,
        "deadline_s": DEADLINE_S,
        "max_queue_s": LIMITS.max_queue_s,
        "flood": FLOOD,
    }
    report = {"hardware": hardware_record(), "settings": settings, "refused": refused, "results": results}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
