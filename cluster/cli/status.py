"""``moestro status``: groups, ranks, load and KV use of a running cluster."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moestro.cluster.client_results import GroupStatus

_STYLES = {"serving": "green", "starting": "cyan", "draining": "yellow", "lost": "bold red"}


def status(
    address: Annotated[str, typer.Option(help="host:port of the gRPC interface.")] = "localhost:50051",
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Shows the groups and ranks of a running cluster: state, load and KV use."""
    from moestro.cluster.client import Client

    with Client(address) as client:
        cluster = client.status()
    if as_json:
        typer.echo(json.dumps(asdict(cluster), indent=2, default=str))
        return
    console = Console()
    for group in cluster.groups:
        console.print(_table(group))
    waiting = f", {cluster.queued_requests} of them waiting" if cluster.queued_requests else ""
    console.print(f"{cluster.open_streams} open streams at this gateway{waiting}", highlight=False)


def _table(group: GroupStatus) -> Table:
    """A row a rank, under what the group is and does."""
    title = Text(f"{group.name}  dp {group.dp} x tp {group.tp}  epoch {group.epoch}  {_spare(group.spare_ranks)}")
    if group.activity:
        title.append(f"\n{group.activity}", style="yellow")
    table = Table(title=title, title_justify="left")
    for name in ("rank", "state", "device"):
        table.add_column(name, no_wrap=True)
    for name in ("run", "wait", "KV blocks", "steps", "step ms", "MiB"):
        table.add_column(name, justify="right", no_wrap=True)
    for rank in group.ranks:
        slow = f", {rank.slowness:.1f} x slow" if rank.straggler else ""
        table.add_row(
            rank.name.removeprefix(f"{group.name} rank "),
            Text(rank.state + slow, style="yellow" if slow else _STYLES.get(rank.state, "")),
            rank.device,
            str(rank.num_running),
            str(rank.num_waiting),
            f"{rank.kv_blocks_used}/{rank.kv_blocks_total}",
            str(rank.num_steps),
            f"{rank.step_s * 1e3:.1f}",
            f"{rank.resident_bytes / 2**20:.0f}",
        )
    return table


def _spare(ranks: int) -> str:
    return f"can lose {ranks} more rank{'s' * (ranks != 1)}" if ranks else "can lose no rank"
