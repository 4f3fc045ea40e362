"""``python -m benchmarks.chaos.soak``: load for a long time, a fault now and then, and nothing may grow.

One rank and one gateway are spared, so that they live through every epoch: what an epoch leaves behind shows there.
Judged is every process of ours that lived for ``JUDGED_S`` after its warm-up; Ray's own are only listed.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from benchmarks.chaos.memory import History, Watch, mb_per_minute, slope
from benchmarks.chaos.plan import Kind, faults
from benchmarks.chaos.plot import save_plot
from benchmarks.chaos.report import figures, is_good, table
from benchmarks.chaos.run import Experiment, Result, Settings
from benchmarks.chaos.served import Shape, served
from benchmarks.chaos.strikes import Seen, is_whole
from benchmarks.chaos.system import Role, System, Target
from benchmarks.hardware import hardware_record
from rich.console import Console
from rich.table import Table

WARM_UP_S = 120.0
JUDGED_S = 300.0
MOST_MB_PER_MINUTE = 0.1
KINDS = (Kind.KILL_RANK, Kind.STOP_RANK, Kind.SLOW_RANK, Kind.KILL_GATEWAY, Kind.KILL_DIRECTORY)
OURS = ("ray::Rank", "ray::ServeReplica:moestro", "moestro.cluster.cli.main")


@dataclass(frozen=True)
class Sparing:
    """A system of which the first rank and the first gateway are never hurt."""

    system: System

    @property
    def address(self) -> str:
        return self.system.address

    @property
    def num_ranks(self) -> int:
        return self.system.num_ranks

    def ranks_lost_with(self, role: Role) -> int:
        return self.system.ranks_lost_with(role)

    def targets(self, role: Role) -> Sequence[Target]:
        spared = 1 if role in (Role.RANK, Role.GATEWAY) else 0
        return self.system.targets(role)[spared:]

    def processes(self) -> Sequence[psutil.Process]:
        return self.system.processes()

    def partitioned(self, target: Target) -> AbstractContextManager[None]:
        return self.system.partitioned(target)

    def full_disk(self) -> AbstractContextManager[None]:
        return self.system.full_disk()


def growth(
    histories: Sequence[History], seen: Sequence[Seen], num_ranks: int, warm_up_s: float, judged_s: float
) -> list[dict[str, Any]]:
    """A row for each process, those that lived longest first. Only moments count in which all ranks served: the ranks
    of a group that has shrunk hold the experts of those that are missing."""
    rows = []
    for history in histories:
        warm = [each for each in history.after(warm_up_s) if is_whole(seen, each.at_s, num_ranks)]
        if not warm:
            continue
        rows.append(
            {
                "process": history.title,
                "minutes": (warm[-1].at_s - warm[0].at_s) / 60.0,
                "judged": warm[-1].at_s - warm[0].at_s >= judged_s and any(each in history.title for each in OURS),
                "mb": warm[-1].bytes / 1e6,
                "mb_per_minute": mb_per_minute(warm),
                "descriptors": [warm[0].descriptors, warm[-1].descriptors],
                "descriptors_per_minute": slope([(each.at_s / 60.0, each.descriptors) for each in warm]),
                "threads": [warm[0].threads, warm[-1].threads],
            }
        )
    return sorted(rows, key=lambda row: -row["minutes"])


async def soak(system: System, settings: Settings, pause_s: float, console: Console) -> tuple[Result, Watch]:
    """The experiment, watched."""
    plan = faults(settings.seed, KINDS, (pause_s, pause_s))
    experiment = Experiment(Sparing(system), settings, plan, lambda line: console.print(line, highlight=False))
    watch = Watch(system, experiment.clock)
    watching = asyncio.create_task(watch.run())
    try:
        return await experiment.run(), watch
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching


def main(
    seed: int = 0,
    minutes: Annotated[float, typer.Option(min=0.1)] = 60.0,
    pause_s: Annotated[float, typer.Option(help="From a whole cluster to the next fault.")] = 45.0,
    warm_up_s: float = WARM_UP_S,
    groups: int = 1,
    dp: int = 3,
    clients: int = 6,
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/soak.json"),
) -> None:
    """Ends with 1 when an answer was wrong or lost, or a process of ours grew by more than 0.1 MB a minute."""
    console = Console()
    shape = Shape(groups, dp, 1, gateways=2)
    settings = Settings(seed, clients, seconds=minutes * 60.0)
    with served(shape) as system:
        result, watch = asyncio.run(soak(system, settings, pause_s, console))
    rows = growth(list(watch.histories.values()), result.history, shape.num_ranks, warm_up_s, JUDGED_S)
    judged = [row for row in rows if row["judged"]]
    steady = bool(judged) and all(row["mb_per_minute"] <= MOST_MB_PER_MINUTE for row in judged)
    told = figures(result)
    console.print(table(told), _table(rows))
    results = {**told, "steady": steady, "processes": rows, "shared_memory_segments": _ends(watch)}
    record = {"hardware": hardware_record(), "settings": {**asdict(settings), **asdict(shape), "pause_s": pause_s,
              "warm_up_s": warm_up_s, "judged_s": JUDGED_S}, "results": results}  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=2) + "\n")
    save_plot(result, output.with_suffix(".png"), f"soak, seed {seed}, {minutes:g} minutes, dp {dp}")
    raise typer.Exit(0 if steady and is_good(result) else 1)


def _ends(watch: Watch) -> dict[str, int]:
    counts = [count for _, count in watch.segments]
    return {"first": counts[0], "last": counts[-1], "most": max(counts)} if counts else {}


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    shown = Table("process", "minutes", "MB", "MB/min", "descriptors", "threads", title="after the warm-up of each")
    for row in rows:
        ends = [f"{row[name][0]} to {row[name][1]}" for name in ("descriptors", "threads")]
        name = f"[bold]{row['process']}[/]" if row["judged"] else row["process"]
        shown.add_row(name, f"{row['minutes']:.1f}", f"{row['mb']:.0f}", f"{row['mb_per_minute']:+.3f}", *ends)
    return shown


if __name__ == "__main__":
    typer.run(main)
