"""What the sync and the async client share: requests from plain arguments, and results from messages.

No I/O here. A Call is a method, its serialised request, and how to read the answer; a StreamCall can be asked again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypedDict, TypeVar

from google.protobuf.message import Message

from moestro.cluster.client_results import (
    ClusterStatus,
    GroupExperts,
    Incident,
    ModelInfo,
    ServerInfo,
    cluster_status,
    group_experts,
    model_info,
    server_info,
)
from moestro.cluster.client_results import (
    incidents as decode_incidents,
)
from moestro.cluster.edge.events import StreamEvent
from moestro.cluster.edge.wire import decode_event
from moestro.protos.errors import FieldViolation, InvalidRequest
from moestro.protos.experts import PlacementRequest
from moestro.protos.experts_wire import encode_placement
from moestro.protos.gen import inference_pb2 as pb
from moestro.protos.sequences import Diagnostics

T = TypeVar("T")

Messages = str | Sequence[Mapping[str, str]]  # one user message, or turns with "role" and "content"
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_retries", 0),
    # A server that is back is found soon, and one that is gone without a word (its machine was lost) is given up.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),  # which is also how long one try to connect may take
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.keepalive_time_ms", 15_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)

_INFERENCE, _CLUSTER = "/moestro.v1.InferenceService/", "/moestro.v1.ClusterService/"


class Options(TypedDict, total=False):
    """Every option of a generation; see the .proto for bounds and defaults. What is left out takes the checkpoint's."""

    model: str
    max_tokens: int
    min_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int
    n: int
    logprobs: int
    prompt_logprobs: int
    priority: int
    request_id: str
    diagnostics: Diagnostics  # what verify uses; digests come in streams only
    timeout_s: float  # the deadline of the whole call, retries included; the client's own when left out


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One call of one method that answers once."""

    path: str
    data: bytes
    decode: Callable[[bytes], T]


@dataclass(frozen=True, slots=True)
class StreamCall:
    """One call of Generate or Chat."""

    path: str
    request: pb.GenerateRequest | pb.ChatRequest
    timeout_s: float | None = None

    @staticmethod
    def decode(data: bytes) -> StreamEvent:
        """One message of the answer: those of both methods are alike."""
        return decode_event(pb.GenerateResponse.FromString(data).event)


def stream(prompt: str | Sequence[int], options: Options) -> StreamCall:
    return StreamCall(f"{_INFERENCE}Generate", _generate_request(prompt, options), options.get("timeout_s"))


def chat(messages: Messages, options: Options) -> StreamCall:
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    request = pb.ChatRequest(messages=[pb.ChatMessage(role=m["role"], content=m["content"]) for m in messages])
    _fill(request, options)
    return StreamCall(f"{_INFERENCE}Chat", request, options.get("timeout_s"))


def tokenize(text: str, model: str, add_special_tokens: bool) -> Call[list[int]]:
    request = pb.TokenizeRequest(model=model, text=text, add_special_tokens=add_special_tokens)
    return _call("Tokenize", request, lambda data: list(pb.TokenizeResponse.FromString(data).token_ids))


def detokenize(token_ids: Sequence[int], model: str, skip_special_tokens: bool) -> Call[str]:
    request = pb.DetokenizeRequest(model=model, token_ids=token_ids, skip_special_tokens=skip_special_tokens)
    return _call("Detokenize", request, lambda data: pb.DetokenizeResponse.FromString(data).text)


def models() -> Call[list[ModelInfo]]:
    return _call(
        "ListModels",
        pb.ListModelsRequest(),
        lambda data: [model_info(m) for m in pb.ListModelsResponse.FromString(data).models],
    )


def info() -> Call[ServerInfo]:
    request = pb.GetServerInfoRequest()
    return _call("GetServerInfo", request, lambda data: server_info(pb.GetServerInfoResponse.FromString(data)))


def status() -> Call[ClusterStatus]:
    return Call(
        f"{_CLUSTER}GetClusterStatus",
        pb.GetClusterStatusRequest().SerializeToString(),
        lambda data: cluster_status(pb.GetClusterStatusResponse.FromString(data)),
    )


def experts(group: str) -> Call[tuple[GroupExperts, ...]]:
    return Call(
        f"{_CLUSTER}GetExperts",
        pb.GetExpertsRequest(group=group).SerializeToString(),
        lambda data: group_experts(pb.GetExpertsResponse.FromString(data)),
    )


def incidents(name: str) -> Call[tuple[Incident, ...]]:
    return Call(
        f"{_CLUSTER}GetIncidents",
        pb.GetIncidentsRequest(name=name).SerializeToString(),
        lambda data: decode_incidents(pb.GetIncidentsResponse.FromString(data)),
    )


def set_placement(request: PlacementRequest, group: str) -> Call[tuple[str, ...]]:
    try:
        data = encode_placement(request, group).SerializeToString()
    except (ValueError, TypeError) as error:
        raise InvalidRequest([FieldViolation("placement", f"cannot be sent: {error}")]) from error
    return Call(
        f"{_CLUSTER}SetPlacement", data, lambda answer: tuple(pb.SetPlacementResponse.FromString(answer).groups)
    )


def _call(method: str, request: Message, decode: Callable[[bytes], T]) -> Call[T]:
    return Call(_INFERENCE + method, request.SerializeToString(), decode)


def _generate_request(prompt: str | Sequence[int], options: Options) -> pb.GenerateRequest:
    request = pb.GenerateRequest()
    if isinstance(prompt, str):
        _put("text", lambda: setattr(request, "text", prompt), prompt)
    else:
        request.token_ids.SetInParent()
        _put("token_ids.ids", lambda: request.token_ids.ids.extend(prompt), prompt)
    _fill(request, options)
    return request


_PLACES: Mapping[str, tuple[str, str]] = {
    **{name: ("sampling", name) for name in pb.SamplingParams.DESCRIPTOR.fields_by_name},
    **{name: ("stop", name) for name in ("max_tokens", "min_tokens", "ignore_eos")},
    "stop": ("stop", "strings"),
    "stop_token_ids": ("stop", "token_ids"),
    **{name: ("output", name) for name in pb.OutputParams.DESCRIPTOR.fields_by_name},
    **{name: ("", name) for name in ("model", "priority", "request_id", "diagnostics")},
}


def _fill(request: pb.GenerateRequest | pb.ChatRequest, options: Options) -> None:
    """Sets each option in its place. Raises InvalidRequest for a value that its field cannot hold."""
    for option, value in options.items():
        if option == "timeout_s" or value is None:
            continue
        if option not in _PLACES:
            raise TypeError(f"unknown option {option!r}; known: {', '.join(sorted(_PLACES))}")
        part, name = _PLACES[option]
        target = getattr(request, part) if part else request
        _put(f"{part}.{name}" if part else name, lambda t=target, n=name, v=value: _set(t, n, v), value)  # type: ignore[misc]


def _set(target: Message, name: str, value: object) -> None:
    if name == "strings" and isinstance(value, str):
        value = [value]
    if isinstance(value, Diagnostics):
        getattr(target, name).CopyFrom(_diagnostics(value))
    elif isinstance(value, Mapping):
        getattr(target, name).update(value)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        getattr(target, name).extend(value)
    else:
        setattr(target, name, value)


def _diagnostics(value: Diagnostics) -> pb.Diagnostics:
    return pb.Diagnostics(rank=value.rank, max_chunk=value.max_chunk, preempt_at=value.preempt_at, trace=value.trace)


def _put(field: str, put: Callable[[], None], value: object) -> None:
    try:
        put()
    except (ValueError, TypeError, UnicodeError) as error:
        raise InvalidRequest([FieldViolation(field, f"cannot hold {str(value)[:64]!r}")]) from error
