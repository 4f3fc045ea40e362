"""Between the plain types of ``sequences`` and the messages that gateways and ranks exchange."""

from __future__ import annotations

from collections.abc import Iterable

from moestro.protos.gen import inference_pb2
from moestro.protos.gen import rank_pb2 as pb
from moestro.protos.sequences import (
    Diagnostics,
    EngineLimits,
    EngineLoad,
    FinishReason,
    PositionTrace,
    SamplingParams,
    SequenceDelta,
    SequenceLedger,
    SequenceRequest,
    TokenLogprobs,
)

_TO_FINISH = {
    FinishReason.EOS: pb.FINISH_EOS,
    FinishReason.STOP_TOKEN: pb.FINISH_STOP_TOKEN,
    FinishReason.STOP_STRING: pb.FINISH_STOP_STRING,
    FinishReason.LENGTH: pb.FINISH_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_CANCELLED,
    FinishReason.ERROR: pb.FINISH_ERROR,
}
_FROM_FINISH = {number: reason for reason, number in _TO_FINISH.items()}


def encode_request(request: SequenceRequest) -> pb.Sequence:
    """Which rank is to serve it is not told: it is the one that reads this."""
    p, diagnostics = request.sampling, request.diagnostics
    return pb.Sequence(
        sequence_id=request.sequence_id,
        prompt_ids=request.prompt_ids,
        output_ids=request.output_ids,
        priority=request.priority,
        sampling=pb.Sampling(
            temperature=p.temperature,
            top_k=p.top_k,
            top_p=p.top_p,
            min_p=p.min_p,
            repetition_penalty=p.repetition_penalty,
            presence_penalty=p.presence_penalty,
            frequency_penalty=p.frequency_penalty,
            logit_bias=dict(p.logit_bias),
            seed=p.seed,
            max_tokens=p.max_tokens,
            min_tokens=p.min_tokens,
            ignore_eos=p.ignore_eos,
            eos_token_ids=p.eos_token_ids,
            stop_token_ids=p.stop_token_ids,
            logprobs=p.logprobs,
            prompt_logprobs=p.prompt_logprobs,
        ),
        max_chunk=diagnostics.max_chunk,
        preempt_at=diagnostics.preempt_at,
        trace=diagnostics.trace,
    )


def decode_request(message: pb.Sequence) -> SequenceRequest:
    p = message.sampling
    return SequenceRequest(
        sequence_id=message.sequence_id,
        prompt_ids=tuple(message.prompt_ids),
        output_ids=tuple(message.output_ids),
        priority=message.priority,
        sampling=SamplingParams(
            temperature=p.temperature,
            top_k=p.top_k,
            top_p=p.top_p,
            min_p=p.min_p,
            repetition_penalty=p.repetition_penalty,
            presence_penalty=p.presence_penalty,
            frequency_penalty=p.frequency_penalty,
            logit_bias=dict(p.logit_bias),
            seed=p.seed,
            max_tokens=p.max_tokens,
            min_tokens=p.min_tokens,
            ignore_eos=p.ignore_eos,
            eos_token_ids=tuple(p.eos_token_ids),
            stop_token_ids=tuple(p.stop_token_ids),
            logprobs=p.logprobs if p.HasField("logprobs") else None,
            prompt_logprobs=p.prompt_logprobs if p.HasField("prompt_logprobs") else None,
        ),
        diagnostics=Diagnostics(
            max_chunk=message.max_chunk,
            preempt_at=message.preempt_at if message.HasField("preempt_at") else None,
            trace=message.trace,
        ),
    )


def encode_delta(delta: SequenceDelta) -> pb.Delta:
    message = pb.Delta()
    write_delta(delta, message)
    return message


def write_delta(delta: SequenceDelta, message: pb.Delta) -> None:
    """Fills an empty message where it lies: one that is put into another later is copied."""
    sequence_id, token_ids, logprobs, prompt_logprobs, reason, error, ledger, trace = delta
    message.sequence_id = sequence_id
    message.token_ids.extend(token_ids)
    if logprobs:
        message.logprobs.extend(_encode_logprobs(logprobs))
    if prompt_logprobs is not None:
        message.prompt_logprobs.extend(_encode_logprobs(prompt_logprobs))
    if reason is not None:
        message.finish = _TO_FINISH[reason]
    if error is not None:
        message.error = error
    if ledger is not None:
        message.ledger.queued_s = ledger.queued_s
        message.ledger.prefill_s = ledger.prefill_s
        message.ledger.decode_s = ledger.decode_s
        message.ledger.num_cached_tokens = ledger.num_cached_tokens
        message.ledger.num_preemptions = ledger.num_preemptions
        message.ledger.num_steps = ledger.num_steps
    if trace:
        message.trace.extend(encode_trace(trace))


def decode_delta(message: pb.Delta) -> SequenceDelta:
    token_ids = tuple(message.token_ids)
    if not (message.finish or message.logprobs or message.prompt_logprobs or message.trace):
        return SequenceDelta(message.sequence_id, token_ids)  # nearly every delta: keep it cheap
    ledger = None
    if message.HasField("ledger"):
        m = message.ledger
        ledger = SequenceLedger(
            m.queued_s, m.prefill_s, m.decode_s, m.num_cached_tokens, m.num_preemptions, m.num_steps
        )
    prompt_logprobs = tuple(map(_decode_logprobs, message.prompt_logprobs)) if message.prompt_logprobs else None
    return SequenceDelta(
        sequence_id=message.sequence_id,
        token_ids=token_ids,
        logprobs=tuple(entry for entry in map(_decode_logprobs, message.logprobs) if entry is not None),
        prompt_logprobs=prompt_logprobs,
        finish_reason=_FROM_FINISH[message.finish] if message.finish else None,
        error=message.error or None,
        ledger=ledger,
        trace=decode_trace(message.trace),
    )


def encode_trace(trace: Iterable[PositionTrace]) -> list[inference_pb2.PositionTrace]:
    return [inference_pb2.PositionTrace(position=p.position, layers=p.layers) for p in trace]


def decode_trace(messages: Iterable[inference_pb2.PositionTrace]) -> tuple[PositionTrace, ...]:
    return tuple(PositionTrace(m.position, tuple(m.layers)) for m in messages)


def _encode_logprobs(entries: Iterable[TokenLogprobs | None]) -> list[pb.Logprobs]:
    return [
        pb.Logprobs(absent=True)
        if entry is None
        else pb.Logprobs(
            token_id=entry.token_id,
            logprob=entry.logprob,
            top_ids=[token_id for token_id, _ in entry.top],
            top_logprobs=[logprob for _, logprob in entry.top],
        )
        for entry in entries
    ]


def _decode_logprobs(message: pb.Logprobs) -> TokenLogprobs | None:
    if message.absent:
        return None
    top = tuple(zip(message.top_ids, message.top_logprobs, strict=True))
    return TokenLogprobs(message.token_id, message.logprob, top)


def encode_load(load: EngineLoad) -> pb.Load:
    return pb.Load(
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        kv_blocks_used=load.kv_blocks_used,
        kv_blocks_total=load.kv_blocks_total,
        num_steps=load.num_steps,
        step_s=load.step_s,
        slowness=load.slowness,
        shedding=load.is_shedding,
    )


def decode_load(message: pb.Load) -> EngineLoad:
    return EngineLoad(
        message.num_running,
        message.num_waiting,
        message.kv_blocks_used,
        message.kv_blocks_total,
        message.num_steps,
        message.step_s,
        message.slowness or 1.0,
        message.shedding,
    )


def encode_limits(limits: EngineLimits) -> pb.Limits:
    return pb.Limits(
        vocab_size=limits.vocab_size,
        max_context=limits.max_context,
        max_waiting=limits.max_waiting,
        max_running=limits.max_running,
        max_tokens=limits.max_tokens,
    )


def decode_limits(message: pb.Limits) -> EngineLimits:
    return EngineLimits(
        message.vocab_size, message.max_context, message.max_waiting, message.max_running, message.max_tokens
    )
