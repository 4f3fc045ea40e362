"""How far experts differ in what they are used for: load, mutual information with token classes, and nulls.

Legend: N tokens, k experts per token, E experts, C classes, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.integer]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LayerReport:
    """One layer's expert use.

    Attributes:
        load: share of assignments per expert, summing to 1.
        information_bits: mutual information between a token's class and the expert of one of its assignments.
        shuffled_bits_max: the largest value over shuffles of the labels between tokens.
        type_information_bits: the same with one label per vocabulary entry (its most frequent class).
        type_shuffled_bits_mean, type_shuffled_bits_max: over shuffles of those labels between vocabulary
            entries of similar frequency. Any gate that looks at token identity beats the first null; only one
            that groups entries by syntax beats this one.
        divergence_bits: per class, KL of its expert use from the layer's mean use.
        use: per class, share of assignments per expert.
    """

    load: list[float]
    information_bits: float
    shuffled_bits_max: float
    type_information_bits: float
    type_shuffled_bits_mean: float
    type_shuffled_bits_max: float
    divergence_bits: list[float]
    use: list[list[float]]


def joint_counts(labels_N: Ints, chosen_Nk: Ints, classes: int, experts: int) -> Floats:
    """Assignments by class and expert, [C, E]."""
    flat = (labels_N[:, None].astype(np.int64) * experts + chosen_Nk).ravel()
    return np.bincount(flat, minlength=classes * experts).reshape(classes, experts).astype(np.float64)


def mutual_information(joint_CE: Floats) -> float:
    """Mutual information in bits of a table of counts."""
    p = joint_CE / joint_CE.sum()
    independent = p.sum(axis=1, keepdims=True) * p.sum(axis=0, keepdims=True)
    seen = p > 0
    return float((p[seen] * np.log2(p[seen] / independent[seen])).sum())


def majority_labels(tokens_N: Ints, labels_N: Ints, vocab: int, classes: int) -> npt.NDArray[np.int64]:
    """Most frequent class of each vocabulary entry, [V]."""
    counts = np.bincount(tokens_N.astype(np.int64) * classes + labels_N, minlength=vocab * classes)
    majority: npt.NDArray[np.int64] = counts.reshape(vocab, classes).argmax(axis=1)
    return majority


def shuffle_within_frequency(
    labels_V: npt.NDArray[np.int64], frequency_V: Ints, block: int, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Permute labels among vocabulary entries that are neighbours in frequency rank."""
    ranked = np.argsort(-frequency_V, kind="stable")
    shuffled = labels_V.copy()
    for start in range(0, len(ranked), block):
        part = ranked[start : start + block]
        shuffled[part] = labels_V[rng.permutation(part)]
    return shuffled


def layer_report(
    tokens_N: Ints,
    labels_N: Ints,
    chosen_Nk: Ints,
    vocab: int,
    classes: int,
    experts: int,
    seed: int,
    draws: int,
) -> LayerReport:
    """Measure one layer against both nulls; `draws` shuffles each."""
    rng = np.random.default_rng(seed)
    joint = joint_counts(labels_N, chosen_Nk, classes, experts)
    load = joint.sum(axis=0) / joint.sum()
    shuffled = [
        mutual_information(joint_counts(rng.permutation(labels_N), chosen_Nk, classes, experts)) for _ in range(draws)
    ]
    labels_V = majority_labels(tokens_N, labels_N, vocab, classes)
    frequency_V = np.bincount(tokens_N.astype(np.int64), minlength=vocab)
    present = np.flatnonzero(frequency_V)

    def type_information(labels: npt.NDArray[np.int64]) -> float:
        return mutual_information(joint_counts(labels[tokens_N.astype(np.int64)], chosen_Nk, classes, experts))

    type_shuffled = []
    for _ in range(draws):
        mixed_V = labels_V.copy()
        mixed_V[present] = shuffle_within_frequency(labels_V[present], frequency_V[present], 16, rng)
        type_shuffled.append(type_information(mixed_V))
    use = joint / np.maximum(joint.sum(axis=1, keepdims=True), 1)
    ratio = np.where(use > 0, use / np.maximum(load, 1e-12), 1.0)
    return LayerReport(
        load=load.tolist(),
        information_bits=mutual_information(joint),
        shuffled_bits_max=max(shuffled),
        type_information_bits=type_information(labels_V),
        type_shuffled_bits_mean=float(np.mean(type_shuffled)),
        type_shuffled_bits_max=max(type_shuffled),
        divergence_bits=(use * np.log2(ratio)).sum(axis=1).tolist(),
        use=use.tolist(),
    )
