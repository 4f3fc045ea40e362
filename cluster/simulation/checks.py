"""What must hold of what a client is told: the right answer, each token once, in order, and one end."""

from __future__ import annotations

from moestro.cluster.edge.events import PositionLogprobs, StreamEvent
from moestro.cluster.edge.wire import FINISH_TO_PROTO
from moestro.cluster.simulation.oracle import ROOT, Answer, logprobs, read
from moestro.cluster.simulation.scenario import Ask
from moestro.protos.gen import inference_pb2 as pb
from moestro.protos.sequences import FinishReason, TokenLogprobs


class Reader:
    """Holds the events of one request against its right answer."""

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.num_events = 0
        self.is_finished = False
        self.has_left = False
        self.was_cut = False
        self.error: BaseException | None = None
        self.token_ids: list[list[int]] = [[] for _ in ask.answers]
        self._texts = ["" for _ in ask.answers]
        self.reasons: list[FinishReason | None] = [None for _ in ask.answers]
        self._had_prompt = False

    def take(self, event: StreamEvent) -> None:
        """Raises AssertionError where an event is not what comes next."""
        ask = self.ask
        assert not self.is_finished, f"{ask.name}: an event after the last"
        assert event.request_id == ask.name, f"{ask.name}: an event of {event.request_id}"
        assert event.sequence_number == self.num_events, (
            f"{ask.name}: event {event.sequence_number} where {self.num_events} was to come"
        )
        self.num_events += 1
        if event.prompt_logprobs is not None:
            assert not self._had_prompt, f"{ask.name}: prompt logprobs twice"
            self._had_prompt = True
            self._check_prompt(event.prompt_logprobs)
        for delta in event.deltas:
            index, right = delta.index, ask.answers[delta.index]
            assert self.reasons[index] is None, f"{ask.name}/{index}: more after its end"
            start = len(self.token_ids[index])
            self.token_ids[index] += delta.token_ids
            self._texts[index] += delta.text
            said = tuple(self.token_ids[index])
            assert said == right.token_ids[: len(said)], f"{ask.name}/{index}: said {said}, right is {right.token_ids}"
            assert right.text.startswith(self._texts[index]), (
                f"{ask.name}/{index}: said {self._texts[index]!r}, right is {right.text!r}"
            )
            if right.logprobs:
                told = right.logprobs[start : len(said)]
                assert [_plain(p) for p in delta.logprobs] == list(told), f"{ask.name}/{index}: wrong logprobs"
            if delta.finish_reason is not None:
                self.reasons[index] = delta.finish_reason
                self._check_end(index, right, delta.finish_reason, delta.stop_string)
        if event.usage is not None:
            assert all(self.reasons), f"{ask.name}: usage before every choice had ended"
            assert event.usage.output_tokens == sum(len(a.token_ids) for a in ask.answers), f"{ask.name}: wrong usage"
            assert self._had_prompt == (ask.sampling.prompt_logprobs is not None), f"{ask.name}: no prompt logprobs"
            self.is_finished = True

    def arrived(self) -> list[pb.ResumedChoice]:
        """What a client says of it when it resumes."""
        return [
            pb.ResumedChoice(index=index, token_ids=token_ids, finish_reason=FINISH_TO_PROTO[self.reasons[index]])
            for index, token_ids in enumerate(self.token_ids)
            if token_ids or self.reasons[index]
        ]

    def _check_end(self, index: int, right: Answer, reason: FinishReason, stop_string: str | None) -> None:
        name = f"{self.ask.name}/{index}"
        assert tuple(self.token_ids[index]) == right.token_ids, f"{name}: ended early, {self.token_ids[index]}"
        assert self._texts[index] == right.text, f"{name}: text {self._texts[index]!r}, right is {right.text!r}"
        assert (reason, stop_string) == (right.reason, right.stop_string), f"{name}: ended with {reason} {stop_string}"

    def _check_prompt(self, told: tuple[PositionLogprobs, ...]) -> None:
        name, right, count = ROOT, [None], self.ask.sampling.prompt_logprobs
        assert count is not None, f"{self.ask.name}: prompt logprobs that nobody asked for"
        for before, token in zip(self.ask.prompt_ids, self.ask.prompt_ids[1:], strict=False):
            name = read(name, before)
            right.append(logprobs(name, token, count))  # type: ignore[arg-type]
        assert [_plain(p) for p in told] == right, f"{self.ask.name}: wrong prompt logprobs"


def _plain(position: PositionLogprobs) -> TokenLogprobs | None:
    if position.token is None:
        return None
    top = tuple((p.token_id, p.logprob) for p in position.top)
    return TokenLogprobs(position.token.token_id, position.token.logprob, top)
