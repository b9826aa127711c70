"""The models that sparsify_pretrained.py takes, each with its texts, its measure and its loss."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import _minilm
import _quality
import _texts
import mlx.core as mx
import mlx.nn as nn
import numpy as np

Batch = tuple[mx.array, ...]
LONGEST = 48  # tokens of a text in training, its two marks included


class Subject(Protocol):
    """A dense model and what it takes to make it sparse and to say what was lost.

    Attributes:
        name: Of the model.
        dense: The model itself, which nobody changes.
        measure_name: What ``measure`` gives first, in words.
        higher: Whether more of that is better.
        samples: Batches of calibration.
        small_batches: For ``sensitivity``, which measures on every fourth.
        rows: Says which tokens of a batch count, flattened, or None if all do.
        timed: The batch that is timed.
        tokens: Of its texts, one after another, (n,): a run that is resumed had the same.
        period: After how many steps of distillation batches repeat, or None if they never do.
    """

    name: str
    dense: Any
    measure_name: str
    higher: bool
    samples: list[Batch]
    small_batches: list[Batch]
    rows: Any
    timed: Batch
    tokens: np.ndarray
    period: int | None

    def batch(self, step: int) -> Batch:
        """Return what a step of distillation sees: the same for each model and each run."""
        ...

    def keep(self, batch: Batch) -> mx.array:
        """Return 1 for tokens that count and 0 for padding, (B, T)."""
        ...

    def output_loss(self, output: mx.array, target: mx.array) -> mx.array:
        """Return how far outputs are from the dense model's."""
        ...

    def measure(self, model: Any) -> dict[str, float]:
        """Return the quality of a model on texts that nothing was fitted to."""
        ...


class Encoder:
    """MiniLM, or another encoder of its kind; fitted to Python's manual, measured on docstrings.

    Args:
        model: The encoder.
        tokenize: Gives the tokens of each of a list of texts.
        args: ``texts``, ``batch``, ``docstrings`` and ``seed``.
    """

    measure_name = "rank correlation of similarities"
    higher = True

    def __init__(self, model: Any, tokenize: Any, args: Any):
        self.dense, self.name = model, "MiniLM"
        heads, bodies = zip(*_texts.evaluation(), strict=True)
        self.heads, self.bodies = tokenize(heads), tokenize(bodies)
        self.general = tokenize(_texts.general())
        calibration = tokenize(_texts.calibration(args.texts))
        self.samples = _minilm.batches(calibration)
        self.small_batches = _minilm.batches(calibration, 8)
        self.rows = _minilm.rows
        self.timed = _minilm.pad([text[:32] for text in self.bodies[:8]])
        training = tokenize(training_texts(args.docstrings))
        self.tokens = np.concatenate(calibration)
        self.training = [[*text[: LONGEST - 1], text[-1]] for text in training]
        self.groups = self._drawn(min(args.batch, len(self.training)), args.seed)
        self.period: int | None = len(self.groups)
        self.of_dense = self._embeddings(model)

    def batch(self, step: int) -> Batch:
        ids, keep = _minilm.pad([self.training[i] for i in self.groups[step % len(self.groups)]])
        width = [(0, 0), (0, -ids.shape[1] % 8)]  # few widths, so that few graphs are compiled
        return mx.pad(ids, width), mx.pad(keep, width)

    def _drawn(self, size: int, seed: int) -> list[np.ndarray]:
        """Return the texts of all batches; those of one are about equally long."""
        generator = np.random.default_rng(seed)
        order = generator.permutation(len(self.training))
        groups = []
        for start in range(0, len(order), 16 * size):
            part = order[start : start + 16 * size]
            part = part[np.argsort([len(self.training[i]) for i in part], kind="stable")]
            groups += [part[i : i + size] for i in range(0, len(part) - size + 1, size)]
        return [groups[i] for i in generator.permutation(len(groups))]

    def keep(self, batch: Batch) -> mx.array:
        return batch[1]

    def output_loss(self, output: mx.array, target: mx.array) -> mx.array:
        """Return one minus the mean cosine, and how far the cosines of all pairs are off."""
        n = len(output)
        pairs = mx.square(output @ output.T - target @ target.T).sum() / max(1, n * (n - 1))
        return (1 - (output * target).sum(-1)).mean() + 2 * pairs

    def measure(self, model: Any) -> dict[str, float]:
        return _quality.quality(self._embeddings(model), self.of_dense)._asdict()

    def _embeddings(self, model: Any) -> _quality.Embeddings:
        texts = (self.heads, self.bodies, self.general)
        return _quality.Embeddings(*(_minilm.embed(model, ids) for ids in texts))


class LanguageModel:
    """A model of mlx-lm, with a text of which the last tenth is held out.

    Args:
        folder: The model's directory, as mlx-lm loads it.
        text: What it is made sparse for.
        args: ``batch``, ``texts``, ``length`` and ``seed``.

    Raises:
        ValueError: mlx-lm cannot load the directory, or the text is too short.
    """

    measure_name = "nats per token"
    higher = False
    rows = None
    period: int | None = None

    def __init__(self, folder: Path, text: str, args: Any):
        from mlx_lm.utils import load

        try:
            self.dense, tokenizer = load(str(folder))[:2]
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"--model: mlx-lm does not load {folder}: {error}") from None
        self.name = folder.resolve().name
        self.dense.set_dtype(mx.float32)  # the small steps of training would be lost in 16 bits
        self.dense.eval()
        ids = tokenizer.encode(text)
        self.tokens = np.array(ids, np.int32)
        n, self.length = len(ids) * 9 // 10, args.length
        if len(ids) - n < self.length or n < self.length * args.batch:
            raise ValueError(
                f"--data: a text of {len(ids)} tokens is too short for --batch {args.batch} and "
                f"--length {self.length}"
            )
        self.training, held_out = self.tokens[:n], self.tokens[n:]
        self.size, self.seed = args.batch, args.seed
        windows = self._windows(self.training)[: args.texts]
        self.samples = [
            (mx.array(part),) for part in np.array_split(windows, -(-len(windows) // 4))
        ]
        self.small_batches = self.samples[:8]
        self.held_out = [mx.array(window[None]) for window in self._windows(held_out)[:64]]
        self.timed = (mx.array(windows[:1]),)

    def _windows(self, ids: np.ndarray) -> np.ndarray:
        n = len(ids) // self.length
        return ids[: n * self.length].reshape(n, self.length)

    def batch(self, step: int) -> Batch:
        generator = np.random.default_rng([self.seed, step])
        starts = generator.integers(len(self.training) - self.length + 1, size=self.size)
        return (mx.array(self.training[starts[:, None] + np.arange(self.length)]),)

    def keep(self, batch: Batch) -> mx.array:
        return mx.ones(batch[0].shape)

    def output_loss(self, output: mx.array, target: mx.array) -> mx.array:
        """Return the mean divergence (Kullback-Leibler) of the next token's distribution."""
        target = target - mx.logsumexp(target, axis=-1, keepdims=True)
        output = output - mx.logsumexp(output, axis=-1, keepdims=True)
        return (mx.exp(target) * (target - output)).sum(-1).mean()

    def measure(self, model: Any) -> dict[str, float]:
        mean = partial(nn.losses.cross_entropy, reduction="mean")
        losses = [float(mean(model(ids)[:, :-1], ids[:, 1:])) for ids in self.held_out]
        error = float(np.std(losses)) / len(losses) ** 0.5
        return {"nats": float(np.mean(losses)), "nats_error": error}


def training_texts(with_docstrings: bool) -> list[str]:
    """Return the paragraphs of Python's manual and their sentences, and docstrings if asked for.

    Those that quality is measured on are not among them, and neither is what shares one in five of
    its runs of five words with them: modules such as ``scipy.stats`` say much the same many times.
    """
    texts = _texts.topics()
    for text in list(texts):
        texts += [part for part in re.split(r"(?<=[.:;!?])\s+", text) if len(part) > 25]
    if with_docstrings:
        texts += [part[:300] for pair in _texts.docstrings() for part in pair]
    measured = set().union(*(_runs(part) for pair in _texts.evaluation() for part in pair))
    return [text for text in dict.fromkeys(texts) if not _is_shared(_runs(text), measured)]


def _runs(text: str, length: int = 5) -> set[tuple[str, ...]]:
    """Return all runs of some words of a text, or the whole of a shorter one."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + length]) for i in range(max(1, len(words) - length + 1))}


def _is_shared(runs: set[tuple[str, ...]], measured: set[tuple[str, ...]]) -> bool:
    return len(runs & measured) >= 0.2 * len(runs)


def random_encoder(args: Any) -> Encoder:
    """Return an encoder of two layers that has learned nothing, for a quick look."""
    model = _minilm.Encoder(512, dims=64, heads=2, hidden=128, n_layers=2, longest=64)
    mx.eval(model.parameters())

    def tokenize(texts: Sequence[str]) -> list[list[int]]:
        words = ([*re.findall(r"\w+", text), "."][: _minilm.MAX_TOKENS] for text in texts)
        return [[sum(word.encode()) % 512 for word in found] for found in words]

    encoder = Encoder(model, tokenize, args)
    encoder.name = "a random encoder"
    return encoder


def trained_encoder(args: Any) -> Encoder:
    """Return MiniLM, or an encoder of its kind in a directory."""
    try:
        encoder = Encoder(*_minilm.load(args.model), args)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from None
    if args.model is not None:
        encoder.name = args.model.resolve().name
    return encoder


def load(args: Any) -> Encoder | LanguageModel:
    """Return the model that the arguments name.

    Raises:
        ValueError: There is no such model, its text is missing, or it does not take the texts.
    """
    folder = args.model
    if args.random or folder is None or kind_of(folder) == "bert":
        if args.data is not None:
            raise ValueError("--data is for a language model: an encoder takes Python's manual")
        return random_encoder(args) if args.random else trained_encoder(args)
    if args.data is None:
        raise ValueError("--data FILE is needed with a language model: the text that it is for")
    if args.docstrings:
        raise ValueError("--docstrings is for an encoder: a language model takes --data alone")
    if args.data.suffix.lower() in (".json", ".jsonl"):
        raise ValueError(f"--data must be plain text, not records, got {args.data}")
    try:
        text = args.data.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--data {args.data}: {error}") from None
    return LanguageModel(folder, text, args)


def kind_of(folder: Path) -> str:
    """Return the ``model_type`` of a model's directory.

    Raises:
        ValueError: It has no configuration.
    """
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"--model: {folder} is no directory of a model: {error}") from None
