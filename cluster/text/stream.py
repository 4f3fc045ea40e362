"""One choice's output as text: detokenization and stop strings together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moestro.cluster.text.detokenizer import Detokenizer
from moestro.cluster.text.model import TextModel
from moestro.cluster.text.stop_strings import stop_automaton


@dataclass(frozen=True, slots=True)
class TextUpdate:
    """What one push made certain.

    ``num_tokens_used`` counts the tokens of the push up to and including the one that completed ``stop_string``;
    without a match it is all of them.
    """

    text: str
    num_tokens_used: int
    stop_string: str | None


class TextStream:
    """The text of one choice, released as soon as it is certain.

    The concatenation of every update's text and of ``finish()`` is the text of the output tokens in the context of the
    prompt, cut before the winning stop string (see ``stop_strings`` for which one wins). Stop strings are looked for in
    the output only. Characters that may belong to a stop string, and the bytes of an unfinished character, are held
    back. After a match the stream is closed: further tokens are not used and yield nothing.

    The token that ended a sequence as EOS is no text and must not be pushed unless its text is wanted.
    """

    def __init__(
        self,
        model: TextModel,
        prompt_ids: Sequence[int],
        stop_strings: Sequence[str] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        self._detokenizer = model.detokenizer(prompt_ids, skip_special_tokens)
        self._automaton = stop_automaton(tuple(stop_strings)) if stop_strings else None
        self._state = 0
        self._held = ""
        self._stop_string: str | None = None

    @property
    def stop_string(self) -> str | None:
        """The stop string that closed the stream, ``finish()`` included."""
        return self._stop_string

    def push(self, token_ids: Sequence[int]) -> TextUpdate:
        """Add output tokens. O(1) amortised per token."""
        if self._stop_string is not None:
            return TextUpdate("", 0, self._stop_string)
        if self._automaton is None:
            return TextUpdate(self._detokenizer.feed(token_ids), len(token_ids), None)
        before = self._detokenizer.copy() if len(token_ids) > 1 else None
        text, end = self._search(self._detokenizer.feed(token_ids))
        if end is None:
            return TextUpdate(text, len(token_ids), None)
        num_used = 1 if before is None else _tokens_until(before, token_ids, end)
        return TextUpdate(text, num_used, self._stop_string)

    def finish(self) -> str:
        """End the stream and release what was held back."""
        if self._stop_string is not None:
            return ""
        text, end = self._search(self._detokenizer.flush())
        if end is None:
            text, self._held = text + self._held, ""
        return text

    def _search(self, text: str) -> tuple[str, int | None]:
        """The part of held and new text that is now certain, and where in the new text a match ended."""
        if self._automaton is None or not text:
            return text, None
        self._state, match = self._automaton.scan(self._state, text)
        if match is None:
            depth = self._automaton.depth(self._state)
            if not depth and not self._held:
                return text, None
            buffer = self._held + text
            self._held = buffer[len(buffer) - depth :]
            return buffer[: len(buffer) - depth], None
        buffer = self._held + text[: match.end]
        self._held, self._stop_string = "", match.stop_string
        return buffer[: len(buffer) - len(match.stop_string)], match.end


def _tokens_until(detokenizer: Detokenizer, token_ids: Sequence[int], end: int) -> int:
    """How many of ``token_ids`` it takes to write ``end`` characters."""
    length = 0
    for index in range(len(token_ids)):
        length += len(detokenizer.feed(token_ids[index : index + 1]))
        if length >= end:
            return index + 1
    return len(token_ids)
