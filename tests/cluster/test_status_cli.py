"""``moestro status`` as a person sees it."""

from __future__ import annotations

from rich.console import Console

from moestro.cluster.cli.status import _table
from moestro.cluster.client_results import GroupStatus, RankStatus


def shown(group: GroupStatus) -> str:
    console = Console(width=120, no_color=True)
    with console.capture() as capture:
        console.print(_table(group))
    return capture.get()


def rank(number: int, state: str, **more: object) -> RankStatus:
    return RankStatus(f"group-0 rank {number}", number, 0, state, 3, 1, 5, 64, 128, 0.02, 2**30, "cpu", **more)  # type: ignore[arg-type]


def test_a_group_that_forms_says_what_it_does_and_what_it_can_stand() -> None:
    ranks = (rank(0, "serving"), rank(1, "lost"), rank(2, "serving", slowness=4.25, straggler=True))
    text = shown(GroupStatus("group-0", 3, 1, 4, ranks, "forming epoch 5 from 2 of 3 ranks, rank 1 lost", 1))
    lines = text.splitlines()
    assert lines[0].rstrip() == "group-0  dp 3 x tp 1  epoch 4  can lose 1 more rank"
    assert lines[1].rstrip() == "forming epoch 5 from 2 of 3 ranks, rank 1 lost"
    assert [row.split()[3].strip("│ ") for row in lines if row.startswith("│")] == ["serving", "lost", "serving,"]
    assert "serving, 4.2 x slow" in text


def test_a_group_at_full_strength_says_nothing_more() -> None:
    text = shown(GroupStatus("group-0", 1, 1, 1, (rank(0, "serving"),), "", 0))
    assert text.splitlines()[0].rstrip() == "group-0  dp 1 x tp 1  epoch 1  can lose no rank"
    assert text.splitlines()[1].startswith("┏")
