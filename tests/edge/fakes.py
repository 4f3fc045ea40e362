"""A text side without a tokenizer: one character is one token, its id the code point minus 32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from moestro.cluster.edge.served import EdgeLimits, ServedModel
from moestro.cluster.edge.stub import StubBackend
from moestro.protos.errors import FieldViolation, InvalidRequest
from moestro.protos.sequences import EngineLimits

VOCAB_SIZE = 95  # printable ASCII, so that every token is one character of text
LIMITS = EngineLimits(vocab_size=VOCAB_SIZE, max_context=256, max_waiting=4096)


@dataclass(frozen=True)
class FakeDefaults:
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class FakeText:
    name: str = "fake"
    vocab_size: int = VOCAB_SIZE
    special_ids: frozenset[int] = frozenset()
    has_chat_template: bool = True
    generation: FakeDefaults = field(default_factory=FakeDefaults)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [(ord(c) - 32) % VOCAB_SIZE for c in text]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(32 + i) for i in ids)

    def token_text(self, token_id: int) -> str:
        return chr(32 + token_id)

    def render_chat(self, messages: list[dict[str, str]]) -> str:
        if any(m["role"] not in ("system", "user", "assistant") for m in messages):
            raise InvalidRequest([FieldViolation("messages", "a role is unknown to the template")])
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"


@dataclass(frozen=True)
class FakeUpdate:
    text: str
    num_tokens_used: int
    stop_string: str | None = None


class FakeTextStream:
    """Holds back all but what can no longer become a stop string."""

    def __init__(self, prompt_ids: Sequence[int], stop_strings: Sequence[str]) -> None:
        self._stops = tuple(stop_strings)
        self._held = ""
        self.stop_string: str | None = None

    def push(self, token_ids: Sequence[int]) -> FakeUpdate:
        out = ""
        for used, token in enumerate(token_ids, start=1):
            self._held += chr(32 + token)
            for stop in self._stops:
                if self._held.endswith(stop):
                    self.stop_string = stop
                    return FakeUpdate(out + self._held[: -len(stop)], used, stop)
            keep = max(
                (k for stop in self._stops for k in range(1, len(stop)) if self._held.endswith(stop[:k])), default=0
            )
            cut = len(self._held) - keep
            out, self._held = out + self._held[:cut], self._held[cut:]
        return FakeUpdate(out, len(token_ids))

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held


def served(backend: StubBackend | None = None, text: FakeText | None = None) -> ServedModel:
    return ServedModel(
        text=text or FakeText(),
        backend=backend or StubBackend(LIMITS),
        open_text=FakeTextStream,
        architecture="Stub",
        dtype="none",
    )


SMALL = EdgeLimits(max_open_requests=1024, max_message_bytes=1 << 20)
