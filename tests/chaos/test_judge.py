"""The judge of the chaos harness must see what goes wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
from benchmarks.chaos.judge import judge_answer, judge_beginning

from moestro.cluster.edge.events import (
    ChoiceDelta,
    Completion,
    PositionLogprobs,
    StreamEvent,
    TokenLogprob,
    Usage,
    gather,
)
from moestro.protos.sequences import FinishReason


def position(token: int, logprob: float = -0.5) -> PositionLogprobs:
    return PositionLogprobs(TokenLogprob(token, logprob, f"<{token}>"))


def delta(index: int, token: int, ends: bool = False) -> ChoiceDelta:
    reason = FinishReason.LENGTH if ends else None
    return ChoiceDelta(index, f"<{token}>", (token,), (position(token),), finish_reason=reason)


EVENTS = (
    StreamEvent("r", 0, (delta(0, 5), delta(1, 6)), "m", seed=3, prompt_logprobs=(PositionLogprobs(None), position(9))),
    StreamEvent("r", 1, (delta(0, 7),)),
    StreamEvent("r", 2, (delta(0, 8, ends=True), delta(1, 4, ends=True)), usage=Usage(4, 5)),
)


def expected() -> Completion:
    return gather(EVENTS)


def with_delta(event: int, number: int, **changes: object) -> tuple[StreamEvent, ...]:
    """The events with one delta changed."""
    deltas = list(EVENTS[event].deltas)
    deltas[number] = replace(deltas[number], **changes)  # type: ignore[arg-type]
    return (*EVENTS[:event], EVENTS[event]._replace(deltas=tuple(deltas)), *EVENTS[event + 1 :])


def test_the_same_is_the_same_whole_or_cut_anywhere() -> None:
    assert judge_answer("a", expected(), gather(EVENTS)) == ""
    for end in range(len(EVENTS) + 1):
        assert judge_beginning("a", expected(), EVENTS[:end]) == ""


def test_tokens_may_come_in_other_messages() -> None:
    both = replace(delta(0, 5), text="<5><7>", token_ids=(5, 7), logprobs=(position(5), position(7)))
    events = (EVENTS[0]._replace(deltas=(both, delta(1, 6))), EVENTS[2]._replace(sequence_number=1))
    assert judge_beginning("a", expected(), events) == ""
    assert judge_answer("a", expected(), gather(events)) == ""


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (with_delta(1, 0, token_ids=(8,)), "token 1"),
        (with_delta(1, 0, token_ids=(7, 7), text="<7><7>", logprobs=(position(7), position(7))), ""),  # doubled
        (with_delta(1, 0, token_ids=(), text="", logprobs=()), ""),  # lost
        (with_delta(1, 0, logprobs=(position(7, -0.5000000000000001),)), "logprob 1"),
        (with_delta(1, 0, text="<6>"), "text"),
        (with_delta(2, 1, finish_reason=FinishReason.EOS), "finish reason"),
    ],
)
def test_every_kind_of_difference_is_seen(wrong: tuple[StreamEvent, ...], said: str) -> None:
    for verdict in (judge_answer("a", expected(), gather(wrong)), judge_beginning("a", expected(), wrong)):
        assert verdict
        assert said in verdict


def test_the_rest_of_a_whole_answer_is_compared_too() -> None:
    got = gather(EVENTS)
    assert "missing" in judge_answer("a", expected(), replace(got, prompt_logprobs=None))
    assert "seed" in judge_answer("a", expected(), replace(got, seed=4))
    assert "tokens" in judge_answer("a", expected(), replace(got, usage=Usage(4, 6)))
    assert "choices" in judge_answer("a", expected(), replace(got, choices=got.choices[:1]))


@pytest.mark.parametrize("numbers", [(0, 2, 3), (0, 1, 1), (1, 2, 3)])
def test_gaps_and_repeats_of_sequence_numbers(numbers: tuple[int, ...]) -> None:
    events = [event._replace(sequence_number=number) for event, number in zip(EVENTS, numbers, strict=True)]
    assert "a gap or a repeat" in judge_beginning("a", expected(), events)
