"""What each perturbation asks for, of a cluster made of a few lines; and what comes of its faults."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from moestro.cluster.client_results import ClusterStatus, GroupStatus, ModelInfo, RankStatus
from moestro.cluster.edge.events import Choice, Completion, Usage
from moestro.cluster.verify import perturbations
from moestro.cluster.verify.lab import NUM_FILLERS, Places, find_places
from moestro.cluster.verify.report import summary
from moestro.cluster.verify.run import Report, choose, verify
from moestro.cluster.verify.suite import Case
from moestro.cluster.verify.target import ExpertState, NotApplicable
from moestro.protos.errors import ConfigError, Overloaded, SequenceFailed
from moestro.protos.sequences import Diagnostics, FinishReason, PositionTrace

NUM_REQUESTS = 8
MODEL = ModelInfo("m", "A", 256, 50, "float32", has_chat_template=False)


def rank(name: str, tp_rank: int = 0, state: str = "serving") -> RankStatus:
    return RankStatus(name, 0, tp_rank, state, 0, 0, 0, 0, 0, 0.0, 0, "cpu")


def group(name: str, *ranks: RankStatus) -> GroupStatus:
    return GroupStatus(name, len(ranks), 1, 1, ranks)


TWO_GROUPS = ClusterStatus((group("g", rank("g 0"), rank("g 1"), rank("g 2")), group("h", rank("h 0"))), 0)
ONE_RANK = ClusterStatus((group("g", rank("g 0")),), 0)


@dataclass
class Cluster:
    """Answers with the prompt's own tokens. ``fault`` says when it does not."""

    layout: ClusterStatus = field(default_factory=lambda: TWO_GROUPS)
    fault: Callable[[Cluster, Case, Diagnostics], bool] = lambda cluster, case, diagnostics: False
    refusal: str = ""
    asked: list[tuple[str, Diagnostics]] = field(default_factory=list)
    placements: list[int | None] = field(default_factory=list)
    num_open: int = 0
    most_open: int = 0
    left_to_switch: int = 0
    switched: int = 0

    async def model(self) -> ModelInfo:
        return MODEL

    async def tokenize(self, text: str) -> list[int]:
        return [ord(c) % 50 for c in text]

    async def status(self) -> ClusterStatus:
        return self.layout

    async def ask(self, case: Case, diagnostics: Diagnostics) -> Completion:
        self.asked.append((case.name, diagnostics))
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            await asyncio.sleep(0.001)
        finally:
            self.num_open -= 1
        if self.left_to_switch:
            self.left_to_switch -= 1
            self.switched += 1
        assert isinstance(case.prompt, tuple)
        wrong = self.fault(self, case, diagnostics)
        tokens = tuple((token + wrong) % 50 for token in case.prompt[:6])
        trace = tuple(PositionTrace(p, (p, p + wrong)) for p in range(len(case.prompt))) if diagnostics.trace else ()
        usage = Usage(
            prompt_tokens=len(case.prompt),
            cached_tokens=0 if "prompt_logprobs" in case.options else len(case.prompt),
            preemptions=int(diagnostics.preempt_at is not None and diagnostics.preempt_at < len(tokens)),
        )
        choices = (Choice(0, "", tokens, FinishReason.LENGTH, trace=trace),)
        return Completion("r", "m", 0, choices, usage)

    async def experts(self, group: str) -> ExpertState:
        if self.refusal:
            raise NotApplicable(self.refusal)
        return ExpertState(self.switched, self.left_to_switch > 0)

    async def set_placement(self, group: str, random_seed: int | None) -> None:
        assert group == "g"
        self.placements.append(random_seed)
        self.left_to_switch = 5


def report_of(cluster: Cluster, names: Sequence[str] = tuple(perturbations.PERTURBATIONS)) -> Report:
    return asyncio.run(asyncio.wait_for(verify(cluster, NUM_REQUESTS, 0, names), 30))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("POLL_S", 0.002), ("QUIET_S", 0.02), ("SETTLE_S", 0.5)):
        monkeypatch.setattr(perturbations, name, seconds)


def test_all_apply_to_a_cluster_of_two_groups_and_all_are_equal() -> None:
    cluster = Cluster()
    report = report_of(cluster)
    assert report.is_equal
    assert [row.perturbation for row in report.applied] == list(perturbations.PERTURBATIONS)
    assert all(row.compared is not None and row.compared.hidden_states > 0 for row in report.rows)
    baseline = cluster.asked[:NUM_REQUESTS]
    assert {diagnostics for _, diagnostics in baseline} == {Diagnostics(rank="g 0", trace=True)}
    assert "not proved" not in summary(report)


def test_alone_is_alone_and_a_crowd_is_one() -> None:
    alone, crowd, order = Cluster(), Cluster(), Cluster()
    report_of(alone, ["again"])
    assert alone.most_open == 1
    assert len(alone.asked) == 2 * NUM_REQUESTS
    report_of(crowd, ["crowd"])
    assert crowd.most_open > NUM_FILLERS
    assert crowd.num_open == 0, "the fillers were cancelled"
    fillers = [diagnostics for name, diagnostics in crowd.asked if name == "filler"]
    assert set(fillers) == {Diagnostics()}, "those are anywhere"
    report_of(order, ["order"])
    names = [name for name, _ in order.asked]
    assert names[NUM_REQUESTS:] == names[:NUM_REQUESTS][::-1]
    assert order.most_open == NUM_REQUESTS


def test_chunks_and_preemptions_are_asked_for() -> None:
    cluster = Cluster()
    report_of(cluster, ["chunked by 1", "chunked by 7", "chunked by 16", "preempted"])
    disturbed = [diagnostics for _, diagnostics in cluster.asked[NUM_REQUESTS:]]
    assert [d.max_chunk for d in disturbed] == [n for n in (1, 7, 16, 0) for _ in range(NUM_REQUESTS)]
    assert all(d.preempt_at is not None and 1 <= d.preempt_at <= 5 for d in disturbed[-NUM_REQUESTS:])
    assert all(d.rank == "g 0" and d.trace for d in disturbed)


def test_a_fault_of_one_rank_is_found_there_and_only_there() -> None:
    report = report_of(Cluster(fault=lambda cluster, case, d: d.rank == "g 2"))
    assert [row.perturbation for row in report.applied if not row.is_equal] == ["other rank"]
    row = next(row for row in report.rows if row.perturbation == "other rank")
    assert (row.num_requests, row.num_different) == (2 * NUM_REQUESTS, NUM_REQUESTS)
    assert row.compared is not None
    assert row.compared.difference is not None
    assert (row.compared.difference.position, row.compared.difference.layer) == (0, 1)
    elsewhere = report_of(Cluster(fault=lambda cluster, case, d: d.rank == "h 0"))
    assert [row.perturbation for row in elsewhere.applied if not row.is_equal] == ["other group"]


def test_placements_are_reached_one_after_another_while_asking_and_then_undone() -> None:
    cluster = Cluster()
    report = report_of(cluster, ["rebalanced"])
    (row,) = report.rows
    assert row.is_equal
    assert row.note == "15 layers switched, 3 of 3 placements reached"
    assert row.num_requests >= 2 * NUM_REQUESTS
    assert len(set(cluster.placements)) == 4
    assert cluster.placements[-1] is None


def test_a_fault_while_experts_move_is_found() -> None:
    report = report_of(Cluster(fault=lambda cluster, case, d: cluster.left_to_switch == 2))
    assert [row.perturbation for row in report.applied if not row.is_equal] == ["rebalanced"]


def test_a_placement_that_is_never_reached_is_said() -> None:
    class Stuck(Cluster):
        async def set_placement(self, group: str, random_seed: int | None) -> None:
            self.placements.append(random_seed)
            self.left_to_switch = 2 if len(self.placements) == 1 else 0

    stuck = Stuck()
    (row,) = report_of(stuck, ["rebalanced"]).rows
    assert row.note == "2 layers switched, 1 of 3 placements reached"
    assert stuck.placements[-1] is None


def test_what_does_not_apply_is_said_with_its_reason() -> None:
    report = report_of(Cluster(layout=ONE_RANK, refusal="the server has no GetExperts"))
    skipped = {row.perturbation: row.note for row in report.rows if row.compared is None}
    assert skipped == {
        "other rank": "one rank",
        "other group": "one group",
        "rebalanced": "the server has no GetExperts",
    }
    assert report.is_equal
    assert "Not applicable, and so not proved: other rank, other group, rebalanced." in summary(report)


def test_a_request_that_fails_only_when_disturbed_is_a_difference() -> None:
    class Full(Cluster):
        async def ask(self, case: Case, diagnostics: Diagnostics) -> Completion:
            if diagnostics.max_chunk:
                raise Overloaded("4 wait")
            return await super().ask(case, diagnostics)

    (row,) = report_of(Full(), ["chunked by 7"]).rows
    assert (row.is_equal, row.num_different) == (False, NUM_REQUESTS)
    assert row.compared is not None
    assert "Overloaded: 4 wait" in str(row.compared.difference)


def test_a_request_that_always_fails_proves_nothing() -> None:
    class Broken(Cluster):
        async def ask(self, case: Case, diagnostics: Diagnostics) -> Completion:
            raise SequenceFailed("choice 0 failed in the engine")

    with pytest.raises(SequenceFailed, match="fails undisturbed: SequenceFailed: choice 0 failed"):
        report_of(Broken(), ["again"])


def test_where_requests_are_served() -> None:
    peers = group("g", rank("g 0"), rank("g 1", tp_rank=1), rank("g 2"), rank("g 3", tp_rank=1))
    lost = group("f", rank("f 0", state="lost"))
    late = group("h", rank("h 0", state="starting"), rank("h 1"))
    found = find_places(ClusterStatus((lost, peers, late), 0))
    assert found == Places("g", "g 0", ("g 2",), ("h 1",))
    assert find_places(ClusterStatus((lost,), 0)) == Places()


def test_names() -> None:
    assert choose([]) == tuple(perturbations.PERTURBATIONS)
    assert choose(["chunked", "again"]) == ("again", "chunked by 1", "chunked by 7", "chunked by 16")
    assert choose(["other group", "chunked by 7"]) == ("chunked by 7", "other group")
    with pytest.raises(ConfigError, match=r"must be one of again, .* not 'oth'"):
        choose(["oth"])
