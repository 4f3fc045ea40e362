"""What has arrived of one stream, and how to ask for the rest of it. No I/O here."""

from __future__ import annotations

from moestro.cluster.edge.events import StreamEvent
from moestro.cluster.edge.wire import FINISH_TO_PROTO
from moestro.protos.errors import MoestroError
from moestro.protos.gen import inference_pb2 as pb


class Progress:
    """Of a request that has an id. ``data`` is what to send for the next attempt."""

    def __init__(self, request: pb.GenerateRequest | pb.ChatRequest) -> None:
        self._request = request
        self._resume = pb.Resume()
        self._choices: dict[int, pb.ResumedChoice] = {}
        self._is_first = True
        self._next_number = 0
        self.is_complete = False

    def data(self) -> bytes:
        """The request, from the second time on with what has arrived."""
        if not self._is_first:
            self._request.resume.CopyFrom(self._resume)
            self._request.resume.choices.extend(self._choices.values())
        self._is_first = False
        return self._request.SerializeToString()

    def take(self, event: StreamEvent) -> None:
        """Raises MoestroError when events are missing or come again."""
        if event.sequence_number != self._next_number:
            raise MoestroError(f"event {event.sequence_number} came where {self._next_number} was due")
        self._next_number += 1
        self._resume.last_sequence_number = event.sequence_number
        for delta in event.deltas:
            choice = self._choices.get(delta.index)
            if choice is None:
                choice = self._choices[delta.index] = pb.ResumedChoice(index=delta.index)
            choice.token_ids.extend(delta.token_ids)
            choice.finish_reason = FINISH_TO_PROTO[delta.finish_reason]
        self.is_complete = event.usage is not None
