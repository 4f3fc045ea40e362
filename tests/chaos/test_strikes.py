"""What the chaos harness reads off the status and the clients' records."""

from __future__ import annotations

from pathlib import Path

from benchmarks.chaos.plot import save_plot
from benchmarks.chaos.records import Record, Verdict
from benchmarks.chaos.report import figures, is_good
from benchmarks.chaos.run import Result
from benchmarks.chaos.strikes import Seen, Strike, followed, is_whole, stalled, tokens_per_s

EPOCH_1, EPOCH_2 = (("group-0", 1),), (("group-0", 2),)
HISTORY = (
    Seen(0.9, EPOCH_1, serving=3),
    Seen(1.1, EPOCH_1, serving=3),
    Seen(1.3, answered=False),
    Seen(1.5, EPOCH_2, serving=2),
    Seen(4.0, EPOCH_2, serving=3),
    Seen(9.0, EPOCH_2, serving=2),
)


def record(*arrivals_s: float, verdict: Verdict = Verdict.EQUAL, migrations: int = 0) -> Record:
    """Two tokens a message; sent at 0, ended with the last."""
    counts = (2,) * len(arrivals_s)
    return Record("a", "stream", 0, 0.0, arrivals_s[-1], arrivals_s, counts, verdict, migrations=migrations)


def test_a_strike_is_followed_until_the_next() -> None:
    strikes = [Strike(0, "kill rank", "rank 1", 1.0, 1.0), Strike(1, "kill rank", "rank 2", 8.0, 8.0)]
    records = [record(0.5, 1.0, 2.5, 3.0, migrations=1), record(0.2, 0.4)]
    first, second = followed(strikes, HISTORY, records, 3)
    assert (first.detected_s, first.whole_s) == (1.5, 4.0)
    assert (first.moved_s, first.stayed_s) == ((1.5,), ())
    assert (second.detected_s, second.whole_s, second.moved_s) == (9.0, None, ())


def test_a_new_epoch_tells_even_if_all_serve_again() -> None:
    history = (Seen(0.9, EPOCH_1, serving=3), Seen(1.2, EPOCH_2, serving=3))
    (strike,) = followed([Strike(0, "stop rank", "rank 0", 1.0, 2.0)], history, [], 3)
    assert (strike.detected_s, strike.whole_s) == (1.2, 1.2)


def test_throughput_and_stalls_by_the_clock() -> None:
    edges = [0.0, 1.0, 2.0, 3.0, 4.0]
    records = [record(0.5, 1.5, 3.9)]
    assert tokens_per_s(records, edges) == [2.0, 2.0, 0.0, 2.0]
    assert stalled(records, edges) == [0, 0, 0, 1, 0]  # silent for more than half a second from 2.0 on


def test_a_run_is_good_only_if_nothing_is_wrong(tmp_path: Path) -> None:
    strikes = (Strike(0, "stop rank", "rank 1", 1.0, 2.0, detected_s=1.2, whole_s=4.0),)
    good = Result((record(0.5, 3.0),), strikes, HISTORY, 5.0, is_empty=True, is_whole=True, skipped=())
    assert is_good(good)
    told = figures(good)
    assert told["faults"] == 1
    assert told["by_kind"]["stop rank"]["detected_after_s"] == {"count": 1, "median": 1.2 - 1.0, "max": 1.2 - 1.0}
    wrong = [record(0.5, verdict=verdict) for verdict in (Verdict.DIFFERENT, Verdict.LOST)]
    for each in wrong:
        assert not is_good(Result((each,), strikes, HISTORY, 5.0, is_empty=True, is_whole=True, skipped=()))
    assert not is_good(Result(good.records, strikes, HISTORY, 5.0, is_empty=False, is_whole=True, skipped=()))
    assert not is_good(Result(good.records, strikes, HISTORY, 5.0, is_empty=True, is_whole=False, skipped=()))
    assert not is_good(Result((), strikes, HISTORY, 5.0, is_empty=True, is_whole=True, skipped=()))
    save_plot(good, tmp_path / "run.png", "a run")
    assert (tmp_path / "run.png").stat().st_size > 1000


def test_the_cluster_is_whole_when_the_last_answer_said_so() -> None:
    whole = [is_whole(HISTORY, at_s, 3) for at_s in (0.5, 1.0, 1.4, 1.5, 3.9, 4.0, 10.0)]
    assert whole == [False, True, True, False, False, True, False]


def test_without_faults_there_is_nothing_to_follow() -> None:
    assert followed([], HISTORY, [], 3) == []
