"""The transport of a group: each dispatch goes by the kind that ``choose_transport`` names for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moestro.router.transport import Arrival, Dispatched, Transport
from moestro.router.transports.choose import (
    Choice,
    Deployment,
    Problem,
    TransportKind,
    choose_transport,
    num_parts,
)


@dataclass(frozen=True, slots=True)
class ByCallHandle:
    """The receipt of the transport that was taken."""

    transport: Transport[Any]
    handle: Any


@dataclass(frozen=True, slots=True)
class ByCallTransport(Transport[ByCallHandle]):
    """Takes for each call the transport that suits its size. The ranks choose alike, since they choose from what they
    all know, and the bits are the same whatever they choose."""

    transports: Mapping[TransportKind, Transport[Any]]
    deployment: Deployment
    capacity: int  # slots of a rank

    def choice(self, x_TD: Tensor, slots_TK: Tensor, num_tokens_N: tuple[int, ...]) -> Choice:
        """What a dispatch of these would take, and why."""
        problem = Problem(num_tokens_N, slots_TK.shape[1], x_TD.shape[1], x_TD.dtype, self.capacity)
        return choose_transport(problem, self.deployment)

    def num_parts(self, num_tokens_N: tuple[int, ...]) -> int:
        return num_parts(num_tokens_N, self.deployment)

    def dispatch(
        self, x_TD: Tensor, slots_TK: Tensor, num_tokens_N: tuple[int, ...]
    ) -> Arrival[tuple[Dispatched, ByCallHandle]]:
        transport = self.transports[self.choice(x_TD, slots_TK, num_tokens_N).kind]
        arriving = transport.dispatch(x_TD, slots_TK, num_tokens_N)

        def arrived() -> tuple[Dispatched, ByCallHandle]:
            dispatched, handle = arriving()
            return dispatched, ByCallHandle(transport, handle)

        return arrived

    def combine(self, y_RD: Tensor, weights_TK: Tensor, handle: ByCallHandle) -> Arrival[Tensor]:
        return handle.transport.combine(y_RD, weights_TK, handle.handle)
