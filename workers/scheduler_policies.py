"""The two choices of a scheduler that have a classic alternative, kept to show what the modern one is worth.

Continuous batching is Orca's (Yu et al. 2022); blocks on demand are PagedAttention's (Kwon et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from moestro.workers.scheduler_sequence import SequenceState


class Reservation(NamedTuple):
    """What a sequence must be given before it starts."""

    num_tokens: Callable[[SequenceState], int]  # tokens whose blocks it holds from the start, full attention only
    num_spare: Callable[[int], int]  # blocks that must stay free, given how many run before it


# A block for each: an admission is then not undone within the next block_size steps.
_PAGED = Reservation(lambda sequence: len(sequence.token_ids), lambda num_before: num_before)
_MAX_LENGTH = Reservation(lambda sequence: sequence.max_known, lambda num_before: 0)

RESERVATIONS: Mapping[str, Reservation] = {"paged": _PAGED, "max_length": _MAX_LENGTH}

# Whether a step may admit, given how many run when it is planned.
ADMISSIONS: Mapping[str, Callable[[int], bool]] = {
    "continuous": lambda num_running: True,
    "static": lambda num_running: num_running == 0,
}
