"""``moestro incidents``: requests that are not tried again, since ranks died each time they ran."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from moestro.cluster.client_results import Incident


def incidents(
    name: Annotated[str, typer.Argument(help="One of them, as an error named it; left out: all that are kept.")] = "",
    address: Annotated[str, typer.Option(help="host:port of the gateway that quarantined it.")] = "localhost:50051",
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Shows quarantined requests: what was asked, how far it came, and which ranks died. Prompts are not kept: the
    request's id and digest find it in the client's own logs."""
    from moestro.cluster.client import Client

    with Client(address) as client:
        found = client.incidents(name)
    console = Console(highlight=False)
    if as_json:
        typer.echo(json.dumps([asdict(incident) for incident in found], indent=2))
    elif name:
        for incident in found:
            console.print(_described(incident))
    elif found:
        console.print(_listed(found))
    else:
        console.print("no request is quarantined at this gateway")


def _listed(found: tuple[Incident, ...]) -> Table:
    table = Table("incident", "request", "model", "ranks that died")
    for column in ("age", "prompt", "output"):
        table.add_column(column, justify="right", no_wrap=True)
    for incident in found:
        ranks = ", ".join(death.rank for death in incident.deaths)
        output = str(sum(incident.output_tokens))
        table.add_row(
            incident.name,
            incident.request_id,
            incident.model,
            ranks,
            _ago(incident.age_s),
            str(incident.prompt_tokens),
            output,
        )
    return table


def _described(incident: Incident) -> Table:
    table = Table(title=incident.name, title_justify="left", show_header=False)
    table.add_row("request", incident.request_id)
    table.add_row("model", incident.model)
    table.add_row("digest", incident.digest)
    table.add_row("prompt", f"{incident.prompt_tokens} tokens")
    table.add_row("output", f"{', '.join(map(str, incident.output_tokens))} of {incident.max_tokens} tokens, by choice")
    table.add_row("sampling", ", ".join(f"{key} {value:g}" for key, value in incident.sampling.items()))
    table.add_row("seed", str(incident.seed))
    for death in incident.deaths:
        table.add_row("died", f"{death.rank}, {_ago(death.age_s)} ago: {death.reason}")
    return table


def _ago(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
