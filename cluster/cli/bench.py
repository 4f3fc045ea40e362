"""``moestro bench``: how fast a running server answers, and how fast under load."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from moestro.cluster.bench import options
from moestro.cluster.bench.plan import Plan, choose_extent, choose_lengths, choose_load
from moestro.cluster.bench.plot import save_plot
from moestro.cluster.bench.records import RequestRecord
from moestro.cluster.bench.report import Report, from_json, to_json
from moestro.cluster.bench.run import run_plan
from moestro.cluster.bench.slo import parse_slo
from moestro.cluster.bench.table import render_comparison, render_report
from moestro.cluster.bench.target import Target, TargetError
from moestro.cluster.bench.trace import parse_trace
from moestro.protos.errors import ConfigError

_WHAT, _LOAD, _OUT = "What is asked", "How it is sent", "What is shown and kept"


def bench(
    address: Annotated[str, typer.Option(help="host:port of the gRPC interface.")] = "localhost:50051",
    model: Annotated[str, typer.Option(help="Model name; may be left out when one model is served.")] = "",
    input_: Annotated[
        str | None,
        typer.Option(
            "--input",
            rich_help_panel=_WHAT,
            help="Prompt tokens: 128 (default), uniform:min=16,max=512, normal:mean=128,std=32 or "
            "lognormal:mean=128,cv=1; normal and lognormal also take min and max.",
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option(rich_help_panel=_WHAT, help="Output tokens, in the same words; 64 by default.")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=_WHAT,
            help="JSON Lines of input_tokens, output_tokens and optionally arrival_s; instead of --input and --output.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(rich_help_panel=_WHAT, help="Text file, a prompt a line, instead of random token ids."),
    ] = None,
    ignore_eos: Annotated[
        bool,
        typer.Option("--ignore-eos/--honour-eos", rich_help_panel=_WHAT, help="Exact output lengths, or early ends."),
    ] = True,
    temperature: Annotated[float, typer.Option(rich_help_panel=_WHAT, help="0 is greedy.")] = 0.0,
    seed: Annotated[
        int, typer.Option(rich_help_panel=_WHAT, help="The same seed asks the same at the same times.")
    ] = 0,
    rate: Annotated[
        float | None,
        typer.Option(rich_help_panel=_LOAD, help="Open loop: requests/s, Poisson; inf sends all at once."),
    ] = None,
    cv: Annotated[
        float, typer.Option(rich_help_panel=_LOAD, help="Variation of the gaps: 0 even, 1 Poisson, above 1 bursts.")
    ] = 1.0,
    concurrency: Annotated[
        int | None, typer.Option(rich_help_panel=_LOAD, help="Closed loop: requests in flight; 4 without --rate.")
    ] = None,
    requests: Annotated[
        int | None, typer.Option(rich_help_panel=_LOAD, help="Requests a round; 64 by default.")
    ] = None,
    duration: Annotated[
        str | None, typer.Option(rich_help_panel=_LOAD, help="Stop sending after this long (30s, 2m).")
    ] = None,
    warmup: Annotated[int, typer.Option(rich_help_panel=_LOAD, help="Requests before each round, not counted.")] = 4,
    rounds: Annotated[int, typer.Option(rich_help_panel=_LOAD, help="Rounds, each with its own seed.")] = 1,
    timeout: Annotated[str, typer.Option(rich_help_panel=_LOAD, help="Give up on a request after this long.")] = "10m",
    channels: Annotated[int, typer.Option(rich_help_panel=_LOAD, help="Connections that requests share.")] = 4,
    slo: Annotated[
        str | None, typer.Option(rich_help_panel=_OUT, help="Objective for goodput, such as ttft=500ms,tpot=50ms.")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", rich_help_panel=_OUT, help="Save the report.")] = None,
    records: Annotated[
        bool, typer.Option("--records/--no-records", rich_help_panel=_OUT, help="Keep every timeline in the JSON.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(rich_help_panel=_OUT, help="Save a picture (PNG, SVG, PDF).")] = None,
    compare: Annotated[Path | None, typer.Option(rich_help_panel=_OUT, help="A saved report to compare with.")] = None,
    show: Annotated[
        Path | None, typer.Option(rich_help_panel=_OUT, help="Show a saved report instead of running anything.")
    ] = None,
) -> None:
    """Measure a running server: latency, throughput and goodput under a described load.

    Latencies of an open loop (--rate) count from when a request was due.
    Without --rate, a fixed number of requests is kept in flight (--concurrency):
    that measures throughput but hides queueing.
    """
    try:
        base = _load("--compare", compare) if compare is not None else None
        _check_outputs(json_path, plot)
        if show is not None:
            report = _load("--show", show)
        else:
            recorded = parse_trace("--trace", _read("--trace", trace).splitlines()) if trace is not None else None
            load = choose_load(rate, cv, concurrency, recorded)
            inputs, outputs = choose_lengths(input_, output, recorded, prompts is not None)
            duration_s = options.seconds("--duration", duration) if duration is not None else None
            plan = Plan(
                load=load,
                extent=choose_extent(requests, duration_s, load),
                input=inputs,
                output=outputs,
                lines=_lines("--prompts", prompts) if prompts is not None else (),
                warmup=warmup,
                rounds=rounds,
                seed=seed,
                ignore_eos=ignore_eos,
                temperature=temperature,
                timeout_s=options.seconds("--timeout", timeout),
                slo=parse_slo("--slo", slo) if slo is not None else None,
                sources=tuple(_digest(path) for path in (trace, prompts) if path is not None),
            )
            options.within("--channels", channels, 1, 256)
            report = asyncio.run(_measure(plan, address, model, channels))
        console = Console()
        console.print(render_report(report))
        if base is not None:
            console.print(render_comparison(base, report))
        if json_path is not None:
            json_path.write_text(to_json(report, with_records=records))
        if plot is not None:
            save_plot(report, plot)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from None
    except TargetError as error:
        typer.echo(f"no answer from {address}: {error}", err=True)
        raise typer.Exit(1) from None


async def _measure(plan: Plan, address: str, model: str, channels: int) -> Report:
    # Imported here, so that looking at saved reports needs no gRPC.
    from moestro.cluster.bench.grpc_target import GrpcTarget

    target: Target = GrpcTarget(address, model, channels)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        # Redrawn rarely: the drawing thread competes with the measurement for Python's lock.
        with Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=2) as progress:
            phases: list[TaskID] = []

            def on_phase(name: str, total: int | None) -> None:
                phases.append(progress.add_task(name, total=total))

            def on_record(_: RequestRecord) -> None:
                progress.advance(phases[-1])

            return await run_plan(plan, target, on_phase=on_phase, on_record=on_record)
    finally:
        await target.close()


def _read(option: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option} cannot be read: {error}") from None


def _lines(option: str, path: Path) -> tuple[str, ...]:
    return tuple(line for line in _read(option, path).splitlines() if line.strip())


def _load(option: str, path: Path) -> Report:
    return from_json(option, _read(option, path))


def _digest(path: Path) -> str:
    """The file's name and content, not its place: a report must not tell where somebody keeps things."""
    return f"{path.name} sha256:{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"


def _check_outputs(*paths: Path | None) -> None:
    """A long run must not fail at its end because a folder is missing."""
    for path in paths:
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"the folder of {path} must exist")
