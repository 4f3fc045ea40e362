"""Which steps are captured and how large their graphs are: pure functions of what all ranks of a group know."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from moestro.router.parallel import GroupShape

_FEW = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class GraphSizes:
    """Numbers of rows for which there is a graph, ascending."""

    rows: tuple[int, ...]

    def __post_init__(self) -> None:
        if list(self.rows) != sorted(set(self.rows)) or min(self.rows, default=1) < 1:
            raise ValueError(f"sizes of graphs must be positive and ascending, got {self.rows}")

    @property
    def largest(self) -> int:
        return self.rows[-1] if self.rows else 0

    def fit(self, num_tokens_N: tuple[int, ...]) -> int | None:
        """The smallest graph that holds the tokens of every rank; None where there is none, or nothing to compute.
        All ranks get the same answer."""
        most = max(num_tokens_N)
        return None if most == 0 or most > self.largest else self.rows[bisect_left(self.rows, most)]


def graph_sizes(largest: int, shape: GroupShape) -> GraphSizes:
    """Graphs for up to ``largest`` rows.

    Alone: 1, 2, 4, 8, then multiples of 8, of 16 from 64 on and of 32 from 128 on, as vLLM and SGLang have them: little
    padding, and few graphs. In a group: powers of two, the buckets of the fixed-capacity transport, so that a rank that
    replays a graph and one that computes a short prompt eagerly in the same step make the same collectives. That wants
    a tensor-parallel size that is a power of two as well, else shares of a bucket fall into other buckets than shares
    of its tokens: for others there is no graph.
    """
    if shape.world_size == 1:
        wanted = (*_FEW, *range(16, 64, 8), *range(64, 128, 16), *range(128, largest + 1, 32))
    elif shape.tp & (shape.tp - 1) == 0:
        wanted = tuple(1 << power for power in range(largest.bit_length()))
    else:
        wanted = ()
    return GraphSizes(tuple(rows for rows in wanted if rows <= largest))
