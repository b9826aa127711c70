"""How well a changed model's sentence embeddings agree with those of the model it was."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


def ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of each value (n,), from 0; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts) - 1
    return (last - (counts - 1) / 2)[inverse]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Return the correlation of the ranks of two lists (n,)."""
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def pairwise(embeddings: np.ndarray) -> np.ndarray:
    """Return the cosines of all pairs of n embeddings of length 1: (n (n - 1) / 2,)."""
    return (embeddings @ embeddings.T)[np.triu_indices(len(embeddings), 1)]


def agreement(embeddings: np.ndarray, dense: np.ndarray) -> float:
    """Return the rank correlation of pairwise cosines with those of the dense model.

    It asks whether the texts that were nearest still are, whatever the distances became.
    """
    return spearman(pairwise(embeddings), pairwise(dense))


class Retrieval(NamedTuple):
    """The share of questions whose nearest text is their own, and its standard error."""

    accuracy: float
    error: float


def retrieval(questions: np.ndarray, texts: np.ndarray) -> Retrieval:
    """Return how often the text that is nearest to a question is its own.

    Args:
        questions: Embeddings (n, dims) of length 1.
        texts: Embeddings of what belongs to them, in the same order.
    """
    cosines = questions @ texts.T
    p = float(np.mean(cosines.argmax(1) == np.arange(len(texts))))
    return Retrieval(p, (p * (1 - p) / len(texts)) ** 0.5)


class Quality(NamedTuple):
    """Measures of embeddings beside the dense model's; 1 is best in all but ``error``.

    Args:
        spearman: Agreement of pairwise cosines on texts like those of the calibration.
        cosine: Mean cosine of an embedding with the dense model's, on the same texts.
        general: Agreement on sentences of another kind.
        accuracy: Of retrieval.
        error: Its standard error.
    """

    spearman: float
    cosine: float
    general: float
    accuracy: float
    error: float
