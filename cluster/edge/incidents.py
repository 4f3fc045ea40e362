"""The records of requests that are not tried again, kept for an operator. Sans-IO, bounded.

A record holds no prompt and no text: what a client sent is not kept beyond its request. ``digest`` and the client's own
request id find it in the client's logs.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

from moestro.cluster.edge.admitted import Admitted
from moestro.protos.errors import Quarantined
from moestro.protos.sequences import SamplingParams


@dataclass(frozen=True, slots=True)
class Death:
    """One engine that died while the request ran there."""

    engine: str
    reason: str
    at_s: float


@dataclass(frozen=True, slots=True)
class Incident:
    """One quarantined request. Times are seconds of the edge's clock."""

    name: str
    request_id: str
    model: str
    digest: str  # of prompt, parameters and seed
    num_prompt_tokens: int
    num_output_tokens: tuple[int, ...]  # accepted, by choice
    sampling: SamplingParams  # of the first choice
    deaths: tuple[Death, ...]

    @property
    def at_s(self) -> float:
        return self.deaths[-1].at_s

    def verdict(self) -> Quarantined:
        """What its caller gets."""
        why = f"{len(self.deaths)} ranks died while the request ran; it is not tried again"
        return Quarantined(f"{why} (`moestro incidents {self.name}`)", self.name)


class Incidents:
    """The latest ``capacity`` records, by name and by request id."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._records: dict[str, Incident] = {}

    def add(self, admitted: Admitted, num_output_tokens: tuple[int, ...], deaths: tuple[Death, ...]) -> Incident:
        """Keeps and returns a new record. ``deaths`` must not be empty."""
        digest = admitted.digest
        name = blake2b(f"{admitted.request_id} {digest}".encode(), digest_size=6).hexdigest()
        record = Incident(
            name=f"incident-{name}",
            request_id=admitted.request_id,
            model=admitted.model,
            digest=digest,
            num_prompt_tokens=len(admitted.prompt_ids),
            num_output_tokens=num_output_tokens,
            sampling=admitted.sampling[0],
            deaths=deaths,
        )
        self._records.pop(record.name, None)
        self._records[record.name] = record
        while len(self._records) > self._capacity:
            del self._records[next(iter(self._records))]
        return record

    def latest(self) -> list[Incident]:
        """All that are kept, the newest first."""
        return list(reversed(self._records.values()))

    def of_request(self, request_id: str) -> Incident | None:
        """The newest of that request."""
        return next((record for record in self.latest() if record.request_id == request_id), None)
