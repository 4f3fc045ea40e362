"""``python -m benchmarks.gpu_suite``: the engine on one GPU, checked and measured, in one call and one JSON."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from benchmarks.gpu_suite.checks import Settings
from benchmarks.gpu_suite.driver import Outcome, in_process_of_its_own, in_this_process, run_suite
from benchmarks.gpu_suite.parts import PARTS
from benchmarks.hardware import hardware_record
from rich.console import Console
from rich.table import Table

_STYLE = {"passed": "green", "failed": "bold red", "skipped": "bold yellow", "omitted": "dim"}


class Device(StrEnum):
    cuda = "cuda"
    cpu = "cpu"


def main(
    device: Annotated[Device, typer.Option(help="cpu runs the same code; its figures mean nothing.")] = Device.cuda,
    small: Annotated[bool, typer.Option("--small", help="Every part in seconds, on tiny models.")] = False,
    parts: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(PARTS)}.")] = ",".join(PARTS),
    output: Annotated[Path, typer.Option(help="The JSON file.")] = Path("benchmarks/results/gpu_suite.json"),
    commit: Annotated[str, typer.Option(help="The commit under test, where git cannot tell.")] = "",
    budget: Annotated[
        float, typer.Option(min=1, help="Seconds for all parts; later ones are skipped, which fails.")
    ] = 540.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    isolate: Annotated[bool, typer.Option(help="A process for each part.")] = True,
) -> None:
    """Checks and measures the engine on one device. Exit status 1 when anything failed or was skipped."""
    names = [name.strip() for name in parts.split(",") if name.strip()]
    unknown = [name for name in names if name not in PARTS]
    if unknown or not names:
        raise typer.BadParameter(f"parts must be of {', '.join(PARTS)}, not {', '.join(unknown) or 'none'}")
    if device is Device.cpu and not small and any(name.startswith(("speed", "layers")) for name in names):
        raise typer.BadParameter("speed and layers on a cpu need --small: the whole model has 30 billion parameters")
    hardware = hardware_record()
    head = {"hardware": hardware, "commit": commit or hardware["commit"], "budget_s": budget, "isolated": isolate}
    console = Console()
    outcomes: list[Outcome] = []

    def tell(outcome: Outcome) -> None:
        outcomes.append(outcome)
        failed = [check for check in outcome.checks if check["status"] == "failed"]
        console.print(f"{outcome.part}: [{_STYLE[outcome.status]}]{outcome.status}[/] in {outcome.seconds:.1f} s")
        for check in failed:
            console.print(f"  {check['name']}: {check.get('reason')}", markup=False)
        if outcome.reason:
            console.print(f"  {outcome.reason}", markup=False)

    passed = run_suite(
        names,
        Settings(device.value, small, seed),
        head,
        output,
        budget_s=budget,
        run_part=in_process_of_its_own if isolate else in_this_process,
        tell=tell,
    )
    console.print(table(outcomes))
    console.print(f"{'passed' if passed else 'FAILED'}; written to {output}", markup=False)
    raise typer.Exit(0 if passed else 1)


def table(outcomes: list[Outcome]) -> Table:
    """One row a check."""
    rows = Table("part", "check", "outcome", "figure or reason", title="gpu_suite")
    for outcome in outcomes:
        for check in outcome.checks:
            text = check.get("reason") or check.get("values", {}).get("headline", "")
            rows.add_row(outcome.part, check["name"], f"[{_STYLE[check['status']]}]{check['status']}[/]", text)
        if outcome.reason:
            rows.add_row(outcome.part, "", f"[{_STYLE[outcome.status]}]{outcome.status}[/]", outcome.reason)
    return rows


if __name__ == "__main__":
    typer.run(main)
