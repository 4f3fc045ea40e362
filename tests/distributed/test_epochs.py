"""Groups of real processes that lose members and get new ones: who is well loses no stream, and no bit changes."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from benchmarks.small_models import make_model, random_ids, save_model
from tests.distributed.worker_group import Handle, WorkerGroup

from moestro.router.parallel import GroupShape
from moestro.workers.rank_setup import RankSpec
from moestro.workers.rebalancing.setup import ExpertsSpec
from moestro.workers.worker_state import WorkerPhase

NUM_TOKENS = 150
WATCHDOG_S = 2.0  # of the test that waits for it; the others run on machines where everything may take long
SEED = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(make_model("qwen3_moe", seed=21).bfloat16(), tmp_path_factory.mktemp("model")))


def spec(model: str, dp: int, tp: int = 1, dtype: str = "auto") -> RankSpec:
    return RankSpec(
        model=model, dtype=dtype, device="cpu", threads=1, kv_bytes=2**22, shape=GroupShape(dp, tp), block_size=4,
        max_num_sequences=8, max_num_tokens=16, experts=ExpertsSpec(redundant=2), watchdog_s=30.0,
    )  # fmt: skip


class Load:
    """Two streams a leader, one greedy and one sampled, and what they say when nothing happens."""

    def __init__(self, group: WorkerGroup) -> None:
        self.group, self.leaders = group, range(0, group.spec.shape.world_size, group.spec.shape.tp)
        self.turn = 0
        names = self.begin()
        group.await_done(names)
        self.expected = {name.split("/")[1]: self.said(name) for name in names}
        group.check()

    def begin(self, seats: Any = None) -> list[str]:
        """Begins the streams of these leaders, by default of all."""
        self.turn += 1
        names = []
        for seat in self.leaders if seats is None else seats:
            for kind in range(2):
                name = f"{self.turn}/{seat}{'gs'[kind]}"
                self.group.submit(name, seat, self.prompt(name), self.sampling(name))
                names.append(name)
        return names

    def prompt(self, name: str) -> list[int]:
        which = name.split("/")[1]
        return random_ids(5 + 3 * int(which[0]), seed=ord(which[1]))

    def sampling(self, name: str) -> dict[str, Any]:
        return {
            "temperature": 0.9 if name.endswith("s") else 0.0, "seed": 7, "max_tokens": NUM_TOKENS, "ignore_eos": True,
            "logprobs": 0,
        }  # fmt: skip

    def said(self, name: str) -> tuple[list[int], list[float]]:
        stream = self.group.streams[name]
        return stream.tokens, stream.logprobs

    def end(self, names: list[str]) -> None:
        """All go on to their end with the same bits; those of a seat that is lost were right so far, and go on
        elsewhere."""
        here = [name for name in names if self.seat(name) in self.group.seats and not self.group.streams[name].is_lost]
        self.group.await_done(here)
        for name in here:
            assert self.said(name) == self.expected[name.split("/")[1]], name
        for name in set(names) - set(here):
            self.replay(name)

    def replay(self, name: str) -> None:
        tokens, logprobs = self.said(name)
        expected_tokens, expected_logprobs = self.expected[name.split("/")[1]]
        num = len(tokens)
        assert 0 < num < NUM_TOKENS, f"{name}: {num} tokens came before it was lost"
        assert (tokens, logprobs) == (expected_tokens[:num], expected_logprobs[:num]), name
        again = f"{name}/again"
        seat = next(iter(self.group.seats))
        self.group.submit(again, seat, self.prompt(name), self.sampling(name), tokens)
        self.group.await_done([again])
        assert self.said(again) == (expected_tokens[num:], expected_logprobs[num:]), again

    def seat(self, name: str) -> int:
        return int(name.split("/")[1][0])


def stall_s(group: WorkerGroup, names: list[str], since: float) -> float:
    """The longest silence of streams that lasted beyond ``since``."""
    gaps = [
        later - earlier
        for name in names
        for earlier, later in zip(group.streams[name].times, group.streams[name].times[1:], strict=False)
        if later > since
    ]
    return max(gaps)


@pytest.fixture(params=["boards", "gloo"])
def group(request: pytest.FixtureRequest, model: str) -> Iterator[WorkerGroup]:
    with WorkerGroup(spec(model, 3), boards=request.param == "boards") as group:
        group.start()
        yield group


def test_a_group_shrinks_and_grows_in_place(group: WorkerGroup) -> None:
    load = Load(group)
    spare = group.spawn(2)

    # One is killed while all have work: the others notice by themselves, and go on where they were.
    names = load.begin()
    group.await_tokens(names, 20)
    killed_at = group.kill(2)
    noticed_at = max(group.await_phase(handle, WorkerPhase.BROKEN) for handle in group.without(2))
    formed_at = group.form(group.without(2))
    serving_at = group.await_serving()
    load.end(names)
    silence_s = stall_s(group, [name for name in names if load.seat(name) < 2], killed_at)
    print(
        f"\nkilled: noticed after {noticed_at - killed_at:.3f} s, serving {serving_at - formed_at:.3f} s after the "
        f"word, longest silence {silence_s:.3f} s"
    )
    group.check()

    # Another takes its seat while the others have work.
    group.await_ready(spare)
    names = load.begin([0, 1])
    group.await_tokens(names, 20)
    formed_at = group.form([*group.seats.values(), spare])
    print(f"grown: serving {group.await_serving() - formed_at:.3f} s after the word")
    names += load.begin([2])
    load.end(names)
    group.check()

    # Killed while all sleep: their supervisor says so, and work finds them awake.
    group.kill(0)
    group.form(group.without(0))
    group.await_serving()
    load.end(load.begin([1, 2]))

    # All but one.
    spares = [group.spawn(0), group.spawn(1)]
    names = load.begin([1, 2])
    group.await_tokens(names, 20)
    group.kill(1)
    group.form(group.without(1))
    group.await_serving()
    load.end(names)
    group.check()

    # Two at once join one.
    names = load.begin([2])
    group.await_tokens(names, 20)
    group.form([*group.seats.values(), *spares])
    group.await_serving()
    load.end(names)
    load.end(load.begin())
    group.check()


def test_who_hangs_is_left_behind_and_told_so(model: str) -> None:
    with WorkerGroup(replace(spec(model, 3), watchdog_s=WATCHDOG_S)) as group:
        group.start()
        load = Load(group)
        names = load.begin()
        group.await_tokens(names, 20)
        stopped, others = group.seats[1], group.without(1)
        stopped_at = group.kill(1, number=signal.SIGSTOP)
        noticed_at = min(group.await_phase(handle, WorkerPhase.BROKEN) for handle in others)
        print(f"\nstopped: noticed after {noticed_at - stopped_at:.3f} s, of which {WATCHDOG_S} s are the watchdog's")
        assert noticed_at - stopped_at > 0.9 * WATCHDOG_S
        progress = [max(state.progress for state, _ in handle.states) for handle in group.seats.values()]
        assert progress[1] == min(progress), "who hangs has come to the fewest collectives"
        group.form(others)
        group.await_serving()
        load.end(names)
        stopped.signal(signal.SIGCONT)
        group.await_phase(stopped, WorkerPhase.BROKEN, epoch=group.epoch - 1)
        stopped.tell("form", group.epoch, [(handle.seat, handle.worker) for handle in others], 1)
        group.await_phase(stopped, WorkerPhase.BROKEN, epoch=group.epoch)
        assert "goes on without this worker" in stopped.state.reason
        load.end(load.begin([0, 2]))
        group.check()


@pytest.mark.parametrize("boards", [True, False])
def test_members_that_are_killed_while_a_group_forms_hold_it_up_no_longer_than_the_next_word(
    model: str, boards: bool
) -> None:
    chance = random.Random(SEED)
    with WorkerGroup(spec(model, 3), boards) as group:
        group.start()
        load = Load(group)
        names = load.begin([0])
        group.await_tokens(names, 5)
        took = []
        for turn in range(4):
            pair = [group.seats[0], *(group.spawn(seat) for seat in (1, 2))]
            for handle in pair[1:]:
                group.await_ready(handle)
            if turn == 3:  # two at once, while they serve
                group.form(pair)
                group.await_serving()
            else:
                group.form(pair)
                time.sleep(chance.choice((0, 0, 0.002, 0.01, 0.03)))
            group.kill(1, 2)
            formed_at = group.form(group.without(1, 2))
            took.append(group.await_serving() - formed_at)
        print(f"\nseed {SEED}: serving alone {', '.join(f'{each:.3f}' for each in took)} s after the word")
        load.end(names)
        group.check()


def test_a_lost_tensor_parallel_peer_costs_its_set_only(model: str) -> None:
    with WorkerGroup(spec(model, 2, 2)) as group:
        group.start()
        load = Load(group)
        names = load.begin()
        group.await_tokens(names, 20)
        group.kill(3)
        for handle in group.without(3):
            group.await_phase(handle, WorkerPhase.BROKEN)
        left = group.seats[2]
        group.form(group.without(2, 3))
        left.signal(signal.SIGKILL)
        group.await_serving()
        load.end(names)
        group.check()
        names = load.begin([0])
        group.await_tokens(names, 20)
        newcomers = [group.spawn(2), group.spawn(3)]
        group.form([*group.seats.values(), *newcomers])
        group.await_serving()
        load.end([*names, *load.begin([2])])
        assert not any(stream.is_lost for stream in group.streams.values())
        group.check()

        # Ranks of a set that were parted in different turns give up what they had, and say so; others do not.
        names = load.begin()
        group.await_tokens(names, 20)
        group.seats[3].tell("part")
        group.form(list(group.seats.values()))
        group.await_serving()
        assert [name for name in names if group.streams[name].is_lost] == [n for n in names if load.seat(n) == 2]
        load.end(names)
        load.end(load.begin())
        group.check()


@pytest.mark.long
@pytest.mark.parametrize(
    ("dp", "tp", "boards", "seed"), [(3, 1, True, 1), (4, 1, False, 2), (2, 2, True, 3), (3, 2, True, 4)]
)
def test_any_faults(model: str, dp: int, tp: int, boards: bool, seed: int) -> None:
    """Sets of ranks are killed or stopped at any moment, also while the group forms without others; all come back."""
    chance = random.Random(seed)
    num_faults = 0
    with WorkerGroup(spec(model, dp, tp), boards) as group:
        group.start()
        load = Load(group)
        for turn in range(12):
            print(f"\nseed {seed}, turn {turn}", end="")
            names = load.begin()
            if chance.random() < 0.8:
                group.await_tokens(names, chance.randint(1, NUM_TOKENS - 20))
            else:
                group.await_done(names)
            left = list(load.leaders)
            for _ in range(chance.randint(1, 2)):
                if len(left) == 1:
                    break
                lost = chance.sample(left, chance.randint(1, len(left) - 1))
                left = [leader for leader in left if leader not in lost]
                how = chance.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP))
                for leader in lost:
                    group.kill(leader + chance.randrange(tp), number=how)
                time.sleep(chance.choice((0, 0.001, 0.02, 0.2)))
                gone = [handle for leader in lost for handle in members(group, leader, tp)]
                for handle in gone:
                    handle.signal(signal.SIGKILL)
                num_faults += len(lost)
                group.form(handle for leader in left for handle in members(group, leader, tp))
                time.sleep(chance.choice((0, 0.001, 0.01, 0.1)))
            group.await_serving()
            load.end([name for name in names if not group.streams[name].is_done or load.seat(name) in left])
            group.check()
            missing = sorted(set(range(dp * tp)) - set(group.seats))
            newcomers = [group.spawn(seat) for seat in missing]
            names = load.begin(left)
            for handle in newcomers:
                group.await_ready(handle)
            group.form([*group.seats.values(), *newcomers])
            group.await_serving()
            load.end(names)
        group.check()
    assert not any(stream.is_lost for stream in group.streams.values())
    print(f"\n{num_faults} faults")


def members(group: WorkerGroup, leader: int, tp: int) -> list[Handle]:
    """One tensor-parallel set."""
    return [group.seats[seat] for seat in range(leader, leader + tp)]
