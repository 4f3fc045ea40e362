"""A steady crowd of clients that know what they should be answered: which a cluster must not fail while it changes."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from moestro.cluster.client import Client

REQUESTS_A_CLIENT = 5  # then a new connection, as users come and go


@dataclass(frozen=True, slots=True)
class Asked:
    """A request by its seed."""

    prompt: tuple[int, ...]
    options: dict[str, Any]

    @staticmethod
    def of(seed: int, vocab_size: int, max_tokens: int) -> Asked:
        rng = random.Random(seed)
        prompt = tuple(rng.randrange(vocab_size) for _ in range(rng.randint(4, 60)))
        sampling = {"temperature": 0.0} if seed % 2 else {"temperature": 0.9, "seed": seed}
        return Asked(prompt, sampling | {"max_tokens": rng.randint(4, max_tokens), "ignore_eos": True})

    def ask(self, client: Client, streamed: bool) -> tuple[int, ...]:
        """The tokens of the answer."""
        if not streamed:
            return tuple(client.generate(self.prompt, **self.options).choices[0].token_ids)
        events = client.stream(self.prompt, **self.options)
        return tuple(token for event in events for delta in event.deltas for token in delta.token_ids)


@dataclass
class Tally:
    """What became of the requests of one stretch of load."""

    answered: int = 0
    wrong: int = 0
    failures: list[str] = field(default_factory=list)
    longest_s: float = 0.0

    @property
    def is_clean(self) -> bool:
        return self.answered > 0 and not self.wrong and not self.failures


class SteadyLoad:
    """``clients`` threads that ask one request after the other while the block runs; half of them stream."""

    def __init__(self, address: str, asked: Sequence[Asked], clients: int, seed: int) -> None:
        self.tally = Tally()
        self._address = address
        self._asked = asked
        self._seed = seed
        self._lock = threading.Lock()
        self._stop = threading.Event()
        with Client(address, timeout_s=120.0) as client:
            self._expected = [each.ask(client, streamed=False) for each in asked]
        self._threads = [threading.Thread(target=self._work, args=(number,), daemon=True) for number in range(clients)]

    def __enter__(self) -> SteadyLoad:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *reason: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _work(self, number: int) -> None:
        rng = random.Random(f"{self._seed} {number}")
        while not self._stop.is_set():
            with Client(self._address, timeout_s=120.0) as client:
                for _ in range(REQUESTS_A_CLIENT):
                    if not self._stop.is_set():
                        self._one(client, rng.randrange(len(self._asked)), streamed=number % 2 == 0)

    def _one(self, client: Client, index: int, streamed: bool) -> None:
        began_s = time.monotonic()
        try:
            answer = self._asked[index].ask(client, streamed)
            failure = ""
        except Exception as error:
            answer, failure = (), f"{type(error).__name__}: {error}"
        with self._lock:
            self.tally.longest_s = max(self.tally.longest_s, time.monotonic() - began_s)
            self.tally.answered += not failure
            self.tally.wrong += not failure and answer != self._expected[index]
            if failure:
                self.tally.failures.append(failure)
