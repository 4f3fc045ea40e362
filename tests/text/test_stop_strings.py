"""The automaton against the definition by brute force."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.cluster.text.stop_strings import StopAutomaton

STOPS = st.lists(st.text("ab你", min_size=1, max_size=5), min_size=1, max_size=16)


def first_match(text: str, stops: list[str]) -> tuple[int, str] | None:
    """The definition: smallest end; among those, the longest."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return end, max(ending, key=len)
    return None


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text("ab你c", max_size=6), max_size=8), STOPS)
def test_scan_equals_the_definition_however_the_text_is_cut(parts: list[str], stops: list[str]) -> None:
    automaton, state, read = StopAutomaton(stops), 0, ""
    expected = first_match("".join(parts), stops)
    for part in parts:
        state, match = automaton.scan(state, part)
        if match is not None:
            assert (len(read) + match.end, match.stop_string) == expected
            return
        read += part
        beginnings = [n for n in range(len(read) + 1) if any(stop.startswith(read[len(read) - n :]) for stop in stops)]
        assert automaton.depth(state) == max(beginnings)
    assert expected is None


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopAutomaton(["a", ""])
