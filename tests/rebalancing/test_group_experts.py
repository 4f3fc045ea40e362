"""One rank that serves a small model: what it reports of its experts, and that it moves them as told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.small_models import make_model, random_ids, save_model

from moestro.protos import wire
from moestro.protos.errors import ConfigError
from moestro.protos.experts import ExpertsReport, PlacementRequest
from moestro.protos.gen import rank_pb2 as pb
from moestro.protos.sequences import SamplingParams, SequenceRequest
from moestro.router.mesh import StoreAddress
from moestro.router.parallel import GroupShape
from moestro.router.placement import Placement, spread
from moestro.router.placement_file import Shape, save_placements
from moestro.router.rebalance.config import Config
from moestro.router.view import Member, View
from moestro.workers import epoch
from moestro.workers.checkpoint import open_checkpoint
from moestro.workers.full_group import build_rank
from moestro.workers.rank_loop import StepOutput
from moestro.workers.rank_setup import RankSpec
from moestro.workers.rebalancing.commands import decode, encode, wanted_placements
from moestro.workers.rebalancing.setup import ExpertsSpec, start_placements
from moestro.workers.worker import Worker
from moestro.workers.worker_state import WorkerPhase

WAIT_S = 20.0
TOP_K, EXPERTS, LAYERS = 3, 8, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_model(make_model("qwen3_moe", seed=3), tmp_path_factory.mktemp("model"))


class Serving:
    """A loop on a thread of its own."""

    def __init__(self, model: Path) -> None:
        experts = ExpertsSpec(rebalance=Config(enabled=False))
        self.loop: Worker = build_rank(RankSpec(str(model), threads=1, kv_bytes=2**20, experts=experts)).loop
        self.ended: dict[str, threading.Event] = {}
        self.tokens: dict[str, list[int]] = {}
        self.thread = threading.Thread(target=self.loop.run, args=(self._publish,))
        self.thread.start()
        while self.loop.state.phase is not WorkerPhase.SERVING:
            time.sleep(0.01)

    def _publish(self, output: StepOutput) -> None:
        for delta in output.deltas:
            self.tokens[delta.sequence_id] += delta.token_ids
            if delta.finish_reason is not None:
                self.ended[delta.sequence_id].set()

    def answer(self, name: str, prompt: list[int], num_tokens: int) -> list[int]:
        self.ended[name], self.tokens[name] = threading.Event(), []
        sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        request = wire.encode_request(SequenceRequest(name, tuple(prompt), sampling))
        self.loop.submit(pb.AttachRequest(submit=request).SerializeToString())
        assert self.ended[name].wait(WAIT_S)
        return self.tokens[name]

    def await_report(self, holds: Callable[[ExpertsReport], bool]) -> ExpertsReport:
        deadline = time.monotonic() + WAIT_S
        while not holds(report := self.loop.experts()):
            assert time.monotonic() < deadline, report
            time.sleep(0.01)
        return report


@pytest.fixture
def serving(folder: Path) -> Iterator[Serving]:
    serving = Serving(folder)
    yield serving
    serving.loop.stop()
    serving.thread.join(WAIT_S)


def test_every_row_is_counted_before_the_rank_sleeps(serving: Serving) -> None:
    assert serving.loop.experts().layers[0].load == (0,) * EXPERTS
    serving.answer("a", random_ids(9, seed=1), 6)
    computed = 9 + 6 - 1  # the last token is never computed
    report = serving.await_report(lambda r: sum(r.layers[0].load) == computed * TOP_K)
    assert [layer.layer for layer in report.layers] == list(range(LAYERS))
    for layer in report.layers:
        assert sum(layer.load) == computed * TOP_K
        assert layer.rank_load == (computed * TOP_K,)
        assert layer.balancedness == 1.0
    rank = report.ranks[0]
    assert rank.rows == computed * TOP_K * LAYERS
    assert rank.tokens == computed
    assert 0 < rank.expert_s < rank.step_s
    assert (rank.num_steps, rank.num_slowest) == (6, 6)
    assert (report.num_experts, report.slots_per_rank) == (EXPERTS, EXPERTS)


def test_the_next_group_hears_what_was_computed_in_this_one(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """By it the experts of a lost rank are spread over those that are left."""
    heard, really = [], epoch.regroup

    def regroup(*args: Any, **options: Any) -> Any:
        heard.append(options["loads_LE"])
        return really(*args, **options)

    monkeypatch.setattr(epoch, "regroup", regroup)
    serving.answer("a", random_ids(9, seed=1), 40)
    report = serving.await_report(lambda r: sum(r.layers[0].load) > 0)
    now = serving.loop.state.epoch
    serving.loop.form(View(now + 1, (Member(0, 0),), 1))
    deadline = time.monotonic() + WAIT_S
    while (serving.loop.state.phase, serving.loop.state.epoch) != (WorkerPhase.SERVING, now + 1):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert heard == [[layer.load for layer in report.layers]]
    serving.answer("b", random_ids(9, seed=1), 4)


def test_a_rank_is_called_by_its_seat_whoever_else_is_there(folder: Path) -> None:
    worker = Worker(RankSpec(str(folder), threads=1, kv_bytes=2**20, shape=GroupShape(3)), StoreAddress("", 0), 2, 0)
    worker.load()
    thread = threading.Thread(target=worker.run, args=(lambda output: None,))
    thread.start()
    worker.form(View(1, (Member(seat=2, worker=0),), 1))
    deadline = time.monotonic() + WAIT_S
    while worker.state.phase is not WorkerPhase.SERVING:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert [rank.rank for rank in worker.experts().ranks] == [2]
    worker.stop()
    thread.join(WAIT_S)


def test_a_wish_is_carried_out_while_idle_and_changes_no_answer(serving: Serving) -> None:
    prompt = random_ids(7, seed=2)
    before = serving.answer("before", prompt, 12)
    serving.loop.request_placement(PlacementRequest(random_seed=6))
    report = serving.await_report(lambda r: r.rebalancer.switched_layers == LAYERS)
    assert [layer.slots for layer in report.layers] != [spread(EXPERTS, 1).slots] * LAYERS
    assert serving.answer("moved", prompt, 12) == before
    serving.loop.request_placement(PlacementRequest(even=True))
    report = serving.await_report(lambda r: [layer.slots for layer in r.layers] == [spread(EXPERTS, 1).slots] * LAYERS)
    assert serving.answer("back", prompt, 12) == before
    assert {decision.trigger for decision in report.decisions} == {"operator"}
    assert report.rebalancer.moved_bytes > 0


def test_automatic_decisions_are_turned_on_and_off(serving: Serving) -> None:
    assert not serving.loop.experts().rebalancer.enabled
    for wanted in (True, False):
        serving.loop.request_placement(PlacementRequest(rebalance=wanted))
        serving.await_report(lambda r, wanted=wanted: r.rebalancer.enabled is wanted)


def test_a_wish_that_does_not_fit_is_refused_and_forgotten(serving: Serving) -> None:
    for layers, reason in (
        ((((0,) * EXPERTS,),) * LAYERS, "placed twice"),
        ((((*range(EXPERTS), -1),),) * LAYERS, "must be 1 ranks of 8 slots, is 1 of 9"),
        ((spread(EXPERTS, 1).slots,), "shorter"),
    ):
        with pytest.raises(ValueError, match=reason):
            serving.loop.request_placement(PlacementRequest(layers=layers))
    assert serving.answer("alive", [1, 2, 3], 2)


def test_a_dense_model_says_so(tmp_path: Path) -> None:
    serving = Serving(save_model(make_model("llama", seed=1), tmp_path))
    try:
        assert serving.answer("a", [1, 2, 3], 2)
        assert serving.loop.experts().layers == ()
        with pytest.raises(ValueError, match="LlamaForCausalLM has no mixture layers"):
            serving.loop.request_placement(PlacementRequest(even=True))
    finally:
        serving.loop.stop()
        serving.thread.join(WAIT_S)


@pytest.mark.parametrize(
    "request_",
    [
        PlacementRequest(even=True, rebalance=False),
        PlacementRequest(random_seed=2**63),
        PlacementRequest(layers=(((0, 1), (-1, 1)),) * 2),
        PlacementRequest(rebalance=True),
    ],
)
def test_a_wish_survives_its_journey(request_: PlacementRequest) -> None:
    assert decode(encode(request_)) == request_


def test_a_wish_without_a_placement_asks_for_none() -> None:
    assert wanted_placements(PlacementRequest(rebalance=True), (spread(4, 2),)) is None


def test_slots_are_shared_out_equally_and_too_many_are_refused(folder: Path) -> None:
    config = open_checkpoint(folder).config
    assert [p.capacity for p in start_placements(ExpertsSpec(redundant=1), config, 4)] == [3] * LAYERS
    assert start_placements(ExpertsSpec(), config, 3) == (spread(EXPERTS, 3),) * LAYERS
    with pytest.raises(ConfigError, match=r"experts\.redundant: 9 more slots than experts give each of 2 ranks 9"):
        start_placements(ExpertsSpec(redundant=9), config, 2)


def test_a_group_starts_as_a_file_says_or_not_at_all(folder: Path, tmp_path: Path) -> None:
    config = open_checkpoint(folder).config
    placements = (Placement(EXPERTS, ((7, 6, 5, 4), (3, 2, 1, 0))), spread(EXPERTS, 2))
    file = tmp_path / "placement.json"
    save_placements(file, Shape(config.architecture, LAYERS, EXPERTS, 2, 4), placements)
    spec = ExpertsSpec(placement_file=str(file))
    assert start_placements(spec, config, 2) == placements
    with pytest.raises(ConfigError, match="world_size"):
        start_placements(spec, config, 4)
