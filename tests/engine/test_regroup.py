"""A loaded model goes over to a group, as far as no step is computed: what is read, and what is held when that fails.
Ranks are threads. With real processes: tests/distributed/test_regroup.py."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.small_models import make_model, random_ids, save_model
from tests.model.oracle import Driver

from moestro.protos.errors import CheckpointError, ExpertsDoNotFit
from moestro.router.expert_parallel import ExpertParallel
from moestro.router.placement import EMPTY, Placement, spread
from moestro.router.transport import LocalTransport
from moestro.workers.checkpoint import Checkpoint, open_checkpoint
from moestro.workers.loading import load_model, load_share, open_source
from moestro.workers.model.decoder import Decoder
from moestro.workers.regroup import Regrouped, Superseded, regroup

EXPERTS, LAYERS, PLENTY = 8, 2, 1000


@dataclass
class Table:
    """Where the threads of a group put what they gather."""

    size: int
    parts: dict[int, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=20)


@dataclass(frozen=True)
class ThreadCollectives:
    """``Collectives`` as far as they are needed."""

    rank: int
    table: Table

    @property
    def size(self) -> int:
        return self.table.size

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        self.table.parts[self.rank] = x
        self.table.barrier.wait()
        gathered = torch.stack([self.table.parts[rank] for rank in range(self.size)])
        self.table.barrier.wait()
        return gathered


@pytest.fixture(scope="module", params=["cpu", "plain"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    dtype = torch.bfloat16 if request.param == "cpu" else torch.float32
    return open_checkpoint(save_model(make_model("qwen3_moe", seed=3).to(dtype), tmp_path_factory.mktemp("model")))


def source_of(checkpoint: Checkpoint) -> Callable[[], Any]:
    return partial(open_source, checkpoint, checkpoint.config.dtype, torch.device("cpu"))


def shares(checkpoint: Checkpoint, held: Sequence[Sequence[int]]) -> list[Decoder]:
    return [load_share(checkpoint, [slots] * LAYERS) for slots in held]


def together(models: Sequence[Decoder], go: Callable[[Decoder, ThreadCollectives], Any]) -> list[Any]:
    """What ``go`` returns or raises on each rank."""

    def caught(rank: int) -> Any:
        try:
            return go(models[rank], ThreadCollectives(rank, table))
        except Exception as error:
            return error

    table = Table(len(models))
    with ThreadPoolExecutor(len(models)) as pool:
        return list(pool.map(caught, range(len(models))))


def join(
    checkpoint: Checkpoint, most_slots: int = PLENTY, **options: Any
) -> Callable[[Decoder, ThreadCollectives], Regrouped]:
    def go(model: Decoder, control: ThreadCollectives) -> Regrouped:
        def over(placements: tuple[Placement, ...]) -> ExpertParallel:
            return ExpertParallel(LocalTransport(placements[0].capacity), placements, control.rank)

        source = options.get("open_source", source_of(checkpoint))
        others = {name: value for name, value in options.items() if name != "open_source"}
        return regroup(model, control, over, source, most_slots=most_slots, **others)  # type: ignore[arg-type]

    return go


def held(model: Decoder) -> list[tuple[int, ...]]:
    return [bank.held for bank in model.banks.values()]


def logits(model: Decoder) -> torch.Tensor:
    return torch.cat(Driver(model, num_blocks=64).step([(0, random_ids(9, seed=2))]))


def check_weights(model: Decoder, whole: Decoder) -> None:
    """Every slot computes what its expert computes in a whole model."""
    x_RM = torch.randn(3, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    for bank, other in zip(model.banks.values(), whole.banks.values(), strict=True):
        for slot, expert in enumerate(bank.held):
            if expert != EMPTY:
                got, wanted = (
                    one.experts.apply(x_RM.to(model.norm_M.dtype), torch.tensor(at))
                    for one, at in (
                        (bank, [3 * (i == slot) for i in range(len(bank.held))]),
                        (other, [3 * (i == expert) for i in range(EXPERTS)]),
                    )
                )
                assert torch.equal(got, wanted)


def test_alone_with_half_of_the_experts_it_reads_the_rest_and_answers_as_a_whole_model(checkpoint: Checkpoint) -> None:
    (model,) = shares(checkpoint, [(1, 3, EMPTY, 5, 7)])
    (done,) = together([model], join(checkpoint))
    assert done.loaded == 4 * LAYERS
    assert torch.equal(logits(done.model), logits(load_model(checkpoint)))


def test_a_share_computes_nothing_before_it_has_a_group(checkpoint: Checkpoint) -> None:
    (model,) = shares(checkpoint, [range(EXPERTS)])
    with pytest.raises(RuntimeError, match=r"model.layers.0.mlp.experts: this rank has not joined a group yet"):
        logits(model)


def test_shrinking_and_growing_reads_each_lost_expert_once_and_then_nothing(checkpoint: Checkpoint) -> None:
    full, whole = spread(EXPERTS, 3).slots, load_model(checkpoint)
    models = shares(checkpoint, full)
    done = together(models, join(checkpoint))
    assert [held(one.model) for one in done] == [[slots] * LAYERS for slots in full]
    assert [one.loaded for one in done] == [0, 0, 0]
    left = together([one.model for one in done[1:]], join(checkpoint))
    assert sum(one.loaded for one in left) == LAYERS * len(set(full[0]) - {EMPTY})
    for one in left:
        check_weights(one.model, whole)
    newcomer = shares(checkpoint, full[:1])
    again = together([*newcomer, *(one.model for one in left)], join(checkpoint))
    assert [one.loaded for one in again] == [0, 0, 0]
    for one in again:
        check_weights(one.model, whole)


def test_a_group_that_broke_amid_a_switch_goes_on_from_what_each_rank_really_holds(checkpoint: Checkpoint) -> None:
    """The first rank has switched to the other's experts and the second has not."""
    models = shares(checkpoint, [(4, 5, 6, 7), (4, 5, 6, 7)])
    done = together(models, join(checkpoint))
    assert sorted(one.loaded for one in done) == [2 * LAYERS, 2 * LAYERS]
    for one in done:
        check_weights(one.model, load_model(checkpoint))


def test_redundant_slots_stay_empty_and_memory_bounds_them(checkpoint: Checkpoint) -> None:
    models = shares(checkpoint, spread(EXPERTS, 2).slots)
    for most, slots in ((PLENTY, 6), (5, 5)):
        done = together(models, join(checkpoint, most, redundant=4))
        models = [one.model for one in done]
        assert [len(slots_L) for one in models for slots_L in held(one)] == [slots] * 4
        assert [one.loaded for one in done] == [0, 0]


def test_heavy_experts_are_shared_out_by_what_the_survivors_know(checkpoint: Checkpoint) -> None:
    """Rank 1 has just come and knows no loads; experts 0 and 1 are homeless and the heaviest."""
    models = shares(checkpoint, [(2, 3, 4), (5, 6, 7)])
    loads_LE = [[100, 90, 1, 1, 1, 1, 1, 1]] * LAYERS
    table = [loads_LE, None]
    done = together(models, lambda model, control: join(checkpoint, loads_LE=table[control.rank])(model, control))
    assert sorted(slots[3] for one in done for slots in held(one.model)) == [0, 0, 1, 1]


def test_what_does_not_fit_is_said_on_all_ranks_alike_and_changes_nothing(checkpoint: Checkpoint) -> None:
    models = shares(checkpoint, [(0, 1, 2), (3, 4, 5)])
    table = [3, PLENTY]
    errors = together(models, lambda model, control: join(checkpoint, table[control.rank])(model, control))
    assert all(isinstance(error, ExpertsDoNotFit) for error in errors)
    assert {str(error) for error in errors} == {
        "2 ranks are too few for 8 experts a layer: each would have to hold 4, and has memory for 3"
    }
    assert [held(model) for model in models] == [[(0, 1, 2)] * LAYERS, [(3, 4, 5)] * LAYERS]


def test_a_rank_that_cannot_read_fails_alone_and_says_truly_what_it_holds(checkpoint: Checkpoint) -> None:
    gone = replace(
        checkpoint,
        pieces={
            name: replace(piece, info=replace(piece.info, file=Path("gone.safetensors")))
            for name, piece in checkpoint.pieces.items()
            if ".1.mlp." in name
        }
        | {name: piece for name, piece in checkpoint.pieces.items() if ".1.mlp." not in name},
    )
    models = shares(checkpoint, [(0, 1, 2), (5, 6, 7)])
    sources = [checkpoint, gone]
    first, second = together(models, lambda model, control: join(sources[control.rank])(model, control))
    assert isinstance(first, Regrouped)
    assert isinstance(second, CheckpointError)
    assert "gone.safetensors: cannot be read: No such file" in str(second)
    assert held(models[1])[1] == (5, 6, 7, EMPTY)  # the layer that could not be read
    check_weights(models[1], load_model(checkpoint))
    done = together([first.model, models[1]], join(checkpoint))  # and once the disk is back
    for one in done:
        check_weights(one.model, load_model(checkpoint))


def test_a_checkpoint_that_was_replaced_is_not_read(tmp_path: Path) -> None:
    """Its experts are another model's."""
    checkpoint = open_checkpoint(save_model(make_model("qwen3_moe", seed=3), tmp_path))
    (model,) = shares(checkpoint, [(0, 1, 2)])
    save_model(make_model("qwen3_moe", seed=4), tmp_path)
    (error,) = together([model], join(checkpoint))
    assert isinstance(error, CheckpointError)
    assert str(error) == "model.safetensors: the file is another than when it was checked"
    assert held(model)[0] == (0, 1, 2, *[EMPTY] * 5)


def test_a_group_that_is_over_ends_the_reading_between_two_experts(checkpoint: Checkpoint) -> None:
    over = threading.Event()

    @contextmanager
    def source() -> Any:
        with source_of(checkpoint)() as inner:
            yield Interrupting(inner, over)

    (model,) = shares(checkpoint, [(0, 1)])
    (error,) = together([model], join(checkpoint, open_source=source, superseded=over))
    assert isinstance(error, Superseded)
    assert held(model) == [(0, 1, 2, *[EMPTY] * 5), (0, 1)]
    check_weights(model, load_model(checkpoint))
    (done,) = together([model], join(checkpoint))
    assert torch.equal(logits(done.model), logits(load_model(checkpoint)))


@dataclass(frozen=True)
class Interrupting:
    """A weight source during whose first read the group is over."""

    inner: Any
    over: threading.Event

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def read_(self, *args: Any) -> None:
        self.inner.read_(*args)
        self.over.set()


def test_a_dense_model_has_nothing_to_exchange(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_model(make_model("llama", seed=1), tmp_path))
    model = load_share(checkpoint, [])
    (done,) = together([model], lambda model, control: regroup(
        model, control, lambda placements: ExpertParallel(LocalTransport(0), placements), source_of(checkpoint),
        most_slots=0,
    ))  # fmt: skip
    assert torch.equal(logits(done.model), logits(load_model(checkpoint)))
