"""From timelines to numbers. Pure: records in, metrics out.

- Latencies (TTFT, TPOT, ITL, end to end) are over completed requests only; failures are counted beside them by code.
- The round lasts from its start to the end of its last stream, ramp-up and drain included; rates divide by that.
- Input and output tokens are those of completed requests; tokens of failed ones are counted apart.
- Goodput divides by all requests sent: a failed request is a missed one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moestro.cluster.bench.records import RequestRecord
from moestro.cluster.bench.slo import Slo
from moestro.cluster.bench.summaries import Summary, summarize


@dataclass(frozen=True, slots=True)
class Throughput:
    """Per second of the round."""

    requests_per_s: float
    input_tokens_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Goodput:
    """Requests that completed within the objective."""

    met: int
    share: float  # of all requests sent
    requests_per_s: float


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Requests/s between the first and the last: as asked for, as drawn from the process (a sample differs from its
    mean), and as really sent. None where there is no such thing (a closed loop, or requests that all come at once)."""

    asked_per_s: float | None
    scheduled_per_s: float | None
    achieved_per_s: float | None


@dataclass(frozen=True, slots=True)
class ServerSide:
    """What the server's own ledgers say, over the completed requests that had one."""

    queued_s: Summary
    prefill_s: Summary
    cached_tokens: int
    preemptions: int


@dataclass(frozen=True, slots=True)
class Metrics:
    """Everything measured in one round. Seconds and tokens."""

    duration_s: float
    sent: int
    completed: int
    short: int  # completed with fewer tokens than asked for
    errors: Mapping[str, int]  # by code
    error_examples: Mapping[str, str]  # the first message of each code
    input_tokens: int
    output_tokens: int
    discarded_tokens: int  # received by requests that failed later
    tokens_per_message: float | None
    throughput: Throughput
    goodput: Goodput | None
    ttft_s: Summary | None
    tpot_s: Summary | None
    itl_s: Summary | None
    e2e_s: Summary | None
    input_length: Summary | None
    output_length: Summary | None
    arrivals: Arrivals
    client_lag_s: Summary | None  # how late requests were sent; None in a closed loop
    loop_delay_s: Summary | None  # how late the client's own event loop woke up
    client_cores: float | None  # processor time of the client's process per second of the round
    mean_in_flight: float
    peak_in_flight: int
    server: ServerSide | None


def compute_metrics(
    records: Sequence[RequestRecord],
    *,
    slo: Slo | None = None,
    asked_per_s: float | None = None,
    scheduled_load: bool = True,
    loop_delays_s: Sequence[float] = (),
    client_cpu_s: float | None = None,
) -> Metrics:
    """The metrics of one round. ``scheduled_load`` is False for a closed loop, where nothing was due at a set time;
    ``loop_delays_s`` are the delays of the client's event loop, sampled through the round, and ``client_cpu_s`` the
    processor time its process used."""
    done = [r for r in records if r.error is None]
    failed = [r for r in records if r.error is not None]
    duration_s = max((r.done_s for r in records), default=0.0)
    input_tokens = sum(r.input_tokens or 0 for r in done)
    output_tokens = sum(r.output_tokens for r in done)
    messages = sum(len(r.message_times_s) for r in done)
    in_flight = [(r.sent_s, r.done_s) for r in records]
    return Metrics(
        duration_s=duration_s,
        sent=len(records),
        completed=len(done),
        short=sum(r.output_tokens < r.asked_tokens for r in done),
        errors=dict(sorted(Counter(r.error for r in failed if r.error is not None).items())),
        error_examples=_first_messages(failed),
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        discarded_tokens=sum(r.output_tokens for r in failed),
        tokens_per_message=output_tokens / messages if messages else None,
        throughput=Throughput(
            _per_second(len(done), duration_s),
            _per_second(input_tokens, duration_s),
            _per_second(output_tokens, duration_s),
            _per_second(input_tokens + output_tokens, duration_s),
        ),
        goodput=_goodput(records, slo, duration_s) if slo is not None else None,
        ttft_s=summarize([r.ttft_s for r in done]),
        tpot_s=summarize([tpot for r in done if (tpot := r.tpot_s) is not None]),
        itl_s=summarize([gap for r in done for gap in r.itl_s()]),
        e2e_s=summarize([r.e2e_s for r in done]),
        input_length=summarize([r.input_tokens for r in done if r.input_tokens is not None]),
        output_length=summarize([r.output_tokens for r in done]),
        arrivals=_arrivals(records, asked_per_s, scheduled_load),
        client_lag_s=summarize([r.client_lag_s for r in records]) if scheduled_load else None,
        loop_delay_s=summarize(loop_delays_s),
        client_cores=_per_second(client_cpu_s, duration_s) if client_cpu_s is not None else None,
        mean_in_flight=_per_second(sum(end - start for start, end in in_flight), duration_s),
        peak_in_flight=_peak(in_flight),
        server=_server_side(done),
    )


def _per_second(amount: float, duration_s: float) -> float:
    return amount / duration_s if duration_s > 0 else 0.0


def _first_messages(failed: Sequence[RequestRecord]) -> dict[str, str]:
    examples: dict[str, str] = {}
    for record in failed:
        examples.setdefault(str(record.error), record.error_message or "")
    return dict(sorted(examples.items()))


def _goodput(records: Sequence[RequestRecord], slo: Slo, duration_s: float) -> Goodput:
    met = sum(r.error is None and slo.met_by(r.ttft_s, r.tpot_s, r.e2e_s) for r in records)
    return Goodput(met, met / len(records) if records else 0.0, _per_second(met, duration_s))


def _arrivals(records: Sequence[RequestRecord], asked_per_s: float | None, scheduled_load: bool) -> Arrivals:
    if not scheduled_load:
        return Arrivals(None, None, _rate([r.sent_s for r in records]))
    return Arrivals(asked_per_s, _rate([r.scheduled_s for r in records]), _rate([r.sent_s for r in records]))


def _rate(times_s: Sequence[float]) -> float | None:
    """Events per second between the first and the last: n - 1 gaps; None when they span no time."""
    span = max(times_s) - min(times_s) if times_s else 0.0
    return (len(times_s) - 1) / span if span > 0 else None


def _peak(intervals: Sequence[tuple[float, float]]) -> int:
    """The most intervals open at once; one that ends as another starts is not counted with it."""
    edges = sorted([(start, 1) for start, _ in intervals] + [(end, -1) for _, end in intervals])
    peak = current = 0
    for _, change in edges:
        current += change
        peak = max(peak, current)
    return peak


def _server_side(done: Sequence[RequestRecord]) -> ServerSide | None:
    ledgers = [r.ledger for r in done if r.ledger is not None]
    queued, prefill = summarize([x.queued_s for x in ledgers]), summarize([x.prefill_s for x in ledgers])
    if queued is None or prefill is None:
        return None
    return ServerSide(queued, prefill, sum(x.cached_tokens for x in ledgers), sum(x.preemptions for x in ledgers))
