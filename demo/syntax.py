"""The syntactic class of each token of a Python source, for asking what experts specialise in."""

import bisect
import io
import keyword
import tokenize
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

CLASSES = ("keyword", "identifier", "operator", "number", "string", "comment", "newline", "indent")
_INDEX = {name: place for place, name in enumerate(CLASSES)}
UNKNOWN = -1

_KINDS = {
    tokenize.OP: "operator",
    tokenize.NUMBER: "number",
    tokenize.STRING: "string",
    tokenize.COMMENT: "comment",
}
# From Python 3.12 on an f-string is several tokens; its literal parts count as string.
for _name in ("FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END"):
    if hasattr(tokenize, _name):
        _KINDS[getattr(tokenize, _name)] = "string"


def character_classes(text: str) -> npt.NDArray[np.int8]:
    """Class index of each character; white space between tokens is `newline` or `indent`.

    Raises:
        SyntaxError, tokenize.TokenError: when the text is not Python.
    """
    classes = np.full(len(text), _INDEX["indent"], dtype=np.int8)
    starts = [0]
    for place, character in enumerate(text):
        if character == "\n":
            classes[place] = _INDEX["newline"]
            starts.append(place + 1)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = _KINDS.get(token.type)
        if token.type == tokenize.NAME:
            kind = "keyword" if keyword.iskeyword(token.string) else "identifier"
        if kind is not None:
            begin = starts[token.start[0] - 1] + token.start[1]
            end = starts[token.end[0] - 1] + token.end[1]
            classes[begin:end] = _INDEX[kind]
    return classes


def token_classes(text: str, spans: Sequence[tuple[int, int]]) -> npt.NDArray[np.int8]:
    """Class of each token given its character span: that of its first visible character, or else of its last.

    Source that Python cannot tokenize gives `UNKNOWN` throughout.
    """
    try:
        classes = character_classes(text)
    except (SyntaxError, tokenize.TokenError):
        return np.full(len(spans), UNKNOWN, dtype=np.int8)
    visible = [place for place, character in enumerate(text) if not character.isspace()]
    result = np.empty(len(spans), dtype=np.int8)
    for index, (begin, end) in enumerate(spans):
        at = bisect.bisect_left(visible, begin)
        first = visible[at] if at < len(visible) and visible[at] < end else max(begin, end - 1)
        result[index] = classes[first]
    return result
