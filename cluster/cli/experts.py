"""``moestro experts``: where experts lie, what they compute, what the rebalancer decided; and moving them by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from moestro.protos.errors import ConfigError

if TYPE_CHECKING:
    from moestro.cluster.client_results import GroupExperts
    from moestro.protos.experts import LayerExperts
    from moestro.router.placement_file import Shape

app = typer.Typer(invoke_without_command=True)


@dataclass(frozen=True, slots=True)
class Target:
    """Whom a command is about."""

    address: str
    group: str


Address = Annotated[str, typer.Option(help="host:port of the gRPC interface.")]
Group = Annotated[str, typer.Option(help="A group's name; left out: every group.")]


@app.callback()
def experts(
    context: typer.Context,
    address: Address = "localhost:50051",
    group: Group = "",
    layer: Annotated[int | None, typer.Option(help="Every expert of this layer of the decoder.")] = None,
    decisions: Annotated[bool, typer.Option("--decisions", help="All that the rebalancer has decided.")] = False,
    as_json: Annotated[str | None, typer.Option("--json", help="Everything, for programs: a file, or -.")] = None,
    png: Annotated[Path | None, typer.Option(help="The heat map as a picture, in this file.")] = None,
) -> None:
    """Shows the load of every expert as a heat map, the ranks, and what the rebalancer decided. Subcommands move
    experts and save where they are."""
    if context.invoked_subcommand is not None:
        context.obj = Target(address, group)
        return
    groups = _ask(address, group)
    if png is not None:
        from moestro.cluster.cli.experts_figure import save_figure

        save_figure(groups, png)
    if as_json is not None:
        _write(as_json, json.dumps(to_json(groups), indent=2))
    if png is None and as_json is None:
        _show(groups, layer, decisions)


@app.command()
def move(
    context: typer.Context,
    even: Annotated[bool, typer.Option("--even", help="As a group starts: one copy each, spread evenly.")] = False,
    random: Annotated[int | None, typer.Option(help="At random, by this seed.", metavar="SEED", min=0)] = None,
    file: Annotated[Path | None, typer.Option("--from", help="As `moestro experts save` wrote it.")] = None,
    rebalance: Annotated[
        bool | None, typer.Option("--rebalance/--no-rebalance", help="Turn automatic rebalancing on or off.")
    ] = None,
    address: Annotated[str, typer.Option(help="As of `moestro experts`.")] = "",
    group: Annotated[str, typer.Option(help="As of `moestro experts`.")] = "",
) -> None:
    """Moves experts in the background, while the cluster serves."""
    from moestro.cluster.client import Client
    from moestro.protos.experts import PlacementRequest

    num_placements = even + (random is not None) + (file is not None)
    if num_placements > 1 or (not num_placements and rebalance is None):
        raise typer.BadParameter("give one of --even, --random SEED and --from FILE, or --rebalance/--no-rebalance")
    target = _target(context, address, group)
    with Client(target.address) as client:
        layers = None if file is None else _load(file, client.experts(target.group)[0])
        request = PlacementRequest(layers=layers, random_seed=random, even=even, rebalance=rebalance)
        names = ", ".join(client.set_placement(request, target.group))
    if num_placements:
        typer.echo(f"{names}: moving in the background; `moestro experts --decisions` tells how it goes")
    if rebalance is not None:
        typer.echo(f"{names}: automatic rebalancing {'on' if rebalance else 'off'}")


@app.command()
def save(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="Written or replaced.")],
    address: Annotated[str, typer.Option(help="As of `moestro experts`.")] = "",
    group: Annotated[str, typer.Option(help="Which, where there are several.")] = "",
) -> None:
    """Saves where a group's experts are, for `moestro experts move --from`."""
    from moestro.cluster.cli.experts_view import layers
    from moestro.router.placement import Placement
    from moestro.router.placement_file import save_placements

    target = _target(context, address, group)
    groups = _ask(target.address, target.group)
    if len(groups) > 1:
        names = ", ".join(each.name for each in groups)
        raise typer.BadParameter(f"one group a file; the cluster has {names}", param_hint="--group")
    shape, report = _shape(groups[0]), groups[0].report
    placements = [Placement(report.num_experts, layer.slots) for layer in report.layers]
    try:
        save_placements(file, shape, placements)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written: {error.strerror or error}") from None
    typer.echo(f"{groups[0].name}: {layers(len(placements))} in {file}")


def to_json(groups: Sequence[GroupExperts]) -> dict[str, Any]:
    """All of the reports, with each layer's balancedness."""
    found = []
    for group in groups:
        report = asdict(group.report)
        for fields, layer in zip(report["layers"], group.report.layers, strict=True):
            fields["balancedness"] = layer.balancedness
        found.append({"group": group.name, "epoch": group.epoch, **report})
    return {"groups": found}


def _ask(address: str, group: str) -> tuple[GroupExperts, ...]:
    from moestro.cluster.client import Client

    with Client(address) as client:
        return client.experts(group)


def _load(file: Path, group: GroupExperts) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """By mixture layer, rank and slot the expert. Raises ConfigError when the file is not for this model and shape."""
    from moestro.router.placement_file import load_placements

    return tuple(placement.slots for placement in load_placements(file, _shape(group)))


def _shape(group: GroupExperts) -> Shape:
    from moestro.router.placement_file import Shape

    report = group.report
    if not report.layers:
        raise ConfigError(f"{group.name}: {report.architecture} has no mixture layers, so there is no placement")
    num_ranks = len(report.layers[0].slots)
    return Shape(report.architecture, len(report.layers), report.num_experts, num_ranks, report.slots_per_rank)


def _show(groups: Sequence[GroupExperts], layer: int | None, ledger: bool) -> None:
    from moestro.cluster.cli import experts_view as view

    console = Console(highlight=False)
    for number, group in enumerate(groups):
        if number:
            console.print()
        if ledger:
            console.print(view.decisions(group))
        elif layer is not None:
            console.print(view.layer_table(_layer_of(group, layer), [rank.rank for rank in group.report.ranks]))
        else:
            console.print(view.overview(group, console.width))


def _layer_of(group: GroupExperts, number: int) -> LayerExperts:
    from moestro.cluster.cli.experts_view import ranges

    layers = {layer.layer: layer for layer in group.report.layers}
    if number not in layers:
        those = f"those with experts: {ranges(list(layers))}" if layers else "the model has no mixture layers"
        raise typer.BadParameter(f"layer {number} has no experts; {those}", param_hint="--layer")
    return layers[number]


def _target(context: typer.Context, address: str, group: str) -> Target:
    """What the subcommand was given, else what stood before it."""
    before: Target = context.obj
    return Target(address or before.address, group or before.group)


def _write(file: str, text: str) -> None:
    if file == "-":
        typer.echo(text)
        return
    try:
        Path(file).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written: {error.strerror or error}") from None
