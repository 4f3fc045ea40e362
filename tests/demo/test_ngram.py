"""The Kneser-Ney baseline against its definition, written out with dictionaries."""

from collections import Counter

import numpy as np
import pytest

from moestro.demo.ngram import KneserNey, fit


def by_definition(tokens: list[int], order: int, vocab: int, context: tuple[int, ...], word: int) -> float:
    """Chen and Goodman's recursion for one word, recounted from the raw tokens."""

    def table(n: int) -> Counter[tuple[int, ...]]:
        grams = Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
        if n == order:
            return grams
        longer = {tuple(tokens[i : i + n + 1]) for i in range(len(tokens) - n)}
        return Counter(gram[1:] for gram in longer)

    probability = 1 / vocab
    for n in range(1, order + 1):
        counts = table(n)
        sizes = Counter(min(count, 5) for count in counts.values())
        n1, n2, n3, n4 = (max(sizes[k], 1) for k in (1, 2, 3, 4))
        y = n1 / (n1 + 2 * n2)
        third = max(3 - 4 * y * n4 / n3, 0.0)
        discount = {0: 0.0, 1: 1 - 2 * y * n2 / n1, 2: max(2 - 3 * y * n3 / n2, 0.0)}
        history = context[len(context) - n + 1 :]
        following = {gram[-1]: count for gram, count in counts.items() if gram[:-1] == history}
        if not following:
            continue
        total = sum(following.values())
        mass = sum(discount.get(count, third) for count in following.values())
        own = following.get(word, 0)
        probability = (max(own - discount.get(own, third), 0.0) + mass * probability) / total
    return probability


@pytest.fixture(scope="module")
def fitted() -> tuple[list[int], KneserNey]:
    rng = np.random.default_rng(3)
    tokens = rng.choice(7, size=600, p=[0.4, 0.2, 0.15, 0.1, 0.05, 0.05, 0.05])
    return tokens.tolist(), fit(tokens, 3, 8)


def test_matches_the_definition(fitted: tuple[list[int], KneserNey]) -> None:
    tokens, model = fitted
    for context in ((0, 1), (6, 6), (5, 4), (2, 0), (7, 7), (0, 7)):
        for word in range(8):
            got = np.exp(model.log_probs(np.array([*context, word]))[-1])
            assert got == pytest.approx(by_definition(tokens, 3, 8, context, word)), (context, word)


def test_sums_to_one(fitted: tuple[list[int], KneserNey]) -> None:
    _, model = fitted
    for context in ((0, 0), (6, 5), (7, 7)):
        total = sum(np.exp(model.log_probs(np.array([*context, word]))[-1]) for word in range(8))
        assert total == pytest.approx(1)


def test_five_tokens_of_the_demo_vocabulary_fit() -> None:
    assert fit(np.arange(4096), 5, 4096).order == 5
    with pytest.raises(ValueError, match="<= 64, got 6"):
        fit(np.arange(4096), 6, 4096)
