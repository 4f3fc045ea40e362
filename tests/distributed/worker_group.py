"""A group of worker processes and the test that plays their supervisor.

Processes are forked from one that has torch imported, so that starting one takes a moment.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from typing import Any

from tests.distributed.worker_process import Start, serve

from moestro.protos.sequences import EngineLoad
from moestro.router.mesh import serve_store
from moestro.workers.rank_setup import RankSpec
from moestro.workers.worker_state import WorkerPhase, WorkerState

WAIT_S = 60.0
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.distributed.worker_process"])


@dataclass(slots=True)
class Stream:
    """What came of one sequence."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    is_done: bool = False
    is_lost: bool = False


class Handle:
    """One worker process, as its supervisor has it."""

    def __init__(self, group: WorkerGroup, start: Start) -> None:
        self.seat, self.worker = start.seat, start.worker
        self.states: list[tuple[WorkerState, float]] = []
        self.checked: list[Any] = []
        self.load = EngineLoad()
        self._group = group
        self._pipe, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=serve, args=(theirs, start), daemon=True)
        self.process.start()
        theirs.close()
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def state(self) -> WorkerState:
        return self.states[-1][0] if self.states else WorkerState(WorkerPhase.LOADING)

    def tell(self, *what: Any) -> None:
        self._pipe.send(what)

    def signal(self, number: int) -> float:
        assert self.process.pid is not None
        with suppress(ProcessLookupError):  # its end was before
            os.kill(self.process.pid, number)
        return time.monotonic()

    def _listen(self) -> None:
        while True:
            try:
                what = self._pipe.recv()
            except (EOFError, OSError):
                return
            with self._group.changed:
                match what:
                    case ("state", state, at):
                        self.states.append((state, at))
                    case ("load", load):
                        self.load = load
                    case ("delta", delta, at):
                        self._group.heard(delta, at)
                    case ("lost", name, _):
                        self._group.streams[name].is_lost = True
                    case ("checked", *checked):
                        self.checked.append(checked)
                self._group.changed.notify_all()


class WorkerGroup(AbstractContextManager["WorkerGroup"]):
    """Seats, who sits in them, and the streams that were begun."""

    def __init__(self, spec: RankSpec, boards: bool = True) -> None:
        self.spec, self.boards = spec, boards
        self.changed = threading.Condition()
        self.streams: dict[str, Stream] = {}
        self.seats: dict[int, Handle] = {}
        self.epoch = 0
        self._all: list[Handle] = []
        self._store, self._address = serve_store()

    def __exit__(self, *exc_info: object) -> None:
        for handle in self._all:
            handle.process.kill()
        for handle in self._all:
            handle.process.join()

    def spawn(self, seat: int, held: list[list[int]] | None = None) -> Handle:
        """A worker for a seat, which does not take it yet."""
        start = Start(self.spec, self._address, seat, len(self._all), held, self.boards)
        self._all.append(Handle(self, start))
        return self._all[-1]

    def start(self) -> None:
        """The group at full strength."""
        self.form(self.spawn(seat) for seat in range(self.spec.shape.world_size))
        self.await_serving()

    def form(self, members: Iterable[Handle]) -> float:
        """Tells these of a new epoch; returns when."""
        self.seats = {handle.seat: handle for handle in sorted(members, key=lambda handle: handle.seat)}
        self.epoch += 1
        at = time.monotonic()
        view = [(handle.seat, handle.worker) for handle in self.seats.values()]
        for handle in self.seats.values():
            handle.tell("form", self.epoch, view, self.spec.shape.tp)
        return at

    def await_serving(self) -> float:
        """When the last member came to serve in this epoch."""
        return max(self.await_phase(handle, WorkerPhase.SERVING) for handle in self.seats.values())

    def await_phase(self, handle: Handle, phase: WorkerPhase, epoch: int | None = None) -> float:
        """When the worker came to this phase of this epoch, by default the group's."""
        wanted = self.epoch if epoch is None else epoch

        def reached() -> list[float]:
            return [at for state, at in handle.states if state.phase is phase and state.epoch == wanted]

        self.wait_for(lambda: bool(reached()), f"worker {handle.worker} is not {phase.value} in epoch {wanted}")
        return reached()[0]

    def await_ready(self, handle: Handle) -> None:
        self.wait_for(
            lambda: any(state.phase is WorkerPhase.READY for state, _ in handle.states), f"worker {handle.worker} loads"
        )

    def wait_for(self, holds: Callable[[], bool], what: str) -> None:
        with self.changed:
            if not self.changed.wait_for(holds, WAIT_S):
                states = [(handle.seat, handle.worker, handle.state) for handle in self._all]
                come = {name: len(stream.tokens) for name, stream in self.streams.items() if not stream.is_done}
                raise AssertionError(f"{what}; tokens {come}; {states}")

    def submit(
        self, name: str, seat: int, prompt: Sequence[int], sampling: dict[str, Any], output: Sequence[int] = ()
    ) -> None:
        self.streams[name] = Stream()
        self.seats[seat].tell("submit", name, list(prompt), list(output), sampling)

    def heard(self, delta: Any, at: float) -> None:
        stream = self.streams[delta.sequence_id]
        assert not delta.error, delta.error
        stream.tokens += delta.token_ids
        stream.logprobs += [one.logprob for one in delta.logprobs]
        stream.times += [at] * len(delta.token_ids)
        stream.is_done = delta.finish_reason is not None

    def await_tokens(self, names: Iterable[str], number: int) -> None:
        """Until each of them has so many, or has ended."""
        wanted = [self.streams[name] for name in names]
        self.wait_for(
            lambda: all(len(stream.tokens) >= number or stream.is_done for stream in wanted), "streams stand still"
        )

    def await_done(self, names: Iterable[str]) -> None:
        wanted = {name: self.streams[name] for name in names}
        self.wait_for(lambda: all(stream.is_done for stream in wanted.values()), "streams do not end")

    def check(self) -> None:
        """Nothing leaks and every slot holds what it says, in a group that has nothing to do."""
        for handle in self.seats.values():
            before = len(handle.checked)
            handle.tell("check")
            self.wait_for(lambda handle=handle, before=before: len(handle.checked) > before, "no answer")  # type: ignore[misc]
            assert not handle.checked[-1][0], (handle.seat, handle.checked[-1][0])

    def kill(self, *seats: int, number: int = signal.SIGKILL) -> float:
        """Returns when."""
        return [self.seats[seat].signal(number) for seat in seats][-1]

    def without(self, *seats: int) -> list[Handle]:
        return [handle for seat, handle in self.seats.items() if seat not in seats]
