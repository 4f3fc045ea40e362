"""What moves have earned since, by the rows that really came."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moestro.router.placement import Placement
from moestro.router.rebalance.cost_model import fewer_rows_in
from moestro.router.rebalance.messages import Floats
from moestro.router.rebalance.tables import Tables
from moestro.router.rebalance.window import Bucket


@dataclass(slots=True)
class Account:
    """One layer's last move, until the layer moves again or the horizon has passed."""

    entry: int  # of the ledger
    previous: Placement
    predicted_rate: float
    cost_s: float
    opened_at: float
    earned_s: float = 0.0
    settled: bool = False  # its plan has been judged, or will not be

    @property
    def paid(self) -> bool:
        return self.earned_s >= self.cost_s


class Accounts:
    """Compares, layer by layer, the active placement with the one before it. Without an account both are the same."""

    def __init__(self, active: Tables) -> None:
        self._before = active
        self._open: dict[int, Account] = {}

    def get(self, layer: int) -> Account | None:
        return self._open.get(layer)

    def __getitem__(self, layer: int) -> Account:
        return self._open[layer]

    def items(self) -> tuple[tuple[int, Account], ...]:
        return tuple(self._open.items())

    def open(self, layer: int, account: Account) -> None:
        self._before = self._before.with_layer(layer, account.previous)
        self._open[layer] = account

    def slow(self, slowness_R: Floats) -> None:
        """The ranks are so slow from here on."""
        self._before = self._before.slowed(slowness_R)

    def close(self, layer: int) -> None:
        self._open.pop(layer, None)

    def credit(self, bucket: Bucket, active: Tables, s_per_row: float) -> Iterator[tuple[int, Account, float]]:
        """Adds what each layer's move saved in a bucket; yields layer, account and seconds (negative: lost)."""
        layers = list(self._open)
        for layer, rows in zip(layers, self._fewer(bucket, active, layers), strict=True):
            account = self._open[layer]
            account.earned_s += rows * s_per_row
            yield layer, account, rows * s_per_row

    def rate(self, layer: int, buckets: Sequence[Bucket], active: Tables, s_per_row: float) -> float:
        """Seconds saved per second by a layer's move, over buckets after it; 0 without any."""
        wall_s = sum(bucket.seconds for bucket in buckets)
        rows = sum(self._fewer(bucket, active, [layer])[0] for bucket in buckets)
        return rows * s_per_row / wall_s if wall_s else 0.0

    def _fewer(self, bucket: Bucket, active: Tables, layers: list[int]) -> list[float]:
        return fewer_rows_in(bucket, self._before.only(layers), active.only(layers), layers) if layers else []
