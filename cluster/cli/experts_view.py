"""What ``moestro experts`` shows in the terminal, from a report."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moestro.cluster.cli.heat_map import heat_row, legend
from moestro.cluster.client_results import GroupExperts
from moestro.protos.experts import ExpertsReport, LayerExperts, RebalanceDecision

LAST_DECISIONS = 8
BAR = 24  # columns of the busiest expert's bar
_BESIDE = 36  # columns that a heat map needs for what stands beside it

_OUTCOMES = {
    "kept": "green",
    "loading": "cyan",
    "settling": "cyan",
    "undone": "yellow",
    "cancelled": "yellow",
    "refused": "dim",
}


def overview(group: GroupExperts, width: int) -> RenderableType:
    """A heat map, the ranks, the rebalancer and its last decisions."""
    report = group.report
    if not report.layers:
        return Group(_title(group), Text(f"{report.architecture} has no mixture layers: nothing to show"))
    parts = [_title(group), heat_map(report, width), rank_table(report), rebalancer_line(report)]
    if report.decisions:
        parts.append(decision_list(report.decisions[-LAST_DECISIONS:]))
    return Group(*parts)


def decisions(group: GroupExperts) -> RenderableType:
    """The whole ledger."""
    ledger = group.report.decisions
    return Group(_title(group), decision_list(ledger) if ledger else Text("nothing has been decided yet"))


def heat_map(report: ExpertsReport, width: int) -> RenderableType:
    """Layers down, experts across."""
    room = max(8, width - _BESIDE)
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    table.add_column("layer", justify="right", no_wrap=True)
    table.add_column(f"experts 0 to {report.num_experts - 1}", no_wrap=True)
    table.add_column("balance", justify="right", no_wrap=True)
    table.add_column("busiest", no_wrap=True)
    for layer in report.layers:
        row = heat_row(layer.load, room)
        table.add_row(str(layer.layer), row, f"{layer.balancedness:.2f}", _busiest(layer))
    return Group(table, legend(report.num_experts, room), Text())


def layer_table(layer: LayerExperts, ranks: Sequence[int]) -> Table:
    """Every expert of one layer. ``ranks``: their numbers, in the order of its slots."""
    table = Table(
        title=f"layer {layer.layer}  balancedness {layer.balancedness:.3f}  rows by rank "
        + ", ".join(map(str, layer.rank_load)),
        title_justify="left",
    )
    for name in ("expert", "rows", "of the mean", "replicas"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("ranks")
    table.add_column("", no_wrap=True)
    most, total = max(layer.load), sum(layer.load)
    for expert, rows in enumerate(layer.load):
        holders = [rank for rank, slots in zip(ranks, layer.slots, strict=True) if expert in slots]
        table.add_row(
            str(expert),
            str(rows),
            f"{rows * len(layer.load) / total:.2f}" if total else "-",
            str(len(holders)),
            ", ".join(map(str, holders)),
            "█" * round(BAR * rows / most) if most else "",
        )
    return table


def rank_table(report: ExpertsReport) -> Table:
    table = Table(title="ranks", title_justify="left")
    for name in ("rank", "tokens", "rows", "share", "expert s", "wait s", "step s", "steps", "slowest"):
        table.add_column(name, justify="right", no_wrap=True)
    rows, observed = sum(r.rows for r in report.ranks), sum(r.num_slowest for r in report.ranks)
    for rank in report.ranks:
        table.add_row(
            str(rank.rank),
            str(rank.tokens),
            str(rank.rows),
            _share(rank.rows, rows),
            f"{rank.expert_s:.2f}",
            f"{rank.wait_s:.2f}",
            f"{rank.step_s:.2f}",
            str(rank.num_steps),
            _share(rank.num_slowest, observed),
        )
    return table


def rebalancer_line(report: ExpertsReport) -> Text:
    state = report.rebalancer
    text = Text("rebalancer ").append("on" if state.enabled else "off", "green" if state.enabled else "dim")
    if state.enabled or state.activity != "off":
        text.append(f", {state.activity}")
    moved = f"; since the start {mebibytes(state.moved_bytes)} MiB moved, {layers(state.switched_layers)} switched"
    return text.append(f"{moved}, {state.undone_layers} undone")


def decision_list(ledger: Sequence[RebalanceDecision]) -> RenderableType:
    """Newest last; a line of figures and a line of reason each. Gains and costs are over the rebalancer's horizon."""
    rows = Table.grid(padding=(0, 2))
    rows.add_column(justify="right", no_wrap=True)
    rows.add_column()
    for each in ledger:
        text = Text(each.outcome, _OUTCOMES.get(each.outcome, ""))
        text.append(
            f" ({each.trigger}) layers {ranges(each.layers) or '-'}: {mebibytes(each.num_bytes)} MiB", "default"
        )
        text.append(f", predicted gain {_ms(each.predicted_gain_s)} for {_ms(each.predicted_cost_s)}", "default")
        if each.stall_s:
            text.append(f", stall {_ms(each.stall_s)}", "default")
        if each.realised_gain_s is not None:
            text.append(f", realised {_ms(each.realised_gain_s)}", "default")
        text.append(f"\n{each.reason}", "dim")
        if each.times > 1:
            text.append(f" ({each.times} times in a row)", "dim")
        rows.add_row(age(each.age_s), text)
    return Group(Text("decisions", "italic"), rows)


def ranges(numbers: Sequence[int]) -> str:
    """1, 2, 3, 7 as ``1-3, 7``."""
    runs = groupby(enumerate(sorted(set(numbers))), key=lambda pair: pair[1] - pair[0])
    ends = [(run[0][1], run[-1][1]) for run in (list(members) for _, members in runs)]
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in ends)


def layers(count: int) -> str:
    return f"{count} layer" + "s" * (count != 1)


def age(seconds: float) -> str:
    """In the unit that a person would use."""
    for unit, length_s in (("h", 3600.0), ("min", 60.0)):
        if seconds >= length_s:
            return f"{seconds / length_s:.0f} {unit}"
    return f"{seconds:.0f} s"


def mebibytes(count: int) -> str:
    return f"{count / 2**20:.1f}"


def _title(group: GroupExperts) -> Text:
    report = group.report
    text = Text(group.name, "bold").append(f"  epoch {group.epoch}  {report.architecture}", "default")
    if report.layers:
        text.append(
            f"  {report.num_experts} experts in {layers(len(report.layers))}, {report.slots_per_rank} slots on each of "
            f"{len(report.ranks)} ranks; the last {report.window_s:.0f} s",
            "default",
        )
    return text


def _busiest(layer: LayerExperts) -> str:
    total, most = sum(layer.load), max(layer.load)
    return f"{layer.load.index(most)} ({most * len(layer.load) / total:.1f} x mean)" if total else "-"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "-"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
