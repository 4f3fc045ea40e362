"""``moestro status``: groups, ranks, load and KV use of a running cluster."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


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
        title = f"{group.name}  dp {group.dp} x tp {group.tp}  epoch {group.epoch}  spare ranks {group.spare_ranks}"
        table = Table(title=f"{title}  {group.activity}".rstrip(), title_justify="left")
        for name in ("rank", "state", "device"):
            table.add_column(name, no_wrap=True)
        for name in ("run", "wait", "KV blocks", "steps", "step ms", "MiB"):
            table.add_column(name, justify="right", no_wrap=True)
        for rank in group.ranks:
            table.add_row(
                rank.name.removeprefix(f"{group.name} rank "),
                f"{rank.state}, {rank.slowness:.1f} x slow" if rank.straggler else rank.state,
                rank.device,
                str(rank.num_running),
                str(rank.num_waiting),
                f"{rank.kv_blocks_used}/{rank.kv_blocks_total}",
                str(rank.num_steps),
                f"{rank.step_s * 1e3:.1f}",
                f"{rank.resident_bytes / 2**20:.0f}",
            )
        console.print(table)
    waiting = f", {cluster.queued_requests} of them waiting" if cluster.queued_requests else ""
    console.print(f"{cluster.open_streams} open streams at this gateway{waiting}", highlight=False)
