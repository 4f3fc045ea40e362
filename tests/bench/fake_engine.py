"""Engines for the worker of benchmarks.peers, without weights: what they do wrong is in their names."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

from benchmarks.peers.engines.port import Emit, Settings


class Echo:
    """Each step gives every sequence its prompt's last token plus the tokens it has."""

    def __init__(self, settings: Settings) -> None:
        print("an engine that talks on stdout")
        os.write(1, b"and below Python\n")
        self._left: dict[int, tuple[int, int]] = {}  # next token, how many more
        self.settings = settings

    def add(self, number: int, prompt: Sequence[int], num_output: int) -> None:
        self._left[number] = prompt[-1], num_output

    def step(self, emit: Emit) -> None:
        emit({number: [token] for number, (token, _) in self._left.items()})
        after = {number: (token + 1, left - 1) for number, (token, left) in self._left.items()}
        self._left = {number: each for number, each in after.items() if each[1]}


class NeverLoads:
    def __init__(self, settings: Settings) -> None:
        raise ValueError("this model is not for me")


class Dies(Echo):
    def step(self, emit: Emit) -> None:
        print("terminate called", file=sys.stderr, flush=True)
        os._exit(7)


class Hangs(Echo):
    def step(self, emit: Emit) -> None:
        time.sleep(60)


class SaysTooMuch(Echo):
    """One token more than was asked for."""

    def step(self, emit: Emit) -> None:
        emit({number: [token] * (left + 1) for number, (token, left) in self._left.items()})


class Spins(Echo):
    """A thread that never rests, as some thread pools do between two pieces of work."""

    def __init__(self, settings: Settings) -> None:
        import threading

        super().__init__(settings)
        threading.Thread(target=self._spin, daemon=True).start()

    def _spin(self) -> None:
        while True:
            pass
