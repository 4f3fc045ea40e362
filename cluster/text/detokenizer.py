"""Token ids to text, a few at a time.

``PieceDetokenizer`` joins bytes and reads them as UTF-8; it is exact: after any prompt P and any output O, however O
was cut, ``stable(P) + text(O) == decode(P + O)``, where ``stable(P)`` is decode(P) without an unfinished character at
its end. A character begun by the prompt and completed by the output therefore belongs to the output.

``WindowDetokenizer`` is for decoders that are no map from tokens to bytes. It decodes a window of the last tokens with
and without the new ones and emits the difference, the technique published by text-generation-inference and vLLM.

Ill-formed UTF-8 becomes U+FFFD once per maximal ill-formed part (the Unicode Standard's recommended practice, and what
byte-level decoders do). tokenizers' ByteFallback differs on purpose of its own: it replaces every byte of a run of
byte tokens when any of them is ill-formed, so a later byte would unsay a character already streamed.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Protocol

from tokenizers import Tokenizer

from moestro.cluster.text.pieces import PieceTable

_MAX_WINDOW = 64  # tokens; beyond it text that still ends in U+FFFD is taken to be really ill-formed
_CONTEXT_TOKENS = 8  # prompt tokens a window begins with
_TAIL_BYTES = 4  # an unfinished character has at most three bytes

Utf8State = tuple[bytes, int]


class Detokenizer(Protocol):
    """Text of a growing sequence of tokens."""

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text these tokens complete."""
        ...

    def flush(self) -> str:
        """The text of what is still unfinished; nothing may be fed after it."""
        ...

    def copy(self) -> Detokenizer:
        """An independent detokenizer in the same state."""
        ...


class PieceDetokenizer:
    """Exact detokenization by table; well under a microsecond a token."""

    def __init__(self, table: PieceTable, skipped: frozenset[int]) -> None:
        self._table = table
        self._pieces = table.pieces
        self._skipped = skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = table.rule.lead_drop is not None
        self._strip = table.rule.lead_strip.count if table.rule.lead_strip else 0

    def prime(self, prompt_ids: Sequence[int]) -> None:
        """Take up the state behind ``prompt_ids``, looking only at their two ends."""
        head = 0
        while (self._first or self._strip) and head < len(prompt_ids):
            self.feed(prompt_ids[head : head + 1])
            head += 1
        tail = b""
        for token_id in reversed(prompt_ids[head:]):
            if len(tail) >= _TAIL_BYTES:
                break
            tail = self._piece(token_id) + tail
        if len(tail) >= _TAIL_BYTES:
            self._utf8.reset()
        self._utf8.decode(tail)

    def feed(self, token_ids: Sequence[int]) -> str:
        if self._first:
            token_ids = list(token_ids)
            lead = self._lead(token_ids)
        else:
            lead = b""
        data = self._piece(token_ids[0]) if len(token_ids) == 1 else b"".join(map(self._piece, token_ids))
        text = self._utf8.decode(lead + data if lead else data)
        return self._stripped(text) if self._strip and text else text

    def flush(self) -> str:
        text = self._utf8.decode(b"", final=True)
        return self._stripped(text) if self._strip and text else text

    def copy(self) -> PieceDetokenizer:
        twin = PieceDetokenizer(self._table, self._skipped)
        twin._utf8.setstate(self._utf8.getstate())
        twin._first, twin._strip = self._first, self._strip
        return twin

    def _piece(self, token_id: int) -> bytes:
        if token_id in self._skipped or not 0 <= token_id < len(self._pieces):
            return b""
        return self._pieces[token_id]

    def _lead(self, token_ids: list[int]) -> bytes:
        """Take tokens off the front up to and including the first visible one; return that one's bytes."""
        while token_ids:
            token_id = token_ids.pop(0)
            if token_id in self._skipped or not 0 <= token_id < len(self._pieces):
                continue
            if self._table.tokens[token_id] is None:
                continue
            self._first = False
            return self._table.first_piece(token_id)
        return b""

    def _stripped(self, text: str) -> str:
        strip = self._table.rule.lead_strip
        assert strip is not None
        cut = 0
        while cut < min(self._strip, len(text)) and text[cut] == strip.char:
            cut += 1
        self._strip = self._strip - cut if cut == len(text) else 0
        return text[cut:]


class WindowDetokenizer:
    """Detokenization by difference of two decodes of a short window; several microseconds a token."""

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._window: list[int] = []
        self._read = 0  # tokens of the window whose text was already emitted

    def prime(self, prompt_ids: Sequence[int]) -> None:
        context: list[int] = []
        for token_id in reversed(prompt_ids):
            if len(context) == _CONTEXT_TOKENS:
                break
            if token_id not in self._skipped:
                context.append(token_id)
        self._window = context[::-1]
        self._read = len(self._window)

    def feed(self, token_ids: Sequence[int]) -> str:
        return "".join(self._feed_one(token_id) for token_id in self._visible(token_ids))

    def flush(self) -> str:
        return self._decode(self._window)[len(self._decode(self._window[: self._read])) :]

    def copy(self) -> WindowDetokenizer:
        twin = WindowDetokenizer(self._tokenizer, self._skipped)
        twin._window, twin._read = list(self._window), self._read
        return twin

    def _visible(self, token_ids: Iterable[int]) -> Iterable[int]:
        return (token_id for token_id in token_ids if token_id not in self._skipped)

    def _feed_one(self, token_id: int) -> str:
        self._window.append(token_id)
        before = self._decode(self._window[: self._read])
        after = self._decode(self._window)
        if after.endswith("\ufffd") and len(self._window) - self._read < _MAX_WINDOW:
            return ""
        self._window = self._window[self._read :]
        self._read = len(self._window)
        return after[len(before) :]

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False) if token_ids else ""
