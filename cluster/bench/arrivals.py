"""When requests are sent: the load a benchmark puts on a server.

An open loop sends on a schedule, whatever the server does, as independent users would; a closed loop keeps a fixed
number of requests in flight, as a batch job would. Only an open loop shows queueing: a closed loop slows down with the
server, and its latencies must never be read as those of users who arrive on their own (coordinated omission).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, islice, takewhile

from moestro.cluster.bench import options
from moestro.cluster.bench.seeds import Stream, generator
from moestro.protos.errors import ConfigError

_EVEN_CV = 1e-6  # below it a gamma's shape overflows, and its gaps are equal to six digits anyway
MOST_REQUESTS = 1_000_000  # a round keeps every timeline in memory


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """A renewal process of ``rate`` requests/s: gaps are gamma distributed with coefficient of variation ``cv``.
    1 is Poisson, 0 a metronome, above 1 bursty."""

    rate: float
    cv: float = 1.0

    def __post_init__(self) -> None:
        options.positive("--rate", self.rate)
        options.within("--cv", self.cv, 0, 100)

    def __str__(self) -> str:
        name = {0.0: "evenly spaced", 1.0: "Poisson"}.get(self.cv, f"gamma cv={self.cv:g}")
        return f"open loop, {self.rate:g} requests/s, {name}"


@dataclass(frozen=True, slots=True)
class Burst:
    """Everything at time 0."""

    def __str__(self) -> str:
        return "open loop, all at once"


@dataclass(frozen=True, slots=True)
class Replay:
    """At the times a trace says, in seconds from its start; never decreasing."""

    times_s: tuple[float, ...]

    def __str__(self) -> str:
        return "open loop, at the times of the trace"


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """``concurrency`` clients, each of which sends its next request when its last one has ended."""

    concurrency: int

    def __post_init__(self) -> None:
        options.within("--concurrency", self.concurrency, 1, 100_000)

    def __str__(self) -> str:
        return f"closed loop, {self.concurrency} at a time"


Scheduled = OpenLoop | Burst | Replay
Load = Scheduled | ClosedLoop


@dataclass(frozen=True, slots=True)
class Extent:
    """How much to send: until ``num_requests`` were sent or ``duration_s`` has passed, whichever comes first. What is
    in flight then is waited for."""

    num_requests: int | None = None
    duration_s: float | None = None

    def __post_init__(self) -> None:
        if self.num_requests is None and self.duration_s is None:
            raise ConfigError("--requests or --duration must be given, got neither")
        if self.num_requests is not None:
            options.within("--requests", self.num_requests, 1, MOST_REQUESTS)
        if self.duration_s is not None:
            options.positive("--duration", self.duration_s)


def arrival_times(load: Scheduled, extent: Extent, seed: int) -> tuple[float, ...]:
    """Times in seconds from the start of the round, never decreasing. A longer extent only adds to the end.
    Raises ConfigError when they would be more than a round can hold, or none at all."""
    times = _endless(load, seed)
    if extent.duration_s is not None:
        limit = extent.duration_s
        times = takewhile(lambda t: t < limit, times)
    count = MOST_REQUESTS + 1 if extent.num_requests is None else extent.num_requests
    drawn = tuple(islice(times, count))
    if len(drawn) > MOST_REQUESTS:
        raise ConfigError(f"--rate times --duration must stay at or below {MOST_REQUESTS} requests, got more")
    if not drawn:
        raise ConfigError(
            f"--duration must leave time for a first request, got {extent.duration_s:g} s and none arrived"
        )
    return drawn


def _endless(load: Scheduled, seed: int) -> Iterator[float]:
    match load:
        case OpenLoop(rate, cv):
            return accumulate(_gaps(rate, cv, seed))
        case Burst():
            return iter(lambda: 0.0, None)
        case Replay(times_s):
            return iter(times_s)


def _gaps(rate: float, cv: float, seed: int) -> Iterator[float]:
    if cv < _EVEN_CV:
        while True:
            yield 1 / rate
    rng = generator(seed, Stream.ARRIVAL)
    shape, scale = 1 / cv**2, cv**2 / rate  # mean shape * scale = 1 / rate, cv = 1 / sqrt(shape)
    while True:
        yield float(rng.gamma(shape, scale))
