"""Ways to serve the same requests differently. Each asks the suite again and says what it did; NotApplicable where the
cluster has no such way, or where asking for it changed nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial

from moestro.cluster.edge.events import Completion
from moestro.cluster.verify.lab import Asked, Lab
from moestro.cluster.verify.suite import Case
from moestro.cluster.verify.target import ExpertState, NotApplicable
from moestro.protos.sequences import Diagnostics

NUM_PLACEMENTS = 3
POLL_S = 0.1
QUIET_S = 0.5
SETTLE_S = 30.0  # a placement that is not reached by then is not waited for


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was asked and answered, and in words what was done to it."""

    asked: list[Asked]
    note: str = ""


Perturbation = Callable[[Lab], Awaitable[Outcome]]


async def again(lab: Lab) -> Outcome:
    """As in the baseline: what differs here needs no perturbation."""
    return Outcome(await lab.one_by_one(lab.at(lab.places.home)))


async def crowd(lab: Lab) -> Outcome:
    """Within a moment of each other, on a cluster that is busy with other requests."""
    async with lab.crowd() as others:
        asked = await lab.scattered(lab.at(lab.places.home))
    return Outcome(asked, f"all at once, beside {len(others)} other requests")


async def order(lab: Lab) -> Outcome:
    """Together, so that each finds others beside it than in a crowd, and first come those that were last."""
    return Outcome(await lab.together(lab.at(lab.places.home), lab.cases[::-1]), "all at once, last one first")


async def chunked(size: int, lab: Lab) -> Outcome:
    """At most ``size`` tokens of each a step."""

    def disturb(_: Case) -> Diagnostics:
        return Diagnostics(rank=lab.places.home, max_chunk=size, trace=True)

    return Outcome(await lab.together(disturb))


async def preempted(lab: Lab) -> Outcome:
    """Each loses its KV cache once, somewhere within its answer."""
    rng = lab.rng("preempted")
    at = {name: rng.randint(1, max(1, _num_output(answer) - 1)) for name, answer in lab.baseline.items()}

    def disturb(case: Case) -> Diagnostics:
        return Diagnostics(rank=lab.places.home, preempt_at=at[case.name], trace=True)

    asked = await lab.together(disturb)
    count = sum(answer.usage.preemptions for answer in _answers(asked))
    if not count:
        raise NotApplicable("no request was preempted: their answers are too short")
    return Outcome(asked, f"{count} preemptions")


async def cached(lab: Lab) -> Outcome:
    """Twice without prompt logprobs, so that prompts are looked for in the cache, and found the second time."""
    cases = [case.without_prompt_logprobs() for case in lab.cases]
    first = await lab.one_by_one(lab.at(lab.places.home), cases)
    asked = await lab.one_by_one(lab.at(lab.places.home), cases)
    count = sum(answer.usage.cached_tokens for answer in _answers(asked))
    if not count:
        raise NotApplicable("no prompt token was found in the cache")
    return Outcome([*first, *asked], f"asked twice, {count} prompt tokens found")


async def other_rank(lab: Lab) -> Outcome:
    """On every other rank of the group."""
    if not lab.places.others:
        raise NotApplicable("one rank")
    asked = [asked for rank in lab.places.others for asked in await lab.together(lab.at(rank))]
    return Outcome(asked, ", ".join(lab.places.others))


async def other_group(lab: Lab) -> Outcome:
    """On another copy of the model, each of them."""
    if not lab.places.elsewhere:
        raise NotApplicable("one group")
    asked = [asked for rank in lab.places.elsewhere for asked in await lab.together(lab.at(rank))]
    return Outcome(asked, ", ".join(lab.places.elsewhere))


async def rebalanced(lab: Lab) -> Outcome:
    """Asks while experts move, over and over until they have been everywhere, and once more when they rest."""
    group, home = lab.places.group, lab.at(lab.places.home)
    if not group:
        raise NotApplicable("the server names no group")
    before = await lab.target.experts(group)
    rng = lab.rng("placements")
    first, *rest = [rng.getrandbits(64) for _ in range(NUM_PLACEMENTS)]
    await lab.target.set_placement(group, first)
    moving = asyncio.create_task(_move(lab, before, rest))
    asked: list[Asked] = []
    try:
        while not moving.done():
            asked += await lab.scattered(home)
        asked += await lab.together(home)
        num_reached = await moving
    finally:
        moving.cancel()
        await lab.target.set_placement(group, None)
    count = (await lab.target.experts(group)).switched_layers - before.switched_layers
    if not count:
        raise NotApplicable("no layer was switched")
    return Outcome(asked, f"{count} layers switched, {num_reached} of {NUM_PLACEMENTS} placements reached")


async def _move(lab: Lab, before: ExpertState, seeds: list[int]) -> int:
    """Waits until the placement under way is reached, then asks for the next. Returns how many were reached."""
    group = lab.places.group
    num_reached = int(await _settled(lab, before))
    for seed in seeds:
        before = await lab.target.experts(group)
        await lab.target.set_placement(group, seed)
        num_reached += await _settled(lab, before)
    return num_reached


async def _settled(lab: Lab, before: ExpertState) -> bool:
    """Waits until layers have been switched and none has been for a while; False when that takes too long."""
    now = asyncio.get_running_loop().time
    asked_at = changed_at = now()
    last = before
    while now() - asked_at < SETTLE_S:
        await asyncio.sleep(POLL_S)
        state = await lab.target.experts(lab.places.group)
        if state.switched_layers != last.switched_layers:
            last, changed_at = state, now()
        elif last is not before and not state.is_moving and now() - changed_at > QUIET_S:
            return True
    return False


def _answers(asked: list[Asked]) -> list[Completion]:
    return [each.result for each in asked if isinstance(each.result, Completion)]


def _num_output(answer: Completion) -> int:
    return max(len(choice.token_ids) for choice in answer.choices)


PERTURBATIONS: Mapping[str, Perturbation] = {
    "again": again,
    "crowd": crowd,
    "order": order,
    "chunked by 1": partial(chunked, 1),
    "chunked by 7": partial(chunked, 7),
    "chunked by 16": partial(chunked, 16),
    "preempted": preempted,
    "cached": cached,
    "other rank": other_rank,
    "other group": other_group,
    "rebalanced": rebalanced,
}
