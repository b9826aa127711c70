"""The models that are made sparse, with the texts that they are fitted to and measured on."""

from __future__ import annotations

import functools
import time
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from benchmarks import smollm
from examples import _minilm, _texts
from examples._quality import Embeddings, quality
from mlx_sparse_nn import Sensitivity, sensitivity

WINDOW = 256  # tokens of a piece of text for SmolLM2


class Size(NamedTuple):
    """How many texts are used.

    Args:
        texts: Of calibration, for MiniLM.
        tokens: Of calibration, for SmolLM2.
        evaluated: Docstrings that are embedded.
        windows: Pieces of topics and of docstrings, for SmolLM2.
        minutes: Of distillation.
    """

    texts: int = 160
    tokens: int = 8192
    evaluated: int = 150
    windows: tuple[int, int] = (2, 3)
    minutes: float = 10.0


QUICK = Size(texts=12, tokens=512, evaluated=24, windows=(1, 1), minutes=0.1)


class MiniLM:
    """The sentence encoder, its texts and its measures.

    Args:
        size: How many texts.
    """

    def __init__(self, size: Size):
        _, self.tokenizer = _minilm.load()
        found = _texts.evaluation(size.evaluated)
        self.heads, self.bodies = (self.tokenizer(texts) for texts in zip(*found, strict=True))
        self.general = self.tokenizer(_texts.general())
        texts = self.tokenizer(_texts.calibration(size.texts))
        # Every fourth batch measures for sensitivity, so there are more than a few.
        self.samples = {"batches": _minilm.batches(texts, 8), "rows": _minilm.rows}
        (self.timed,) = _minilm.batches([text[:32] for text in self.bodies[:8]])
        self.dense: Any = self.load()
        self.of_dense = self.embed(self.dense)

    def load(self) -> nn.Module:
        """Return the dense model."""
        return _minilm.load()[0]

    def blocks(self, model: Any) -> list:
        """Return the layers that run one after another."""
        return model.layers

    @functools.cache  # noqa: B019
    def sensitivity(self, block_size: int) -> tuple[Sensitivity, float]:
        """Return what each layer costs the outputs, for all densities, and the seconds of it."""
        began = time.perf_counter()
        shared = {"density": 0.5, "blocks": self.dense.layers, "progress": False}
        measured = sensitivity(self.dense, **self.samples, **shared, block_size=block_size)
        return measured, time.perf_counter() - began

    def embed(self, model: Any) -> Embeddings:
        """Return the embeddings that the measures compare."""
        texts = (self.heads, self.bodies, self.general)
        return Embeddings(*(_minilm.embed(model, ids) for ids in texts))

    def measure(self, model: Any) -> dict[str, float]:
        """Return the measures of ``examples/_quality.py``."""
        return quality(self.embed(model), self.of_dense)._asdict()

    def forward(self, model: Any) -> mx.array:
        """Return what a pass over 8 texts of up to 32 tokens gives, not evaluated."""
        return model(*self.timed)


class SmolLM:
    """The language model, its texts and its measures.

    Args:
        size: How many texts.
    """

    def __init__(self, size: Size):
        self.dense, tokenizer = smollm.load(smollm.installed())
        generator = np.random.default_rng(0)
        topics = _texts.shuffled(_texts.topics(), generator)
        cut = int(0.8 * len(topics))
        docstrings = ["\n\n".join(pair) for pair in _texts.docstrings()]
        drawn = _texts.shuffled(docstrings, generator)[:60]
        pieces = functools.partial(smollm.windows, tokenizer, tokens=WINDOW)
        self.samples = {"batches": pieces(topics[:cut])[: max(1, size.tokens // WINDOW)]}
        self.topics = pieces(topics[cut:])[: size.windows[0]]
        self.docstrings = pieces(drawn)[: size.windows[1]]

    def load(self) -> nn.Module:
        """Return the dense model."""
        return smollm.load(smollm.installed())[0]

    def blocks(self, model: Any) -> list:
        """Return the layers that run one after another."""
        return model.model.layers

    def measure(self, model: Any) -> dict[str, float]:
        """Return nats a token of topics and docstrings that calibration has not seen."""
        nats = functools.partial(smollm.nats, model)
        return {"topics": nats(self.topics), "docstrings": nats(self.docstrings)}

    def forward(self, model: Any) -> mx.array:
        """Return what a pass over 256 tokens gives, not evaluated."""
        return model(self.topics[0])
