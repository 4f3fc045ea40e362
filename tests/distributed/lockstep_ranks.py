"""What each rank does in test_lockstep: runs in processes of its own."""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from dataclasses import dataclass, field

import torch

from moestro.router.mesh import Mesh, StoreAddress, join
from moestro.router.parallel import GroupShape
from moestro.workers.lockstep import Lockstep, make_lockstep


@dataclass
class Rank:
    """An engine loop without an engine. A message is the number of steps it is worth; leaders receive them."""

    mesh: Mesh
    lockstep: Lockstep
    inbox: deque[bytes] = field(default_factory=deque)
    pending: int = 0
    done: int = 0
    steps: int = 0
    sleeps: int = 0
    agreed: list[tuple[int, ...]] = field(default_factory=list)
    clocks: list[float] = field(default_factory=list)
    woken_at: list[float] = field(default_factory=list)

    def post(self, steps: int) -> None:
        self.inbox.append(str(steps).encode())
        self.lockstep.wake()

    def run(self) -> None:
        while True:
            mine = [self.inbox.popleft() for _ in range(len(self.inbox))]
            messages, now = self.lockstep.begin(mine, time.monotonic() + self.mesh.rank)
            self.pending += sum(map(int, messages))
            self.clocks.append(now)
            agreement = self.lockstep.agree(min(self.pending, 3))
            self.agreed.append((*agreement.tokens_per_rank, *agreement.stopping))
            self.steps += 1
            if agreement.stop:
                return
            if agreement.idle:
                self.sleeps += 1
                self.lockstep.sleep()
                self.woken_at.append(time.time())
                continue
            tokens = agreement.tokens_per_rank[self.mesh.rank]
            self.mesh.world.all_gather(torch.tensor([tokens]))  # stands for the layers
            self.pending -= tokens
            self.done += tokens


def start(rank: int, address: StoreAddress, dp: int, tp: int, epoch: int = 0) -> Rank:
    mesh = join(GroupShape(dp, tp), rank, address.connect(30), epoch=epoch, timeout_s=30)
    return Rank(mesh, make_lockstep(mesh, address))


def random_work(rank: int, world_size: int, address: StoreAddress, tp: int, seed: int) -> dict[str, object]:
    """Leaders get work at random moments while the group falls asleep and wakes; the last to be done stops all."""
    me = start(rank, address, world_size // tp, tp)
    chance = random.Random(seed * 100 + rank)
    posted = [chance.randint(1, 12) for _ in range(40)]
    store = address.connect(30)

    def network() -> None:
        for steps in posted:
            time.sleep(chance.choice([0, 0, 0.0005, 0.005, 0.03]))
            me.post(steps)
        while me.done < sum(posted):
            time.sleep(0.01)
        if store.add("finished", 1) == world_size // tp:
            time.sleep(0.2)  # an ample pause for the group to fall asleep once more: stop must wake it
            me.lockstep.stop()

    thread = threading.Thread(target=network, daemon=True)
    if me.mesh.shape.tp_rank(rank) == 0:
        thread.start()
    me.run()
    me.lockstep.close()
    me.mesh.close()
    leader = me.mesh.shape.leader(rank)
    chance_of_leader = random.Random(seed * 100 + leader)
    return {
        "expected": sum(chance_of_leader.randint(1, 12) for _ in range(40)),
        "done": me.done,
        "steps": me.steps,
        "sleeps": me.sleeps,
        "agreed": me.agreed,
        "clocks": me.clocks,
    }


def sleep_and_wake(rank: int, world_size: int, address: StoreAddress) -> dict[str, object]:
    """Rank 0 watches: processor time of a second asleep, latency of waking all, then ``stop`` while asleep."""
    me = start(rank, address, world_size, 1)
    store = address.connect(30)
    report: dict[str, object] = {}

    def watch() -> None:
        time.sleep(0.3)
        before = time.process_time()
        time.sleep(1.0)
        report["cpu_s"] = time.process_time() - before
        latencies, costs = [], []
        for number in range(10):
            posted_at = time.time()
            if rank == 0:
                start_of_wake = time.perf_counter()
                me.post(1)
                costs.append(time.perf_counter() - start_of_wake)
                me.lockstep.wake()  # twice does no harm
                store.set(f"posted/{number}", repr(posted_at))
            posted_at = float(store.get(f"posted/{number}"))
            time.sleep(0.1)
            latencies.append(min(at for at in me.woken_at if at > posted_at) - posted_at)
        report["latencies_s"], report["wake_call_s"] = latencies, costs
        report["sleeps"] = me.sleeps
        store.add("ready", 1)
        if rank == 0:
            while int(store.add("ready", 0)) < world_size:
                time.sleep(0.01)
            me.lockstep.stop()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    me.run()
    thread.join(10)
    report["keys_left"] = sum("wake" in key for key in store.list_keys())
    report["done"] = me.done
    store.add("listed", 1)
    while int(store.add("listed", 0)) < world_size:
        time.sleep(0.01)
    me.lockstep.close()
    me.mesh.close()
    return report


def disagree(rank: int, world_size: int, address: StoreAddress) -> list[str]:
    """Tensor-parallel peers that planned different numbers, then ranks in different steps."""
    errors = []
    me = start(rank, address, 1, world_size)
    for tokens, steps_skipped in ((rank, 0), (1, rank)):
        me.lockstep._step += steps_skipped  # type: ignore[attr-defined]
        try:
            me.lockstep.agree(tokens)
        except RuntimeError as error:
            errors.append(f"{type(error).__name__}: {error}")
    me.mesh.close()
    return errors


def inboxes(rank: int, world_size: int, address: StoreAddress) -> list[object]:
    """Inboxes of every awkward size, from the leader to its peers."""
    me = start(rank, address, 1, world_size)
    seen: list[object] = []
    for messages in ([], [b""], [b"", b"a", b""], [b"x" * 4076], [b"x" * 4077], [b"y" * 100_000, b"z"]):
        got, now = me.lockstep.begin(messages if rank == 0 else [b"dropped"], 0.1 if rank == 0 else 9.9)
        seen.append([got == messages, now])
    me.mesh.close()
    return seen
