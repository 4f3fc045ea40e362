"""Which transport serves a dispatch, and why: one pure function of the problem and the deployment.

All of its inputs are the same on every rank, so all ranks choose the same. Nothing is chosen in place of what was asked
for: what was asked for and cannot serve is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, get_args

import torch

from moestro.protos.errors import ConfigError

TransportKind = Literal["local", "shared_memory", "gather_scatter", "all_to_all", "fixed_capacity", "deep_ep"]
KINDS: tuple[TransportKind, ...] = get_args(TransportKind)

_DEEP_EP_WIDTHS = (2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192)
"""Model widths for which DeepEP's low-latency kernels are compiled."""
_DEEP_EP_MAX_PAIRS = 508
"""Rows of a rank for which its queues suffice: a multiple of 4 with (rows + 1) · 2 ≤ 1024, the depth it sets itself."""

_EXCHANGE_BYTES = {"cpu": 512 * 1024, "cuda": 4 * 2**20}
"""Superfluous bytes received that cost about as much as an exchange of counts. On a CPU (gloo over loopback) measured
with ``benchmarks.transports``. On CUDA an assumption, unmeasured: 40 µs of latency and host wait at 100 GB/s."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One dispatch, as all ranks know it."""

    num_tokens_N: tuple[int, ...]
    top_k: int
    width: int  # of the model
    dtype: torch.dtype
    capacity: int  # slots of a rank

    @property
    def num_ranks(self) -> int:
        return len(self.num_tokens_N)

    @property
    def superfluous_bytes(self) -> float:
        """What a rank receives in a gather and does not need, if routing is even over ranks."""
        needless = (1 - 1 / self.num_ranks) ** self.top_k
        return sum(self.num_tokens_N) * needless * self.width * self.dtype.itemsize

    @property
    def board_bytes(self) -> int:
        """What the busiest rank puts on a board: every pair's row and slot, and what rounding the slots takes."""
        return max(self.num_tokens_N) * self.top_k * (self.width * self.dtype.itemsize + 4) + 64


@dataclass(frozen=True, slots=True)
class Deployment:
    """Where a group runs, the same on all of its ranks."""

    device: Literal["cpu", "cuda"] = "cpu"
    backends: frozenset[str] = frozenset({"gloo"})  # process groups that can be had: gloo, nccl
    captured_tokens: int = 0  # of the busiest rank, up to which any rank may have captured the step as a CUDA graph
    board_bytes: int = 0  # that a rank can put on the board of the group; 0 for none
    no_board: str = "the ranks share no memory"  # why there is none
    deep_ep: bool = False  # installed
    deep_ep_tokens: int = 0  # of a rank in one dispatch, that its buffer is made for
    asked_for: TransportKind | None = None
    two_batches_from: int | None = None  # tokens of the busiest rank from which a layer is split; None: never


@dataclass(frozen=True, slots=True)
class Choice:
    """A transport and one line that says why; ``others`` says for each other one why not."""

    kind: TransportKind
    reason: str
    others: dict[TransportKind, str] = field(hash=False)


@lru_cache(maxsize=4096)
def choose_transport(problem: Problem, deployment: Deployment) -> Choice:
    """What was asked for, else the first that can serve and is worth it. Raises ConfigError when the one asked for
    cannot serve, or none can."""
    against = {kind: refuse(problem, deployment) for kind, refuse in _REFUSALS.items()}
    asked_for = deployment.asked_for
    if asked_for is not None:
        if against[asked_for]:
            raise ConfigError(f"transport: {asked_for} was asked for and cannot serve: {against[asked_for]}")
        return _choice(asked_for, "it was asked for", against)
    wishes = _wishes(problem, deployment)
    for kind in KINDS:
        if not against[kind] and wishes[kind].worth_it:
            unwanted = {other: against[other] or wishes[other].unless_worth_it for other in KINDS}
            return _choice(kind, wishes[kind].reason, unwanted)
    raise ConfigError(f"transport: none can serve: {'; '.join(f'{kind}: {why}' for kind, why in against.items())}")


def _choice(kind: TransportKind, reason: str, against: dict[TransportKind, str]) -> Choice:
    return Choice(kind, reason, {other: why or f"{kind} was taken" for other, why in against.items() if other != kind})


@dataclass(frozen=True, slots=True)
class _Wish:
    """Whether a transport that can serve should, and why or why not."""

    worth_it: bool
    reason: str

    @property
    def unless_worth_it(self) -> str:
        return "" if self.worth_it else self.reason


def _wishes(problem: Problem, deployment: Deployment) -> dict[TransportKind, _Wish]:
    superfluous, worth = round(problem.superfluous_bytes), _EXCHANGE_BYTES[deployment.device]
    small = superfluous <= worth
    figures = f"a gather brings a rank some {superfluous} bytes too many, an exchange of counts is worth {worth}"
    is_captured = may_be_captured(problem.num_tokens_N, deployment)
    captured = "the step may be captured" if is_captured else "the step is not captured: padding would buy nothing"
    return {
        "local": _Wish(True, "one rank holds every slot"),
        "shared_memory": _Wish(True, "the ranks share the memory of one host: no message is sent"),
        "gather_scatter": _Wish(small, figures),
        "all_to_all": _Wish(not small, figures),
        "fixed_capacity": _Wish(is_captured, captured),
        "deep_ep": _Wish(False, "it is untested here and taken only when asked for"),
    }


def may_be_captured(num_tokens_N: tuple[int, ...], deployment: Deployment) -> bool:
    """Whether some rank may replay a graph in a step of so many tokens. No rank knows of another whether it does, so
    all make the collectives of the graph: nothing may wait for the device, and sizes follow from the bucket alone."""
    return 0 < max(num_tokens_N) <= deployment.captured_tokens


def num_parts(num_tokens_N: tuple[int, ...], deployment: Deployment) -> int:
    """Two-batch overlap (DeepSeek-V3's two micro-batches, here within one layer): 2 where the busiest rank has tokens
    enough, else 1. DeepEP has buffers for one dispatch at a time, and the halves of a bucket are other buckets than the
    halves of its tokens."""
    least = deployment.two_batches_from
    if least is None or deployment.asked_for == "deep_ep" or may_be_captured(num_tokens_N, deployment):
        return 1
    return 2 if max(num_tokens_N) >= max(least, 2) else 1


def _no_group(problem: Problem, deployment: Deployment) -> str:
    needed = "nccl" if deployment.device == "cuda" else "gloo"
    return "" if needed in deployment.backends else f"a group on {deployment.device} needs {needed}, which is missing"


def _waits(problem: Problem, deployment: Deployment) -> str:
    waits = "it reads sizes back from the device, which a captured step must not"
    return waits if may_be_captured(problem.num_tokens_N, deployment) else _no_group(problem, deployment)


def _not_local(problem: Problem, deployment: Deployment) -> str:
    return "" if problem.num_ranks == 1 else f"the slots lie on {problem.num_ranks} ranks"


def _no_board(problem: Problem, deployment: Deployment) -> str:
    if deployment.device != "cpu":
        return f"it needs ranks on cpu, not on {deployment.device}"
    if may_be_captured(problem.num_tokens_N, deployment):
        return "its ranks wait on the host, which a captured step must not"
    if not deployment.board_bytes:
        return f"there is no board: {deployment.no_board}"
    if problem.dtype not in (torch.bfloat16, torch.float32):
        return f"it adds up bfloat16 and float32, not {str(problem.dtype).removeprefix('torch.')}"
    if problem.board_bytes > deployment.board_bytes:
        return f"a rank's part of the board holds {deployment.board_bytes} bytes, not {problem.board_bytes}"
    return ""


def _no_deep_ep(problem: Problem, deployment: Deployment) -> str:
    """The bounds are DeepEP's own, as its host code asserts them."""
    if not deployment.deep_ep:
        return "deep_ep is not installed"
    if deployment.device != "cuda":
        return f"it needs cuda, the ranks are on {deployment.device}"
    if problem.dtype != torch.bfloat16:
        return f"it carries bfloat16, not {str(problem.dtype).removeprefix('torch.')}"
    if problem.width not in _DEEP_EP_WIDTHS:
        return f"it serves model widths {', '.join(map(str, _DEEP_EP_WIDTHS))}, not {problem.width}"
    pairs = deployment.deep_ep_tokens * problem.top_k
    if pairs > _DEEP_EP_MAX_PAIRS:
        return f"its queues hold {_DEEP_EP_MAX_PAIRS} rows a rank, not {pairs} (tokens times experts per token)"
    if max(problem.num_tokens_N) > deployment.deep_ep_tokens:
        return f"its buffer holds {deployment.deep_ep_tokens} tokens a rank, not {max(problem.num_tokens_N)}"
    return ""


_REFUSALS: dict[TransportKind, Callable[[Problem, Deployment], str]] = {
    "local": _not_local,
    "shared_memory": _no_board,
    "gather_scatter": _waits,
    "all_to_all": _waits,
    "fixed_capacity": _no_group,
    "deep_ep": _no_deep_ep,
}
"""For each transport: why it cannot serve, or nothing."""
