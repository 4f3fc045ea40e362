"""What each token id stands for, in bytes, where a tokenizer's decoder allows it.

Most decoders are maps from tokens to bytes with one exception at the very beginning of the text. For these a stream
needs neither a window nor a second decode: bytes are looked up, joined, and read as UTF-8. Three forms are understood:

    byte-level      ByteLevel (GPT-2, Llama 3, Qwen, OLMoE, DeepSeek)
    SentencePiece   Replace..., ByteFallback, Fuse, Strip at the left (Llama 2, Mistral, Mixtral, Gemma)
    Metaspace       Metaspace alone

Every other decoder (WordPiece, CTC, ...) is refused here with None and streamed through a window.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


@dataclass(frozen=True, slots=True)
class LeadStrip:
    """What the decoder takes from the beginning of the whole text: up to ``count`` leading ``char``s."""

    char: str
    count: int


@dataclass(frozen=True, slots=True)
class PieceRule:
    """How one token's text becomes bytes, and what is special about the beginning."""

    byte_level: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    lead_strip: LeadStrip | None = None
    lead_drop: str | None = None  # Metaspace: removed from the first visible token wherever it occurs in it

    def piece(self, token: str) -> bytes:
        """The bytes of ``token`` anywhere but at the beginning of the text."""
        if self.byte_level:
            return _byte_level_piece(token)
        for pattern, content in self.replacements:
            token = token.replace(pattern, content)
        if self.byte_fallback and (match := _BYTE_TOKEN.match(token)):
            return bytes([int(match[1], 16)])
        return token.encode()

    def first_piece(self, token: str) -> bytes:
        """The bytes of ``token`` as the first visible token of the text (before ``lead_strip``)."""
        return token.replace(self.lead_drop, "").encode() if self.lead_drop else self.piece(token)


def piece_rule(decoder: Mapping[str, Any] | None) -> PieceRule | None:
    """The rule of a tokenizer.json's ``decoder`` section; None when it is not a map from tokens to bytes."""
    steps = list(_flatten(decoder)) if decoder else []
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return PieceRule(byte_level=True)
    if kinds == ["Metaspace"]:
        return _metaspace_rule(steps[0])
    return _sentencepiece_rule(steps) if steps else None


def _flatten(decoder: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    if decoder.get("type") != "Sequence":
        yield decoder
        return
    for inner in decoder.get("decoders", ()):
        yield from _flatten(inner)


def _metaspace_rule(step: Mapping[str, Any]) -> PieceRule:
    mark = step.get("replacement", "▁")
    scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
    return PieceRule(replacements=((mark, " "),), lead_drop=None if scheme == "never" else mark)


def _sentencepiece_rule(steps: list[Mapping[str, Any]]) -> PieceRule | None:
    """Replace on each token, then bytes, then on the fused text at most one strip at the left, in this order only."""
    replacements: list[tuple[str, str]] = []
    byte_fallback = fused = False
    lead_strip: LeadStrip | None = None
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)} if not (
                byte_fallback or fused
            ):
                replacements.append((pattern, content))
            case {"type": "ByteFallback"} if not (byte_fallback or fused):
                byte_fallback = True
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Strip", "content": str(char), "start": int(count), "stop": 0} if fused and not lead_strip:
                lead_strip = LeadStrip(char, count)
            case _:
                return None
    return PieceRule(replacements=tuple(replacements), byte_fallback=byte_fallback, lead_strip=lead_strip)


class _ByteOfChar(dict[int, int]):
    """GPT-2's printable stand-ins for bytes, as a translation table; a foreign character becomes unencodable."""

    def __missing__(self, key: int) -> int:
        return 0x100


def _byte_of_char() -> _ByteOfChar:
    """Printable Latin-1 stands for itself, the other 68 bytes for the code points from 256 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = _ByteOfChar({byte: byte for byte in printable})
    others = (byte for byte in range(0x100) if byte not in table)
    table.update({0x100 + index: byte for index, byte in enumerate(list(others))})
    return table


_BYTE_OF_CHAR = _byte_of_char()


def _byte_level_piece(token: str) -> bytes:
    try:
        return token.translate(_BYTE_OF_CHAR).encode("latin-1")
    except UnicodeEncodeError:  # an added token with a character outside the alphabet stands for its own text
        return token.encode()


@dataclass(frozen=True, slots=True)
class PieceTable:
    """Token id to bytes. A hole in the ids is an empty piece."""

    rule: PieceRule
    tokens: tuple[str | None, ...]
    pieces: tuple[bytes, ...]

    @classmethod
    def build(cls, rule: PieceRule, tokens: tuple[str | None, ...]) -> PieceTable:
        return cls(rule, tokens, tuple(b"" if token is None else rule.piece(token) for token in tokens))

    def first_piece(self, token_id: int) -> bytes:
        token = self.tokens[token_id]
        return b"" if token is None else self.rule.first_piece(token)
