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


def retrieval(questions: np.ndarray, texts: np.ndarray) -> float:
    """Return how often the text that is nearest to a question is its own.

    Args:
        questions: Embeddings (n, dims) of length 1.
        texts: Embeddings of what belongs to them, in the same order.
    """
    return float(np.mean((questions @ texts.T).argmax(1) == np.arange(len(texts))))


def standard_error(share: float, n: int) -> float:
    """Return the standard error of a share of n that were drawn."""
    return (share * (1 - share) / n) ** 0.5


class Embeddings(NamedTuple):
    """What a model makes of texts to be compared by, each (n, dims) of rows of length 1.

    Args:
        heads: Of first sentences.
        bodies: Of what follows them, in the same order.
        general: Of sentences of another kind than those of the calibration.
    """

    heads: np.ndarray
    bodies: np.ndarray
    general: np.ndarray


class Quality(NamedTuple):
    """How good embeddings are beside the dense model's: 1 is best, but for the standard error.

    Args:
        spearman: Rank correlation of pairwise cosines, of first sentences.
        cosine: Mean cosine with the dense model's, of the same.
        general: Rank correlation on sentences of another kind than those of the calibration.
        accuracy: How often the text that is nearest to a first sentence is the one it begins.
        accuracy_error: The standard error of that.
    """

    spearman: float
    cosine: float
    general: float
    accuracy: float
    accuracy_error: float


def quality(model: Embeddings, dense: Embeddings) -> Quality:
    """Return how good a model's embeddings are beside the dense model's."""
    accuracy = retrieval(model.heads, model.bodies)
    return Quality(
        spearman=agreement(model.heads, dense.heads),
        cosine=float(np.mean((model.heads * dense.heads).sum(1))),
        general=agreement(model.general, dense.general),
        accuracy=accuracy,
        accuracy_error=standard_error(accuracy, len(model.heads)),
    )
