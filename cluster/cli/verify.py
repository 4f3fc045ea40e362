"""``moestro verify``: whether the answers of a running cluster depend on how they are served."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer
from rich.console import Console

from moestro.cluster.verify.report import render, to_json
from moestro.cluster.verify.run import Report, choose
from moestro.protos.errors import ConfigError


def verify(
    address: Annotated[str, typer.Option(help="host:port of the gRPC interface.")] = "localhost:50051",
    model: Annotated[str, typer.Option(help="Model name; may be left out when one model is served.")] = "",
    requests: Annotated[
        int, typer.Option(min=1, max=512, help="Requests in the suite; each is asked many times.")
    ] = 16,
    seed: Annotated[int, typer.Option(help="The same seed asks the same.")] = 0,
    perturbation: Annotated[
        list[str] | None,
        typer.Option(help="Only this one, such as crowd or chunked; may be given several times. Left out: all."),
    ] = None,
    timeout: Annotated[float, typer.Option(min=1.0, help="Give up on a request after so many seconds.")] = 300.0,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Proves on a running cluster that answers do not depend on it.

    Asks a seeded suite of requests, first one by one, then again in a crowd, in
    other chunks, preempted, on other ranks and while experts move, and compares
    tokens, log probabilities and hidden states bit for bit. Exit code 0: all equal.
    """
    try:
        names = choose(perturbation or ())
    except ConfigError as error:
        raise typer.BadParameter(str(error), param_hint="--perturbation") from None
    report = asyncio.run(_verify(address, model, requests, seed, names, timeout))
    if as_json:
        typer.echo(to_json(report))
    else:
        Console().print(render(report), highlight=False)
    raise typer.Exit(0 if report.is_equal else 1)


async def _verify(
    address: str, model: str, requests: int, seed: int, names: tuple[str, ...], timeout_s: float
) -> Report:
    # Imported here, so that help needs no gRPC.
    from moestro.cluster.verify.grpc_target import GrpcTarget
    from moestro.cluster.verify.run import verify

    with Console(stderr=True).status("connecting") as shown:
        async with GrpcTarget(address, model, timeout_s) as target:
            return await verify(target, requests, seed, names, shown.update)
