"""What a client says of a stream that was cut off, judged like the rest of a request. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moestro.cluster.edge.history import Arrived, ArrivedChoice
from moestro.cluster.edge.wire import FINISH_FROM_PROTO
from moestro.protos.errors import FieldViolation, InvalidRequest
from moestro.protos.gen import inference_pb2 as pb
from moestro.protos.sequences import FinishReason, SamplingParams

MAX_NUMBER = 2**53  # of an event: far above what any stream reaches


def resume_violations(
    request: pb.GenerateRequest | pb.ChatRequest, n: int, vocab_size: int
) -> Iterator[FieldViolation]:
    """What is wrong with ``resume`` by itself; what needs the tokenised request, ``check_arrived`` says."""
    resume = request.resume
    if not request.HasField("resume"):
        return
    if not request.request_id:
        yield FieldViolation("request_id", "must be that of the stream to be resumed, is empty")
    if resume.choices and not resume.HasField("last_sequence_number"):
        yield FieldViolation("resume.last_sequence_number", "must be set where something arrived")
    if resume.last_sequence_number >= MAX_NUMBER:
        described = f"must be below {MAX_NUMBER}, is {resume.last_sequence_number}"
        yield FieldViolation("resume.last_sequence_number", described)
    seen: set[int] = set()
    for i, choice in enumerate(resume.choices):
        violation = _choice_violation(f"resume.choices[{i}]", choice, n, vocab_size, seen)
        if violation is not None:
            yield violation
            return  # the first is enough: they are written by programs
        seen.add(choice.index)


def read_resume(resume: pb.Resume) -> Arrived:
    """Without violations."""
    return Arrived(
        resume.last_sequence_number if resume.HasField("last_sequence_number") else None,
        {c.index: ArrivedChoice(tuple(c.token_ids), FINISH_FROM_PROTO[c.finish_reason]) for c in resume.choices},
    )


def check_arrived(arrived: Arrived, sampling: Sequence[SamplingParams]) -> None:
    """Raises InvalidRequest when the request could not have given these tokens, by their number and kind."""
    for index, choice in sorted(arrived.choices.items()):
        described = _impossible(choice.token_ids, choice.finish_reason, sampling[index])
        if described:
            raise InvalidRequest([FieldViolation("resume.choices", f"choice {index} {described}")])


def _choice_violation(
    field: str, choice: pb.ResumedChoice, n: int, vocab_size: int, seen: set[int]
) -> FieldViolation | None:
    if choice.index >= n:
        return FieldViolation(f"{field}.index", f"must be below output.n = {n}, is {choice.index}")
    if choice.index in seen:
        return FieldViolation(f"{field}.index", f"comes more than once: {choice.index}")
    if choice.finish_reason not in FINISH_FROM_PROTO:
        return FieldViolation(f"{field}.finish_reason", f"is none that is known: {choice.finish_reason}")
    for at, token in enumerate(choice.token_ids):
        if token >= vocab_size:
            described = f"must be below the vocabulary size {vocab_size}, is {token}"
            return FieldViolation(f"{field}.token_ids[{at}]", described)
    return None


def _impossible(token_ids: Sequence[int], reason: FinishReason | None, params: SamplingParams) -> str:
    if len(token_ids) > params.max_tokens:
        return f"has {len(token_ids)} tokens, and max_tokens is {params.max_tokens}"
    if reason is not None:
        return ""
    if len(token_ids) == params.max_tokens:
        return f"has all of its max_tokens = {params.max_tokens} tokens, so its finish_reason must be set"
    ends = {*params.stop_token_ids, *(() if params.ignore_eos else params.eos_token_ids)}
    if any(token in ends for token in token_ids[params.min_tokens :]):
        return "holds an end or stop token, so its finish_reason must be set"
    return ""
