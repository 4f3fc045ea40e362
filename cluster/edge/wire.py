"""Events to public messages and back. The server writes with one half, the Python client reads with the other."""

from __future__ import annotations

from collections.abc import Iterable

from moestro.cluster.edge.events import (
    Choice,
    ChoiceDelta,
    Completion,
    PositionLogprobs,
    StreamEvent,
    TokenLogprob,
    Usage,
)
from moestro.protos.gen import inference_pb2 as pb
from moestro.protos.sequences import FinishReason
from moestro.protos.wire import decode_trace, encode_trace

FINISH_TO_PROTO = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.EOS: pb.FINISH_REASON_EOS,
    FinishReason.STOP_TOKEN: pb.FINISH_REASON_STOP_TOKEN,
    FinishReason.STOP_STRING: pb.FINISH_REASON_STOP_STRING,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}
FINISH_FROM_PROTO = {value: reason for reason, value in FINISH_TO_PROTO.items()}


def encode_event(event: StreamEvent) -> bytes:
    """A StreamEvent, serialised as the message of Generate and of Chat, which are alike: field 1 is the event."""
    message = pb.GenerateResponse()
    target = message.event
    target.request_id = event.request_id
    target.sequence_number = event.sequence_number
    for delta in event.deltas:
        part = target.deltas.add()
        _fill_delta(part, delta)
        if delta.trace:
            part.trace.extend(encode_trace(delta.trace))
    if event.seed is not None:
        target.model, target.seed = event.model, event.seed
    if event.usage is not None:
        _fill_usage(target.usage, event.usage)
    if event.prompt_logprobs is not None:
        _add_logprobs(target.prompt_logprobs, event.prompt_logprobs)
    return message.SerializeToString()


def decode_event(message: pb.StreamEvent) -> StreamEvent:
    """The inverse of encode_event."""
    return StreamEvent(
        request_id=message.request_id,
        sequence_number=message.sequence_number,
        deltas=tuple(
            ChoiceDelta(
                index=delta.index,
                text=delta.text,
                token_ids=tuple(delta.token_ids),
                logprobs=_decode_logprobs(delta.logprobs),
                finish_reason=FINISH_FROM_PROTO[delta.finish_reason],
                stop_string=delta.stop_string if delta.HasField("stop_string") else None,
                trace=decode_trace(delta.trace),
            )
            for delta in message.deltas
        ),
        model=message.model,
        seed=message.seed if message.HasField("seed") else None,
        usage=_decode_usage(message.usage) if message.HasField("usage") else None,
        prompt_logprobs=_decode_logprobs(message.prompt_logprobs) or None,
    )


def encode_completion(completion: Completion) -> bytes:
    """A whole answer, serialised as a CompleteResponse."""
    message = pb.CompleteResponse(request_id=completion.request_id, model=completion.model, seed=completion.seed)
    for choice in completion.choices:
        _fill_delta(message.choices.add(), choice)
    _fill_usage(message.usage, completion.usage)
    _add_logprobs(message.prompt_logprobs, completion.prompt_logprobs or ())
    return message.SerializeToString()


def _fill_delta(target: pb.ChoiceDelta | pb.Choice, delta: ChoiceDelta | Choice) -> None:
    target.index = delta.index
    target.text = delta.text
    target.token_ids.extend(delta.token_ids)
    if delta.logprobs:
        _add_logprobs(target.logprobs, delta.logprobs)
    if delta.finish_reason is not None:
        target.finish_reason = FINISH_TO_PROTO[delta.finish_reason]
        if delta.stop_string is not None:
            target.stop_string = delta.stop_string


def _fill_usage(target: pb.Usage, usage: Usage) -> None:
    target.prompt_tokens = usage.prompt_tokens
    target.output_tokens = usage.output_tokens
    target.cached_tokens = usage.cached_tokens
    target.queued_seconds = usage.queued_s
    target.prefill_seconds = usage.prefill_s
    target.decode_seconds = usage.decode_s
    target.preemptions = usage.preemptions
    target.migrations = usage.migrations


def _decode_usage(message: pb.Usage) -> Usage:
    return Usage(
        prompt_tokens=message.prompt_tokens,
        output_tokens=message.output_tokens,
        cached_tokens=message.cached_tokens,
        queued_s=message.queued_seconds,
        prefill_s=message.prefill_seconds,
        decode_s=message.decode_seconds,
        preemptions=message.preemptions,
        migrations=message.migrations,
    )


def _add_logprobs(target: Iterable[pb.PositionLogprobs], positions: Iterable[PositionLogprobs]) -> None:
    target.extend(  # type: ignore[attr-defined]
        pb.PositionLogprobs(
            token=None if position.token is None else _token(position.token),
            top=[_token(token) for token in position.top],
        )
        for position in positions
    )


def _token(token: TokenLogprob) -> pb.TokenLogprob:
    return pb.TokenLogprob(token_id=token.token_id, logprob=token.logprob, text=token.text)


def _decode_logprobs(positions: Iterable[pb.PositionLogprobs]) -> tuple[PositionLogprobs, ...]:
    def token(message: pb.TokenLogprob) -> TokenLogprob:
        return TokenLogprob(message.token_id, message.logprob, message.text)

    return tuple(
        PositionLogprobs(
            token(position.token) if position.HasField("token") else None, tuple(token(top) for top in position.top)
        )
        for position in positions
    )
