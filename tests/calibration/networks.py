"""Small networks for tests of calibration, and correlated inputs for them."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np


class Block(nn.Module):
    """Two projections of one input, then a feed-forward net; ``scale`` is a second argument."""

    def __init__(self, dims):
        super().__init__()
        self.query = nn.Linear(dims, dims, bias=False)
        self.key = nn.Linear(dims, dims, bias=False)
        self.up = nn.Linear(dims, 2 * dims)
        self.down = nn.Linear(2 * dims, dims)

    def __call__(self, x, scale=None):
        x = x + self.query(x) * mx.tanh(self.key(x))
        y = self.down(nn.gelu(self.up(x)))
        return x + (y if scale is None else y * scale)


class Network(nn.Module):
    """A stack of blocks between two linear layers."""

    def __init__(self, dims=32, n_blocks=3, inputs=8, outputs=5):
        super().__init__()
        self.first = nn.Linear(inputs, dims)
        self.layers = [Block(dims) for _ in range(n_blocks)]
        self.last = nn.Linear(dims, outputs)

    def __call__(self, x, scale=None):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x, scale=scale)
        return self.last(x)


def correlated(n, n_in, seed=0, mean=0.5):
    """Return samples ``(n, n_in)`` float32 of which a few directions hold most."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(n, n_in)) * np.geomspace(1, 0.05, n_in)
    rotation = np.linalg.qr(rng.normal(size=(n_in, n_in)))[0]
    return (mixed @ rotation + mean * rng.normal(size=n_in)).astype(np.float32)


def batches(n=6, size=(4, 25, 8), seed=0):
    """Return batches of correlated inputs."""
    x = correlated(n * int(np.prod(size[:-1])), size[-1], seed)
    return [mx.array(part.reshape(size)) for part in np.split(x, n)]


def relative_error(got, wanted):
    """Return how far apart two arrays are, by their norms."""
    got, wanted = np.array(got, np.float64), np.array(wanted, np.float64)
    return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
