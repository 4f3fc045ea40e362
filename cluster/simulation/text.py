"""A text side without a tokenizer: token i is the i-th small letter. Streams and stop strings are the real ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from moestro.cluster.backend import Backend
from moestro.cluster.edge.served import ServedModel
from moestro.cluster.simulation.oracle import EOS, VOCAB_SIZE, letters
from moestro.cluster.text.model import TextModel
from moestro.cluster.text.stream import TextStream


@dataclass(frozen=True)
class LetterDefaults:
    """generation_config.json."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    eos_token_ids: tuple[int, ...] = (EOS,)


class LetterDetokenizer:
    def feed(self, token_ids: Sequence[int]) -> str:
        return letters(token_ids)

    def flush(self) -> str:
        return ""

    def copy(self) -> LetterDetokenizer:
        return self


@dataclass(frozen=True)
class LetterText:
    """Implements the edge's ``TextModel`` and what ``TextStream`` needs of one."""

    name: str = "letters"
    vocab_size: int = VOCAB_SIZE
    special_ids: frozenset[int] = frozenset()
    has_chat_template: bool = False
    generation: LetterDefaults = field(default_factory=LetterDefaults)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return letters(ids)

    def token_text(self, token_id: int, /) -> str:
        return letters([token_id])

    def render_chat(self, messages: list[dict[str, str]]) -> str:
        return "".join(message["content"] for message in messages)

    def detokenizer(self, prompt_ids: Sequence[int], skip_special_tokens: bool) -> LetterDetokenizer:
        return LetterDetokenizer()


def served_letters(backend: Backend) -> ServedModel:
    """The simulated model as the edge knows it."""
    text = LetterText()
    return ServedModel(
        text, backend, lambda prompt_ids, stops: TextStream(cast(TextModel, text), prompt_ids, stops), "Names", "none"
    )
