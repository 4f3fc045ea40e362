"""The journal alone: deltas in, events and cancels out."""

from __future__ import annotations

import random

import pytest
from tests.edge.fakes import VOCAB_SIZE, FakeText, FakeTextStream

from moestro.cluster.edge.admitted import Admitted
from moestro.cluster.edge.events import StreamEvent, gather
from moestro.cluster.edge.journal import Journal
from moestro.cluster.edge.stub import stub_token
from moestro.protos.errors import SequenceFailed, Unavailable
from moestro.protos.sequences import (
    FinishReason,
    SamplingParams,
    SequenceDelta,
    SequenceLedger,
    SequenceRequest,
    TokenLogprobs,
)


def journal(n: int = 1, stops: tuple[str, ...] = (), max_tokens: int = 10) -> Journal:
    params = tuple(SamplingParams(seed=i, max_tokens=max_tokens) for i in range(n))
    admitted = Admitted("r", "fake", (1, 2, 3), params, seed=9, stop_strings=stops, priority=4)
    return Journal(admitted, FakeText(), FakeTextStream, now_s=100.0)


def ids(text: str) -> tuple[int, ...]:
    return tuple(ord(c) - 32 for c in text)


def test_first_event_has_model_and_seed_and_last_has_usage() -> None:
    j = journal()
    first = j.accept([SequenceDelta("r/0", ids("a"))], 101.0).event
    second = j.accept([SequenceDelta("r/0", ids("b"))], 101.5).event
    ledger = SequenceLedger(queued_s=0.5, prefill_s=0.25, decode_s=2.0, num_cached_tokens=2, num_preemptions=1)
    last = j.accept([SequenceDelta("r/0", ids("c"), finish_reason=FinishReason.LENGTH, ledger=ledger)], 103.0).event
    assert first is not None
    assert second is not None
    assert last is not None
    assert [(e.sequence_number, e.model, e.seed, e.usage is None) for e in (first, second, last)] == [
        (0, "fake", 9, True),
        (1, "", None, True),
        (2, "", None, False),
    ]
    assert j.finished
    whole = gather([first, second, last])
    assert (whole.text, whole.choices[0].token_ids, whole.finish_reason) == ("abc", ids("abc"), FinishReason.LENGTH)
    usage = whole.usage
    assert (usage.prompt_tokens, usage.output_tokens, usage.cached_tokens, usage.preemptions) == (3, 3, 2, 1)
    assert (usage.queued_s, usage.prefill_s, usage.decode_s) == (0.5, 0.25, 2.0)


def test_eos_and_stop_token_are_ids_but_not_text() -> None:
    for reason in (FinishReason.EOS, FinishReason.STOP_TOKEN):
        event = journal().accept([SequenceDelta("r/0", ids("ab!"), finish_reason=reason)], 101.0).event
        assert event is not None
        assert (event.text, event.deltas[0].token_ids) == ("ab", ids("ab!"))


def test_stop_string_across_deltas_cuts_text_and_counts_only_tokens_used() -> None:
    j = journal(stops=("END",))
    parts = [j.accept([SequenceDelta("r/0", ids(text))], 101.0) for text in ("abE", "N")]
    last = j.accept(
        [SequenceDelta("r/0", ids("Dxyz"), logprobs=tuple(TokenLogprobs(i, -1.0) for i in range(4)))], 103.0
    )
    assert [p.cancel for p in parts] == [(), ()]
    assert last.cancel == ("r/0",)
    events = [e for e in (parts[0].event, parts[1].event, last.event) if e is not None]
    assert [e.text for e in events] == ["ab", "", ""]
    whole = gather(events)
    assert (whole.text, whole.finish_reason, whole.choices[0].stop_string) == ("ab", FinishReason.STOP_STRING, "END")
    assert whole.choices[0].token_ids == ids("abEND")
    assert len(whole.choices[0].logprobs) == 1
    assert whole.usage.output_tokens == 5
    assert (whole.usage.prefill_s, whole.usage.decode_s) == (1.0, 2.0), "without a ledger, the edge's own times"
    assert j.accept([SequenceDelta("r/0", ids("more"))], 104.0).event is None, "what crossed the cancel is dropped"


def test_stop_string_in_the_last_delta_needs_no_cancel() -> None:
    delta = SequenceDelta("r/0", ids("aEND"), finish_reason=FinishReason.LENGTH, ledger=SequenceLedger(decode_s=7.0))
    accepted = journal(stops=("END",)).accept([delta], 101.0)
    assert accepted.cancel == ()
    assert accepted.event is not None
    assert accepted.event.deltas[0].finish_reason is FinishReason.STOP_STRING
    assert accepted.event.usage is not None
    assert accepted.event.usage.decode_s == 7.0


def test_text_held_back_for_a_stop_string_comes_out_at_the_end() -> None:
    j = journal(stops=("END",))
    held = j.accept([SequenceDelta("r/0", ids("aEN"))], 101.0).event
    last = j.accept([SequenceDelta("r/0", (), finish_reason=FinishReason.LENGTH)], 102.0).event
    assert held is not None
    assert last is not None
    assert (held.text, last.text) == ("a", "EN")


def test_deltas_of_several_steps_become_one_part_per_choice() -> None:
    j = journal(n=2)
    event = j.accept(
        [
            SequenceDelta("r/1", ids("x")),
            SequenceDelta("r/0", ids("a")),
            SequenceDelta("r/1", ids("y"), finish_reason=FinishReason.LENGTH),
        ],
        101.0,
    ).event
    assert event is not None
    assert [(d.index, d.text, d.finish_reason) for d in event.deltas] == [
        (1, "xy", FinishReason.LENGTH),
        (0, "a", None),
    ]
    assert not j.finished


def test_logprobs_carry_the_text_of_tokens() -> None:
    delta = SequenceDelta(
        "r/0",
        ids("a"),
        logprobs=(TokenLogprobs(ids("a")[0], -0.5, ((ids("b")[0], -0.25),)),),
        prompt_logprobs=(None, TokenLogprobs(ids("z")[0], -3.0)),
    )
    event = journal().accept([delta], 101.0).event
    assert event is not None
    position = event.deltas[0].logprobs[0]
    assert position.token is not None
    assert (position.token.text, position.token.logprob, position.top[0].text) == ("a", -0.5, "b")
    assert event.prompt_logprobs is not None
    assert event.prompt_logprobs[0].token is None
    assert event.prompt_logprobs[1].token is not None
    assert event.prompt_logprobs[1].token.text == "z"


def test_failures() -> None:
    with pytest.raises(SequenceFailed, match="choice 0 failed"):
        journal().accept([SequenceDelta("r/0", finish_reason=FinishReason.ERROR, error="/secret/path")], 1.0)
    with pytest.raises(Unavailable, match="choice 0 was ended"):
        journal().accept([SequenceDelta("r/0", finish_reason=FinishReason.CANCELLED)], 1.0)


@pytest.mark.parametrize("seed", range(20))
def test_replay_from_any_point_gives_the_same_answer(seed: int) -> None:
    """Runs n choices, loses the engine at random moments, starts ``sequences()`` again: no token lost or doubled."""
    rng = random.Random(seed)
    n, max_tokens = rng.randint(1, 4), rng.randint(1, 12)

    def answer(loss: float) -> tuple[list[tuple[str, tuple[int, ...]]], list[int]]:
        j = journal(n, max_tokens=max_tokens)
        events: list[StreamEvent] = []
        while not j.finished:
            running = {s.sequence_id: (s, len(s.output_ids)) for s in j.sequences()}
            while running and rng.random() >= loss:
                deltas = [_step(running, i) for i in rng.sample(sorted(running), rng.randint(1, len(running)))]
                event = j.accept(deltas, 0.0).event
                assert event is not None
                events.append(event)
        whole = gather(events)
        return [(c.text, c.token_ids) for c in whole.choices], [e.sequence_number for e in events]

    undisturbed, _ = answer(loss=0.0)
    disturbed, numbers = answer(loss=0.4)
    assert disturbed == undisturbed, f"seed {seed}"
    assert numbers == list(range(len(numbers))), f"seed {seed}"
    assert all(len(tokens) == max_tokens for _, tokens in disturbed), f"seed {seed}"


def _step(running: dict[str, tuple[SequenceRequest, int]], sequence_id: str) -> SequenceDelta:
    sequence, position = running.pop(sequence_id)
    if position + 1 < sequence.sampling.max_tokens:
        running[sequence_id] = (sequence, position + 1)
        return SequenceDelta(sequence_id, (stub_token(sequence, position, VOCAB_SIZE),))
    token = stub_token(sequence, position, VOCAB_SIZE)
    return SequenceDelta(sequence_id, (token,), finish_reason=FinishReason.LENGTH)
