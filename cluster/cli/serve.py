"""``moestro serve``: a cluster in the foreground, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from moestro.cluster.cli.changes import changes
from moestro.cluster.cli.progress import LoadingProgress
from moestro.cluster.config import Config, load_config

if TYPE_CHECKING:
    from moestro.cluster.serving.launch import Running

WATCH_RETRY_S = 1.0


def serve(
    model: Annotated[
        Path | None, typer.Argument(help="Checkpoint folder in the Hugging Face layout. Left out: the bundled demo.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name clients see; default: the folder's.")] = None,
    dp: Annotated[int | None, typer.Option(help="Data-parallel ranks of a group.")] = None,
    tp: Annotated[int | None, typer.Option(help="Tensor-parallel ranks of each of them.")] = None,
    groups: Annotated[int | None, typer.Option(help="Copies of the model.")] = None,
    gateways: Annotated[int | None, typer.Option(help="Gateway processes.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="gRPC port; default 50051.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    ray_address: Annotated[str | None, typer.Option(help="An existing Ray cluster, e.g. auto or host:6379.")] = None,
    file: Annotated[Path | None, typer.Option("--config", help="TOML file; see `moestro config`.")] = None,
) -> None:
    """Starts a cluster and serves a checkpoint over gRPC, in the foreground. Ctrl-C or SIGTERM stops everything."""
    settings = load_config(
        file,
        {
            "model": {"path": model, "name": name},
            "cluster": {"dp": dp, "tp": tp, "groups": groups, "gateways": gateways, "ray_address": ray_address},
            "server": {"host": host, "port": port},
            "rank": {"device": device},
        },
    )
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(name)s: %(message)s")
    _serve(settings, Console(stderr=True))


def _serve(config: Config, console: Console) -> None:
    from moestro.cluster.serving.launch import running_cluster
    from moestro.cluster.serving.rank_spec import rank_spec
    from moestro.workers.checkpoint import check_tokenizer, open_checkpoint
    from moestro.workers.rebalancing.setup import start_placements

    # What cannot be served is refused before anything is started.
    checkpoint = open_checkpoint(config.model.path)
    check_tokenizer(config.model.path)
    start_placements(rank_spec(config).experts, checkpoint.config, config.cluster.dp * config.cluster.tp)
    _interrupt_once()
    try:
        with LoadingProgress(console) as progress, running_cluster(config, progress.show) as running:
            progress.stop()
            console.print(
                ready_line(config, running.addresses, running.dashboard, running.ray_address),
                highlight=False,
                soft_wrap=True,
            )
            _tell_changes(running, console)
    except KeyboardInterrupt:
        console.print("stopped", highlight=False)
        os._exit(0)  # all is down; unloading Ray and torch would take another second or two


def _tell_changes(running: Running, console: Console) -> NoReturn:
    """One line for every group that comes or goes, for as long as the process lives."""
    version, known = -1, running.groups
    while True:
        try:
            snapshot = running.watch(version)
        except Exception:  # the directory is being replaced
            version = -1
            time.sleep(WATCH_RETRY_S)
            continue
        groups = snapshot.over(known)
        for line in changes(known, groups):
            console.print(line, highlight=False, soft_wrap=True)
        version, known = snapshot.version, groups


def _interrupt_once() -> None:
    """SIGTERM means what Ctrl-C means; once stopping, further signals must not cut it short."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, interrupt)


def ready_line(config: Config, addresses: Sequence[str], dashboard: str, ray_address: str) -> str:
    """What a person needs to make the first call, and to change the cluster."""
    cluster, address = config.cluster, addresses[0]
    ranks = f"{cluster.groups} group{'s' * (cluster.groups > 1)} of dp {cluster.dp} x tp {cluster.tp}"
    lines = [
        f"[bold green]ready[/]  {escape(config.model.served_name)} on {escape(', '.join(addresses))}, {ranks}",
        f'  moestro generate --address {escape(address)} "def fibonacci(n):"',
        f"  python -c 'from moestro.cluster.client import Client; "
        f'print(Client("{escape(address)}").generate("def fibonacci(n):").text)\'',
    ]
    if dashboard:
        lines.append(f"  dashboard  http://{escape(dashboard)}  (--ray-address {escape(ray_address)})")
    lines.append("  Ctrl-C stops everything")
    return "\n".join(lines)
