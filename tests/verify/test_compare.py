"""Two answers compared: any one change is found, at its place, and nothing else is."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.cluster.edge.events import Choice, Completion, PositionLogprobs, TokenLogprob, Usage
from moestro.cluster.verify.compare import Comparison, compare, failed
from moestro.protos.sequences import FinishReason, PositionTrace

NUM_PROMPT, NUM_LAYERS = 4, 3
LENGTH = FinishReason.LENGTH


def logprobs(token_id: int, logprob: float) -> PositionLogprobs:
    top = (TokenLogprob(token_id, logprob, "x"), TokenLogprob(9, logprob - 1, "y"))
    return PositionLogprobs(top[0], top)


def choice(index: int, tokens: tuple[int, ...]) -> Choice:
    num_computed = NUM_PROMPT + len(tokens) - 1
    return Choice(
        index=index,
        text="",
        token_ids=tokens,
        finish_reason=LENGTH,
        logprobs=tuple(logprobs(token, 0.0 - 0.5 * i) for i, token in enumerate(tokens)),
        trace=tuple(PositionTrace(p, tuple(100 * p + i for i in range(NUM_LAYERS))) for p in range(num_computed)),
    )


ANSWER = Completion(
    request_id="r",
    model="m",
    seed=1,
    choices=(choice(0, (5, 6, 7)), choice(1, (5, 8))),
    usage=Usage(prompt_tokens=NUM_PROMPT),
    prompt_logprobs=(PositionLogprobs(None), *(logprobs(i, -float(i)) for i in range(1, NUM_PROMPT))),
)


def changed(index: int, **changes: object) -> Completion:
    choices = list(ANSWER.choices)
    choices[index] = replace(choices[index], **changes)  # type: ignore[arg-type]
    return replace(ANSWER, choices=tuple(choices))


def traced(*positions: PositionTrace) -> Completion:
    return changed(0, trace=positions)


def test_an_answer_equals_itself_and_the_counts_are_those_of_its_parts() -> None:
    assert compare("a", ANSWER, ANSWER) == Comparison(5, NUM_PROMPT - 1 + 5, NUM_LAYERS * (6 + 5), None)


def test_what_may_differ() -> None:
    usage = replace(ANSWER, request_id="s", usage=Usage(prompt_tokens=NUM_PROMPT, queued_s=3.0, preemptions=2))
    assert compare("a", ANSWER, usage).difference is None
    found_in_cache = traced(*ANSWER.choices[0].trace[3:])
    compared = compare("a", ANSWER, found_in_cache)
    assert (compared.difference, compared.hidden_states) == (None, NUM_LAYERS * (3 + 5))
    computed_twice = traced(*ANSWER.choices[0].trace, *ANSWER.choices[0].trace)
    assert compare("a", ANSWER, computed_twice).hidden_states == NUM_LAYERS * (12 + 5)
    assert compare("a", ANSWER, replace(ANSWER, prompt_logprobs=None)) == Comparison(5, 5, NUM_LAYERS * 11, None)


def test_a_token_that_differs_ends_what_is_compared_of_its_choice() -> None:
    other = changed(0, token_ids=(5, 1, 7))
    compared = compare("a", ANSWER, other)
    assert compared.difference is not None
    assert (compared.difference.what, compared.difference.index) == ("token", 1)
    assert (compared.difference.expected, compared.difference.got) == ("6", "1")
    # One token of choice 0 and both of choice 1; position 4 holds token 0, position 5 the one that differs.
    assert (compared.tokens, compared.logprobs) == (1 + 2, NUM_PROMPT - 1 + 1 + 2)
    assert compared.hidden_states == NUM_LAYERS * (5 + 5)


def test_hidden_states_after_a_token_that_differs_are_not_blamed() -> None:
    later = (*ANSWER.choices[0].trace[:5], PositionTrace(5, (0, 0, 0)))
    compared = compare("a", ANSWER, changed(0, token_ids=(5, 1, 7), trace=later))
    assert compared.difference is not None
    assert compared.difference.position is None
    same_tokens = compare("a", ANSWER, changed(0, trace=later)).difference
    assert same_tokens is not None
    assert (same_tokens.what, same_tokens.position, same_tokens.layer) == ("hidden state", 5, 0)


@pytest.mark.parametrize("tokens", [(5, 6), (5, 6, 7, 8), ()])
def test_a_shorter_or_longer_answer_differs_at_its_end(tokens: tuple[int, ...]) -> None:
    difference = compare("a", ANSWER, changed(0, token_ids=tokens)).difference
    assert difference is not None
    assert (difference.what, difference.index) == ("token", min(len(tokens), 3))
    assert "the end" in (difference.expected, difference.got)


def test_the_last_bit_of_a_logprob_and_the_sign_of_zero() -> None:
    positions = list(ANSWER.choices[0].logprobs)
    assert positions[0].token is not None
    assert positions[0].token.logprob == 0.0
    positions[0] = logprobs(5, -0.0)
    difference = compare("a", ANSWER, changed(0, logprobs=tuple(positions))).difference
    assert difference is not None
    assert (difference.what, difference.index) == ("logprob", 0)
    assert (difference.expected, difference.got) == ("0.0 for token 5", "-0.0 for token 5")


def test_an_alternative_alone_is_named() -> None:
    positions = list(ANSWER.choices[1].logprobs)
    positions[1] = positions[1]._replace(top=(positions[1].top[0], TokenLogprob(9, -1.25, "y")))
    difference = compare("a", ANSWER, changed(1, logprobs=tuple(positions))).difference
    assert difference is not None
    assert str(difference) == "request a, choice 1, logprob 1: -1.5 for token 9 became -1.25 for token 9"


def test_prompt_logprobs_endings_and_choices() -> None:
    assert ANSWER.prompt_logprobs is not None
    prompt = (*ANSWER.prompt_logprobs[:2], logprobs(2, -2.5), ANSWER.prompt_logprobs[3])
    found = compare("a", ANSWER, replace(ANSWER, prompt_logprobs=prompt)).difference
    assert found is not None
    assert (found.what, found.index) == ("prompt logprob", 2)
    found = compare("a", ANSWER, changed(1, finish_reason=FinishReason.EOS)).difference
    assert found is not None
    assert (found.what, found.choice, found.expected, found.got) == ("finish reason", 1, "length", "eos")
    found = compare("a", ANSWER, replace(ANSWER, choices=ANSWER.choices[:1])).difference
    assert found is not None
    assert (found.what, found.expected, found.got) == ("answer", "2 choices", "1 choices")


@given(st.data())
def test_the_first_of_several_hidden_states_by_position_then_layer(data: st.DataObject) -> None:
    places = st.tuples(st.integers(0, 5), st.integers(0, NUM_LAYERS - 1))
    faults = data.draw(st.sets(places, min_size=1))
    order = data.draw(st.permutations(ANSWER.choices[0].trace))
    trace = [
        PositionTrace(p.position, tuple(value + ((p.position, i) in faults) for i, value in enumerate(p.layers)))
        for p in order
    ]
    difference = compare("a", ANSWER, traced(*trace)).difference
    assert difference is not None
    assert (difference.position, difference.layer) == min(faults)


def test_sums_keep_the_first_difference() -> None:
    first, second = failed("a", "gone"), failed("b", "lost")
    total = Comparison(1, 2, 3) + first + Comparison(10, 20, 30) + second
    assert (total.tokens, total.logprobs, total.hidden_states) == (11, 22, 33)
    assert total.difference is not None
    assert total.difference.request == "a"
    assert "a failure (gone)" in str(total.difference)
