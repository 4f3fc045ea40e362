"""Everything a client can send is judged here, once, before any work. Pure functions.

``validate_*`` turn a message into a ValidRequest or raise InvalidRequest with every violated field, its bound and its
value; ``fit`` is the check that needs the tokens. A field path is the one of the .proto: ``sampling.top_p``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from moestro.cluster.edge.history import Arrived
from moestro.cluster.edge.resuming import read_resume, resume_violations
from moestro.cluster.edge.served import EdgeLimits, GenerationDefaults
from moestro.protos.errors import ContextOverflow, FieldViolation, InvalidRequest
from moestro.protos.gen import inference_pb2 as pb
from moestro.protos.sequences import Diagnostics, EngineLimits, SamplingParams

MAX_NAMED = 2  # violations named of one repeated field; a status must fit into HTTP/2 trailers of 8 KiB
_REQUEST_ID = re.compile(r"[\x21-\x7e]*")


@dataclass(frozen=True, slots=True)
class ValidRequest:
    """A request whose every field is in its range. ``sampling`` lacks seed and, when ``max_tokens`` is None, the
    bound that only the tokenised prompt gives."""

    prompt: str | tuple[int, ...] | None  # None: a conversation, in ``messages``
    messages: tuple[tuple[str, str], ...]  # role, content
    sampling: SamplingParams
    stop_strings: tuple[str, ...]
    max_tokens: int | None
    n: int
    seed: int | None  # None: to be drawn
    priority: int
    request_id: str  # empty: to be made
    diagnostics: Diagnostics  # whether its rank exists, the backend knows
    resume: Arrived | None  # what the caller has of it already


def validate_generate(
    request: pb.GenerateRequest, limits: EdgeLimits, engine: EngineLimits, defaults: GenerationDefaults
) -> ValidRequest:
    """Raises InvalidRequest."""
    violations: list[FieldViolation] = []
    prompt: str | tuple[int, ...] | None = None
    match request.WhichOneof("prompt"):
        case "text":
            prompt = request.text
            if not prompt:
                violations.append(FieldViolation("text", "must not be empty"))
        case "token_ids":
            prompt = tuple(request.token_ids.ids)
            if not prompt:
                violations.append(FieldViolation("token_ids.ids", "must not be empty"))
            violations += _token_ids("token_ids.ids", prompt, engine.vocab_size)
        case _:
            violations.append(FieldViolation("prompt", "one of text and token_ids must be set"))
    return _validate(request, prompt, (), violations, limits, engine, defaults)


def validate_chat(
    request: pb.ChatRequest, limits: EdgeLimits, engine: EngineLimits, defaults: GenerationDefaults
) -> ValidRequest:
    """Raises InvalidRequest. What the roles may be, the template says when it is rendered."""
    violations: list[FieldViolation] = []
    messages = tuple((message.role, message.content) for message in request.messages)
    if not 1 <= len(messages) <= limits.max_chat_messages:
        violations.append(FieldViolation("messages", f"must be 1 to {limits.max_chat_messages}, are {len(messages)}"))
    violations += _first(
        FieldViolation(f"messages[{i}].role", "must not be empty") for i, (role, _) in enumerate(messages) if not role
    )
    return _validate(request, None, messages, violations, limits, engine, defaults)


def fit(request: ValidRequest, num_prompt_tokens: int, engine: EngineLimits, prompt_field: str) -> SamplingParams:
    """The sampling parameters with max_tokens settled. Raises InvalidRequest or ContextOverflow when prompt and output
    cannot be held."""
    if num_prompt_tokens == 0:
        raise InvalidRequest([FieldViolation(prompt_field, "has no tokens")])
    room = engine.max_context - num_prompt_tokens
    if room < 1:
        bound = f"must leave room for one output token in the context of {engine.max_context}"
        raise ContextOverflow([FieldViolation(prompt_field, f"{bound}, is {num_prompt_tokens} tokens long")])
    max_tokens = room if request.max_tokens is None else request.max_tokens
    why = f"the context is {engine.max_context} and the prompt {num_prompt_tokens} tokens long"
    if max_tokens > room:
        raise ContextOverflow([FieldViolation("stop.max_tokens", f"must be at most {room}, is {max_tokens}: {why}")])
    if request.sampling.min_tokens > max_tokens:
        described = f"must be at most {max_tokens}, is {request.sampling.min_tokens}: {why}"
        raise ContextOverflow([FieldViolation("stop.min_tokens", described)])
    return replace(request.sampling, max_tokens=max_tokens)


def validate_token_ids(field: str, ids: Iterable[int], vocab_size: int) -> None:
    """Raises InvalidRequest, naming the first few ids out of range."""
    violations = list(_token_ids(field, ids, vocab_size))
    if violations:
        raise InvalidRequest(violations)


def _validate(
    request: pb.GenerateRequest | pb.ChatRequest,
    prompt: str | tuple[int, ...] | None,
    messages: tuple[tuple[str, str], ...],
    violations: list[FieldViolation],
    limits: EdgeLimits,
    engine: EngineLimits,
    defaults: GenerationDefaults,
) -> ValidRequest:
    sampling, stop, output = request.sampling, request.stop, request.output
    violations += _sampling(sampling, limits, engine)
    violations += _stop(stop, limits, engine)
    n = output.n if output.HasField("n") else 1
    violations += _range("output.n", n, 1, limits.max_choices)
    for name in ("logprobs", "prompt_logprobs"):
        if output.HasField(name):
            violations += _range(f"output.{name}", getattr(output, name), 0, limits.max_logprobs)
    violations += _range("priority", request.priority, -limits.max_priority, limits.max_priority)
    if len(request.request_id) > limits.max_request_id_chars:
        described = f"must be at most {limits.max_request_id_chars} characters, is {len(request.request_id)}"
        violations.append(FieldViolation("request_id", described))
    elif not _REQUEST_ID.fullmatch(request.request_id):
        violations.append(FieldViolation("request_id", "must be printable ASCII without spaces"))
    violations += resume_violations(request, n, engine.vocab_size)
    diagnostics = request.diagnostics
    violations += _range("diagnostics.max_chunk", diagnostics.max_chunk, 0, engine.max_context)
    violations += _range("diagnostics.preempt_at", diagnostics.preempt_at, 0, engine.max_context)
    if violations:
        raise InvalidRequest(violations)
    return ValidRequest(
        prompt=prompt,
        messages=messages,
        sampling=_resolve(sampling, stop, output, defaults),
        stop_strings=tuple(stop.strings),
        max_tokens=stop.max_tokens if stop.HasField("max_tokens") else None,
        n=n,
        seed=sampling.seed if sampling.HasField("seed") else None,
        priority=request.priority,
        request_id=request.request_id,
        diagnostics=Diagnostics(
            rank=diagnostics.rank,
            max_chunk=diagnostics.max_chunk,
            preempt_at=diagnostics.preempt_at if diagnostics.HasField("preempt_at") else None,
            trace=diagnostics.trace,
        ),
        resume=read_resume(request.resume) if request.HasField("resume") else None,
    )


def _sampling(sampling: pb.SamplingParams, limits: EdgeLimits, engine: EngineLimits) -> Iterator[FieldViolation]:
    for name, low, high, open_below in (
        ("temperature", 0.0, 2.0, False),
        ("top_p", 0.0, 1.0, True),
        ("min_p", 0.0, 1.0, False),
        ("repetition_penalty", 0.0, 2.0, True),
        ("presence_penalty", -2.0, 2.0, False),
        ("frequency_penalty", -2.0, 2.0, False),
    ):
        if sampling.HasField(name):
            yield from _range(f"sampling.{name}", getattr(sampling, name), low, high, open_below)
    if sampling.HasField("top_k") and sampling.top_k < 0:
        yield FieldViolation("sampling.top_k", f"must be at least 0, is {sampling.top_k}")
    if len(sampling.logit_bias) > limits.max_logit_bias:
        described = f"must be at most {limits.max_logit_bias} entries, are {len(sampling.logit_bias)}"
        yield FieldViolation("sampling.logit_bias", described)
    yield from _first(
        FieldViolation(f"sampling.logit_bias[{token}]", f"token id must be below {engine.vocab_size}, is {token}")
        for token in sorted(sampling.logit_bias)
        if token >= engine.vocab_size
    )
    yield from _first(
        violation
        for token in sorted(sampling.logit_bias)
        for violation in _range(f"sampling.logit_bias[{token}]", sampling.logit_bias[token], -100.0, 100.0)
    )


def _stop(stop: pb.StopParams, limits: EdgeLimits, engine: EngineLimits) -> Iterator[FieldViolation]:
    max_tokens = stop.max_tokens if stop.HasField("max_tokens") else None
    if max_tokens is not None and max_tokens < 1:
        yield FieldViolation("stop.max_tokens", f"must be at least 1, is {max_tokens}")
    if stop.min_tokens < 0:
        yield FieldViolation("stop.min_tokens", f"must be at least 0, is {stop.min_tokens}")
    elif max_tokens is not None and max_tokens >= 1 and stop.min_tokens > max_tokens:
        yield FieldViolation("stop.min_tokens", f"must be at most max_tokens {max_tokens}, is {stop.min_tokens}")
    if len(stop.strings) > limits.max_stop_strings:
        yield FieldViolation("stop.strings", f"must be at most {limits.max_stop_strings}, are {len(stop.strings)}")
    yield from _first(
        FieldViolation(
            f"stop.strings[{i}]", f"must be 1 to {limits.max_stop_string_chars} characters, is {len(string)}"
        )
        for i, string in enumerate(stop.strings)
        if not 1 <= len(string) <= limits.max_stop_string_chars
    )
    if len(stop.token_ids) > limits.max_stop_token_ids:
        described = f"must be at most {limits.max_stop_token_ids}, are {len(stop.token_ids)}"
        yield FieldViolation("stop.token_ids", described)
    yield from _token_ids("stop.token_ids", stop.token_ids, engine.vocab_size)


def _resolve(
    sampling: pb.SamplingParams, stop: pb.StopParams, output: pb.OutputParams, defaults: GenerationDefaults
) -> SamplingParams:
    """What was asked for, else the checkpoint's wish, else the plain default."""

    def choose(name: str, plain: float) -> float:
        if sampling.HasField(name):
            return float(getattr(sampling, name))
        wish = getattr(defaults, name, None)
        return plain if wish is None else wish

    return SamplingParams(
        temperature=choose("temperature", 1.0),
        top_k=int(choose("top_k", 0)),
        top_p=choose("top_p", 1.0),
        min_p=choose("min_p", 0.0),
        repetition_penalty=choose("repetition_penalty", 1.0),
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias),
        min_tokens=stop.min_tokens,
        ignore_eos=stop.ignore_eos,
        eos_token_ids=tuple(defaults.eos_token_ids),
        stop_token_ids=tuple(stop.token_ids),
        logprobs=output.logprobs if output.HasField("logprobs") else None,
        prompt_logprobs=output.prompt_logprobs if output.HasField("prompt_logprobs") else None,
    )


def _range(field: str, value: float, low: float, high: float, open_below: bool = False) -> Iterator[FieldViolation]:
    """Written so that NaN, which compares false with everything, is out of every range."""
    inside = low < value <= high if open_below else low <= value <= high
    if not inside:
        bounds = f"{'(' if open_below else '['}{low:g}, {high:g}]"
        yield FieldViolation(field, f"must be in {bounds}, is {value}")


def _token_ids(field: str, ids: Iterable[int], vocab_size: int) -> Iterator[FieldViolation]:
    yield from _first(
        FieldViolation(f"{field}[{i}]", f"must be below the vocabulary size {vocab_size}, is {token}")
        for i, token in enumerate(ids)
        if token >= vocab_size
    )


def _first(violations: Iterable[FieldViolation]) -> Iterator[FieldViolation]:
    """The first few; the last of them says how many were left out."""
    left_out, last = 0, None
    for i, violation in enumerate(violations):
        if i < MAX_NAMED:
            yield violation
        else:
            left_out, last = left_out + 1, violation
    if last is not None:
        yield FieldViolation(last.field, f"{last.description} (the last of {left_out} more like it)")
