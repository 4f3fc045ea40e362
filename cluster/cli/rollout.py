"""``moestro scale`` and ``moestro update``: changing a cluster that serves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from moestro.cluster.cli.changes import changes
from moestro.cluster.config import Config
from moestro.cluster.directory import GroupEntry
from moestro.protos.errors import ConfigError

RayAddress = Annotated[
    str, typer.Option(help="The cluster's Ray, as the ready line tells it; auto: the one on this machine.")
]


def scale(
    groups: Annotated[int | None, typer.Option(help="Copies of the model.")] = None,
    gateways: Annotated[int | None, typer.Option(help="Gateway processes.")] = None,
    ray_address: RayAddress = "auto",
) -> None:
    """Changes the number of groups or gateways of a running cluster. What leaves drains first."""
    from moestro.cluster.serving.rollout import connected

    if groups is None and gateways is None:
        raise ConfigError("nothing to change: give --groups or --gateways")
    console = Console(stderr=True)
    with connected(ray_address) as cluster:
        console.print(_size(cluster.scale(groups, gateways, _tell(console))), highlight=False)


def update(
    file: Annotated[
        Path | None, typer.Option("--config", help="TOML file of what is to change. Left out: a restart of all.")
    ] = None,
    ray_address: RayAddress = "auto",
) -> None:
    """Replaces every gateway and group of a running cluster, one at a time, while it serves."""
    from moestro.cluster.serving.rollout import connected

    console = Console(stderr=True)
    with connected(ray_address) as cluster:
        console.print(f"updated: {_size(cluster.update(file, _tell(console)))}", highlight=False)


def _tell(console: Console) -> Callable[[tuple[GroupEntry, ...]], None]:
    """Prints what has changed since the call before."""
    known: tuple[GroupEntry, ...] | None = None

    def tell(groups: tuple[GroupEntry, ...]) -> None:
        nonlocal known
        for line in changes(groups if known is None else known, groups):
            console.print(line, highlight=False, soft_wrap=True)
        known = groups

    return tell


def _size(config: Config) -> str:
    cluster = config.cluster
    groups, gateways = _number(cluster.groups, "group"), _number(cluster.gateways, "gateway")
    return f"{groups} of dp {cluster.dp} x tp {cluster.tp}, {gateways}"


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"
