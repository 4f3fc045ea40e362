"""A report in words: a table for people, JSON for programs."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from moestro.cluster.verify.run import Report, Row


def render(report: Report) -> RenderableType:
    """The table of perturbations, then the first differences, then what was proved."""
    where = f", baseline on {report.home}" if report.home else ""
    table = Table(
        title=f"{report.model} ({report.architecture}, {report.dtype}), seed {report.seed}{where}",
        title_justify="left",
    )
    table.add_column("perturbation", no_wrap=True)
    for name in ("requests", "tokens", "logprobs", "hidden states"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("result")
    for row in report.rows:
        if row.compared is None:
            table.add_row(row.perturbation, "", "", "", "", f"[dim]not applicable: {escape(row.note)}[/]")
            continue
        compared = row.compared
        counts = (row.num_requests, compared.tokens, compared.logprobs, compared.hidden_states)
        verdict = "[green]equal[/]" if row.is_equal else f"[bold red]{row.num_different} different[/]"
        result = f"{verdict}: {escape(row.note)}" if row.note else verdict
        table.add_row(row.perturbation, *(f"{count:,}" for count in counts), result)
    differences = [
        f"[bold red]{row.perturbation}[/]: {escape(str(row.compared.difference))}"
        for row in report.rows
        if row.compared is not None and row.compared.difference is not None
    ]
    return Group(table, *differences, escape(summary(report)))


def summary(report: Report) -> str:
    """What was proved and what was not, in one or two sentences."""
    equal = [row.perturbation for row in report.applied if row.is_equal]
    unequal = [row.perturbation for row in report.applied if not row.is_equal]
    skipped = [row.perturbation for row in report.rows if row.compared is None]
    if not report.applied:
        said = ["Nothing was compared."]
    elif unequal:
        said = [f"The answers depend on the cluster: they differ under {', '.join(unequal)}."]
    else:
        said = [
            f"{report.num_requests} requests were answered with the same tokens, log probabilities and endings, "
            f"bit for bit, under: {', '.join(equal)}."
        ]
        if not any(row.compared is not None and row.compared.hidden_states for row in report.rows):
            said.append("Hidden states were not compared: the server reports none.")
    if skipped:
        said.append(f"Not applicable, and so not proved: {', '.join(skipped)}.")
    return " ".join(said)


def to_json(report: Report) -> str:
    """Everything, for programs."""
    return json.dumps(
        {
            "model": report.model,
            "architecture": report.architecture,
            "dtype": report.dtype,
            "home": report.home,
            "seed": report.seed,
            "requests": report.num_requests,
            "equal": report.is_equal,
            "summary": summary(report),
            "perturbations": [_json_row(row) for row in report.rows],
        },
        indent=2,
    )


def _json_row(row: Row) -> dict[str, object]:
    told: dict[str, object] = {"perturbation": row.perturbation, "applies": row.compared is not None, "note": row.note}
    if row.compared is not None:
        told |= {
            "equal": row.is_equal,
            "requests": row.num_requests,
            "different": row.num_different,
            **asdict(row.compared),
        }
    return told
