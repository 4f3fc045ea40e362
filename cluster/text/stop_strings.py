"""Search for many stop strings at once in text that arrives in pieces.

The machine is Aho and Corasick's (*Efficient string matching: an aid to bibliographic search*, CACM 18(6), 1975). It
fits a stream twice over: its cost per character depends on neither the number nor the length of the strings, and the
depth of its state is exactly the number of trailing characters that may still become a stop string.

Which match wins: the one that is complete first as the text grows character by character; of several that end at the
same character, the one that begins first (the longest). This depends on the text alone, never on how it was cut into
tokens or messages, and a stream never waits for more text once some stop string is complete.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, slots=True)
class StopMatch:
    """A stop string found: ``end`` is the index behind its last character, in the text of this call."""

    end: int
    stop_string: str


class StopAutomaton:
    """The immutable machine of a set of stop strings. State 0 is the empty prefix."""

    def __init__(self, stop_strings: Sequence[str]) -> None:
        if not all(stop_strings):
            raise ValueError("a stop string must not be empty")
        self._edges: list[dict[str, int]] = [{}]
        self._failure: list[int] = [0]
        self._depth: list[int] = [0]
        self._output: list[str | None] = [None]
        for stop_string in stop_strings:
            self._insert(stop_string)
        self._link()

    def _insert(self, stop_string: str) -> None:
        state = 0
        for char in stop_string:
            following = self._edges[state].get(char)
            if following is None:
                following = len(self._edges)
                self._edges[state][char] = following
                self._edges.append({})
                self._failure.append(0)
                self._depth.append(self._depth[state] + 1)
                self._output.append(None)
            state = following
        self._output[state] = stop_string

    def _link(self) -> None:
        queue = deque(self._edges[0].values())
        while queue:
            state = queue.popleft()
            for char, following in self._edges[state].items():
                self._failure[following] = self._step(self._failure[state], char)
                queue.append(following)
            if self._output[state] is None:  # a node's own string is longer than any its failure link ends
                self._output[state] = self._output[self._failure[state]]

    def _step(self, state: int, char: str) -> int:
        while True:
            following = self._edges[state].get(char)
            if following is not None:
                return following
            if state == 0:
                return 0
            state = self._failure[state]

    def depth(self, state: int) -> int:
        """How many trailing characters of the text so far may be the beginning of a stop string."""
        return self._depth[state]

    def scan(self, state: int, text: str) -> tuple[int, StopMatch | None]:
        """Read ``text`` from ``state`` on, up to the first match. Amortised O(1) per character."""
        if state == 0 and self._edges[0].keys().isdisjoint(text):
            return 0, None
        for index, char in enumerate(text):
            state = self._step(state, char)
            stop_string = self._output[state]
            if stop_string is not None:
                return state, StopMatch(index + 1, stop_string)
        return state, None


@lru_cache(maxsize=16)
def stop_automaton(stop_strings: tuple[str, ...]) -> StopAutomaton:
    """The machine of ``stop_strings``, kept for the choices of one request and for clients that repeat themselves.

    16 strings of 256 characters are some 4,000 states, so the cache is small on purpose.
    """
    return StopAutomaton(stop_strings)
