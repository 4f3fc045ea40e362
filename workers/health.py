"""Numbers that are not numbers, or not finite: which rows of a step have them, and where they began.

Legend: T tokens of the step, t those of them that this rank routes, M model width, K experts per token.

A NaN in a gate's scores stays in its row: its weights are NaN (``kernels/gate.py``), its hidden state is NaN from
there on, and no other row reads it before its sequence has failed. An infinite number becomes NaN in the next norm; one
that is made behind the last norm but one is still infinite when it is looked for.
"""

from __future__ import annotations

import math

from torch import Tensor


class StepHealth:
    """Watches one forward pass. Costs a reference a layer; nothing leaves the device before ``bad_rows``."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forgets what was seen, before another pass."""
        self._gates: list[tuple[int, int, Tensor]] = []
        self._x_TM: Tensor | None = None

    def saw_gate(self, layer: int, first_token: int, weights_tK: Tensor) -> None:
        """The weights that a gate gave to the tokens from ``first_token`` on."""
        self._gates.append((layer, first_token, weights_tK))

    def saw_result(self, x_TM: Tensor) -> None:
        """The hidden state after the last layer."""
        self._x_TM = x_TM

    def bad_rows(self) -> list[int]:
        """Rows whose hidden state is not finite after the last layer. Waits for the device. The same on every rank of
        a tensor-parallel set."""
        if self._x_TM is None or math.isfinite(self._x_TM.sum().item()):
            return []  # whatever is not finite would be in the sum
        rows: list[int] = self.bad_T().nonzero()[:, 0].tolist()
        return rows

    def bad_T(self) -> Tensor:
        """Of each row whether it is one of ``bad_rows``, on the device. After a pass that computed something."""
        assert self._x_TM is not None
        return ~self._x_TM.isfinite().all(-1)

    def where(self, start: int, stop: int) -> str:
        """In words, where the trouble of the tokens in these rows began. From their first bad gate it spreads to every
        token that sees them, so the lowest layer is it. Known on the rank that routed that token."""
        for layer, first, weights_tK in self._gates:
            if bool(weights_tK[max(0, start - first) : max(0, stop - first), 0].isnan().any()):
                return f"layer {layer}: the gate's scores are not numbers"
        return "the hidden state is not finite after the last layer"
