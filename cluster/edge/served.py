"""What the edge needs to know of a model it serves: its text side, and what runs its sequences."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from moestro.cluster.backend import Backend
from moestro.cluster.edge.tickets import AdmissionLimits


class GenerationDefaults(Protocol):
    """The checkpoint's generation_config.json; None where it says nothing."""

    @property
    def temperature(self) -> float | None: ...
    @property
    def top_k(self) -> int | None: ...
    @property
    def top_p(self) -> float | None: ...
    @property
    def min_p(self) -> float | None: ...
    @property
    def repetition_penalty(self) -> float | None: ...
    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...


class TextModel(Protocol):
    """Text to token ids and back, for one checkpoint (``cluster.text.TextModel``)."""

    @property
    def name(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def special_ids(self) -> Collection[int]: ...
    @property
    def has_chat_template(self) -> bool: ...
    @property
    def generation(self) -> GenerationDefaults: ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...
    def token_text(self, token_id: int, /) -> str: ...
    def render_chat(self, messages: list[dict[str, str]]) -> str: ...


class TextUpdate(Protocol):
    """What some more tokens added to a text."""

    @property
    def text(self) -> str: ...
    @property
    def num_tokens_used(self) -> int: ...
    @property
    def stop_string(self) -> str | None: ...


class TextStream(Protocol):
    """Incremental text of one choice; holds back half characters and possible stop strings."""

    @property
    def stop_string(self) -> str | None: ...

    def push(self, token_ids: Sequence[int]) -> TextUpdate: ...
    def finish(self) -> str: ...


OpenText = Callable[[Sequence[int], Sequence[str]], TextStream]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model of this edge. ``open_text`` makes a TextStream from prompt ids and stop strings."""

    text: TextModel
    backend: Backend
    open_text: OpenText
    architecture: str = ""
    dtype: str = ""

    @property
    def name(self) -> str:
        return self.text.name


@dataclass(frozen=True, slots=True)
class RecoveryLimits:
    """How far the edge goes to bring a request to its end; see ``[recovery]`` in the configuration."""

    migrations: int = 3  # beyond it Unavailable
    patience_s: float = 60.0  # for another engine, from the loss to the next token
    resume_s: float = 60.0  # that what was sent of a stream is remembered after its end
    max_parked: int = 1024  # streams so remembered
    max_incidents: int = 256  # records of quarantined requests


@dataclass(frozen=True, slots=True)
class EdgeLimits:
    """Bounds of the edge itself; those of the engine come with its Backend."""

    max_open_requests: int = 1024  # waiting and started; beyond it a request is refused with Overloaded
    admission: AdmissionLimits = field(default_factory=AdmissionLimits)  # of those that wait
    max_choices: int = 128
    max_logprobs: int = 20
    max_logit_bias: int = 1024
    max_stop_strings: int = 16
    max_stop_string_chars: int = 256
    max_stop_token_ids: int = 64
    max_priority: int = 100  # and its negative
    max_request_id_chars: int = 128
    max_chat_messages: int = 1024
    max_message_bytes: int = 4 << 20
    encode_in_thread_chars: int = 4096  # longer texts (or token lists) are converted off the event loop
    recovery: RecoveryLimits = RecoveryLimits()
    max_text_calls: int = 64  # Tokenize and Detokenize calls at work; beyond it one is refused with Overloaded
