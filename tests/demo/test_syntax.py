"""Token classes, and the measures of specialisation, on cases whose answer is known."""

import math

import numpy as np
import pytest

from moestro.demo.specialisation import layer_report, mutual_information
from moestro.demo.syntax import CLASSES, UNKNOWN, token_classes

SOURCE = "def f(x):\n    # note\n    return x + 42\n"


@pytest.mark.parametrize(
    ("piece", "expected"),
    [
        ("def", "keyword"),
        (" f", "identifier"),
        ("(", "operator"),
        (":\n", "operator"),
        ("\n", "newline"),
        ("    ", "indent"),
        (" note", "comment"),
        (" return", "keyword"),
        ("42", "number"),
    ],
)
def test_token_classes(piece: str, expected: str) -> None:
    begin = SOURCE.index(piece)
    labels = token_classes(SOURCE, [(begin, begin + len(piece))])
    assert CLASSES[labels[0]] == expected


def test_white_space_in_a_docstring_is_string() -> None:
    text = '"""One\n    two"""\n'
    begin = text.index("    ")
    assert CLASSES[token_classes(text, [(begin, begin + 3)])[0]] == "string"


def test_broken_source_is_unknown() -> None:
    assert token_classes("x = (1,\n", [(0, 1), (1, 2)]).tolist() == [UNKNOWN, UNKNOWN]


def test_mutual_information_of_known_tables() -> None:
    assert mutual_information(np.eye(4)) == pytest.approx(2)
    assert mutual_information(np.outer([1, 2, 3], [4, 5])) == pytest.approx(0, abs=1e-12)


def test_report_tells_a_specialised_layer_from_a_random_one() -> None:
    rng = np.random.default_rng(7)
    tokens = rng.integers(0, 400, 20_000)
    labels_V = rng.integers(0, 4, 400)
    labels = labels_V[tokens]
    by_class = np.stack([labels, labels + 4], axis=1)
    by_token = np.stack([tokens * 7919 % 4, tokens * 7919 % 4 + 4], axis=1)
    arguments = {"vocab": 400, "classes": 4, "experts": 8, "seed": 7, "draws": 5}
    special = layer_report(tokens, labels, by_class, **arguments)
    hashed = layer_report(tokens, labels, by_token, **arguments)
    assert special.information_bits == pytest.approx(2, abs=0.05)
    assert special.type_information_bits > 10 * special.type_shuffled_bits_max
    assert sum(special.load) == pytest.approx(1)
    assert all(math.isclose(sum(row), 1) for row in special.use)
    # A gate that hashes token identity knows nothing of syntax, though it beats the plain shuffle.
    assert hashed.information_bits > hashed.shuffled_bits_max
    assert hashed.type_information_bits < 3 * hashed.type_shuffled_bits_max
