"""Memory that ranks share: every value arrives, and a rank that is slow, late, killed or gone is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.distributed.processes import run_processes, start_process

from moestro.kernels.native_module import BuildError
from moestro.router import board as boards
from moestro.router.board import NoBoard
from moestro.router.mesh import serve_store
from moestro.router.native import build

RANKS = "tests.distributed.board_ranks"


@pytest.mark.parametrize(("world_size", "rounds"), [(2, 10_000), (3, 1000)])
def test_every_value_of_many_small_exchanges_arrives(world_size: int, rounds: int) -> None:
    """Random kinds and pauses; numbers wrap around on the way. A failure names its seed and round."""
    arguments = {"seed": 20261121, "rounds": rounds}
    assert run_processes(f"{RANKS}:exchange", world_size, arguments, timeout_s=120) == [rounds] * world_size


def test_a_peer_that_is_killed_is_noticed_and_nothing_is_left(tmp_path: Path) -> None:
    before = set(Path("/dev/shm").iterdir())
    store, address = serve_store()
    processes = [start_process(f"{RANKS}:killed_peer", rank, 3, address, tmp_path, {}) for rank in range(3)]
    codes = [process.wait(60) for process in processes]
    del store
    assert codes == [0, 0, -9], [(tmp_path / f"{rank}.log").read_text()[-2000:] for rank in range(3)]

    for rank in range(2):
        told, after_s = json.loads((tmp_path / f"{rank}.json").read_text())
        # Whoever is told first leaves, and may be what the other one notices.
        assert told.startswith("Connection to rank ")
        assert "its process is gone" in told or "it left the group" in told
        assert 0 < after_s < 0.5
        print(f"\nrank {rank}: {told}, {after_s * 1e3:.0f} ms after the kill")
    assert set(Path("/dev/shm").iterdir()) <= before


def test_a_slow_peer_is_waited_for() -> None:
    longest = run_processes(f"{RANKS}:slow_peer", 2)
    assert longest[0] > 0.2, "the peer was meant to be stopped"


def test_a_peer_that_does_not_come_is_named() -> None:
    told = run_processes(f"{RANKS}:late_peer", 2)
    assert told == [
        "Timed out after 500 ms waiting for rank 1 to send",
        "Connection to rank 0 lost: it left the group",
    ]


def test_epochs_leave_nothing_behind() -> None:
    assert run_processes(f"{RANKS}:many_epochs", 2, {"epochs": 50}) == [[0, 0, 0]] * 2


def test_what_does_not_fit_goes_by_gloo() -> None:
    assert run_processes(f"{RANKS}:too_large", 2) == [[True] * 8] * 2


def test_where_one_rank_cannot_all_go_without_and_say_why() -> None:
    assert run_processes(f"{RANKS}:no_compiler", 2) == ["rank 1: no C++ compiler: c++ is not found"] * 2


def test_ranks_of_other_hosts_share_nothing() -> None:
    here, there = (boards._Offer(host, 1, -1, "", "") for host in ("a", "b"))
    assert boards._refusal([here, here]) == ""
    assert boards._refusal([here, here, there]).startswith("rank 2 is on another host or in another container")


def test_a_segment_that_is_not_the_announced_one_is_refused() -> None:
    """The number of a process, or of a descriptor, may be another's by the time it is opened."""
    offer = boards._offer(0, 1, 4096)
    assert offer.problem == ""
    wrong = boards._Offer(offer.host, offer.process, offer.descriptor, "0" * 64, "")
    board = boards._open([wrong], 0, 4096, 0.0, 1.0)
    assert board == NoBoard("the segment of rank 0 is not where it said")


def test_more_exchanges_under_way_than_there_are_places_are_refused() -> None:
    offer = boards._offer(0, 1, 4096)
    board = boards._open([offer], 0, 4096, 0.0, 1.0)
    assert not isinstance(board, NoBoard)
    x_TD, slots_TK = torch.ones(1, 4), torch.zeros(1, 1, dtype=torch.int64)
    operations = [board.post_tokens(x_TD, slots_TK, 1) for _ in range(4)]
    with pytest.raises(RuntimeError, match="more than 4 exchanges under way"):
        board.post_tokens(x_TD, slots_TK, 1)
    for operation in reversed(operations):  # in any order
        assert torch.equal(board.take_rows(operation, [1], 1, 1, x_TD)[0], x_TD)
    board.post_tokens(x_TD, slots_TK, 1)
    board.close()
    with pytest.raises(RuntimeError, match="this process group is closed"):
        board.post_tokens(x_TD, slots_TK, 1)


def test_without_a_compiler_the_reason_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(BuildError, match="no C\\+\\+ compiler: /nowhere/c\\+\\+ is not found"):
        build.load.__wrapped__()
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(BuildError, match="the compiler failed"):
        build.load.__wrapped__()
    assert not list(tmp_path.rglob("*.so"))
