"""Who asks, and for how much."""

from __future__ import annotations

from dataclasses import dataclass

from moestro.cluster.edge.journal import Journal
from moestro.cluster.edge.tickets import Ask


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. ``name`` is what admission is fair to; ``remaining_s``: until the caller gives up, by its own clock."""

    name: str = ""
    remaining_s: float | None = None


NOBODY = Caller()  # in particular


def ask_for(journal: Journal, client: str, deadline_s: float) -> Ask:
    """What a request costs from here: of one that is gone on with, what was written before belongs to the prompt."""
    sequences = journal.sequences()
    written = max((len(sequence.output_ids) for sequence in sequences), default=0)
    longest = max((sequence.sampling.max_tokens for sequence in sequences), default=0)
    return Ask(
        client=client,
        prompt_tokens=len(journal.admitted.prompt_ids) + written,
        max_tokens=max(1, longest - written),
        choices=max(1, len(sequences)),
        priority=journal.admitted.priority,
        deadline_s=deadline_s,
    )
