"""Measure a whole GPT on this machine's GPU: a training step, a forward pass, and a token decoded.

Six layers of width 2048 with an FFN of 8192, bfloat16, dense and with some of their linear layers
made sparse by :func:`mlx_sparse_nn.sparsify`. All models live in one process and are timed in
turns, so that what the machine does meanwhile meets all of them alike; times are medians.

- step: a compiled training step with AdamW, 8 sequences of 1,024 tokens.
- forward: the forward pass of the same, compiled with the weights as constants, as for inference.
- decode: one token, and the next chosen from it, as a loop with ``mx.async_eval`` does it: the host
  prepares a token while the GPU is at work for the one before. Compiled likewise, and not.
- alone: the same, where the host waits for each token.

Decoding keeps no cache of keys and values: what that costs is the same for all of these models.

Writes ``benchmarks/results/gpt.json`` (or ``--output``), where each GPU has its entry; with
``--readme`` alone it makes the table of docs/backends.md from that file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from char_lm import ROOT, write_table
from mlx.utils import tree_flatten

from mlx_sparse_nn import sparsify

RESULTS = ROOT / "benchmarks/results/gpt.json"
WIDTH, HIDDEN, LAYERS, HEAD, VOCABULARY = 2048, 8192, 6, 128, 8192
BATCH, LENGTH = 8, 1024
FFN = ("up", "down")


class Configuration(NamedTuple):
    """Which linear layers of a model are sparse, and how."""

    name: str
    block_size: int = 0  # 0 where none is
    density: float = 1.0
    layers: tuple[str, ...] = ()


CONFIGURATIONS = (
    Configuration("dense"),
    Configuration("FFN, B = 64, density 0.1", 64, 0.1, FFN),
    Configuration("FFN, B = 32, density 0.1", 32, 0.1, FFN),
    Configuration("FFN, B = 128, density 0.25", 128, 0.25, FFN),
    Configuration("FFN, B = 128, density 0.5", 128, 0.5, FFN),
    Configuration("all, B = 64, density 0.25", 64, 0.25, (*FFN, "qkv", "out")),
)


class Layer(nn.Module):
    """Causal attention and an FFN, each after its own norm, and each added to what came in."""

    def __init__(self):
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """Return ``(n, tokens, WIDTH)`` of the same."""
        n, tokens, _ = x.shape
        qkv = self.qkv(self.attention_norm(x)).reshape(n, tokens, -1, HEAD).transpose(0, 2, 1, 3)
        queries, keys, values = mx.split(qkv, 3, axis=1)
        mask = "causal" if tokens > 1 else None
        attended = mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=HEAD**-0.5, mask=mask
        )
        x = x + self.out(attended.transpose(0, 2, 1, 3).reshape(n, tokens, WIDTH))
        return x + self.down(nn.gelu_approx(self.up(self.ffn_norm(x))))


class GPT(nn.Module):
    """Embeddings, which also read the logits out, and layers between."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = [Layer() for _ in range(LAYERS)]
        self.norm = nn.RMSNorm(WIDTH)

    def __call__(self, tokens: mx.array) -> mx.array:
        """Return logits ``(n, tokens, VOCABULARY)``."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.embedding.as_linear(self.norm(x))


def make(configuration: Configuration) -> GPT:
    """Return the model, in bfloat16."""
    mx.random.seed(0)
    model = GPT()
    model.set_dtype(mx.bfloat16)
    if configuration.layers:

        def chosen(path: str, module: nn.Module) -> bool:
            return isinstance(module, nn.Linear) and path.split(".")[-1] in configuration.layers

        sparsify(
            model,
            block_size=configuration.block_size,
            density=configuration.density,
            predicate=chosen,
        )
    mx.eval(model.state)
    return model


class Runs(NamedTuple):
    """What is timed of a model."""

    step: Callable[[], mx.array]
    forward: Callable[[], mx.array]
    decode: Callable[[mx.array], mx.array]  # a token (1, 1) to the next
    decode_compiled: Callable[[mx.array], mx.array]


def runs_of(model: GPT) -> Runs:
    """Return what is timed of a model, compiled but for ``decode``."""
    optimizer = optim.AdamW(learning_rate=1e-4)
    optimizer.init(model.trainable_parameters())
    tokens = mx.random.randint(0, VOCABULARY, (BATCH, LENGTH + 1))
    inputs, targets = mx.contiguous(tokens[:, :-1]), mx.contiguous(tokens[:, 1:])
    mx.eval(inputs, targets)

    def loss(model: GPT, inputs: mx.array, targets: mx.array) -> mx.array:
        logits = model(inputs).astype(mx.float32)
        return nn.losses.cross_entropy(logits, targets, reduction="mean")

    def step(inputs: mx.array, targets: mx.array) -> mx.array:
        value, gradients = nn.value_and_grad(model, loss)(model, inputs, targets)
        optimizer.update(model, gradients)
        return value

    def decode(token: mx.array) -> mx.array:
        return mx.argmax(model(token), axis=-1)

    state = [model.state, optimizer.state]
    compiled_step = mx.compile(step, inputs=state, outputs=state)
    forward = mx.compile(lambda tokens: model(tokens))

    def train() -> mx.array:
        value = compiled_step(inputs, targets)
        mx.eval(value, state)
        return value

    return Runs(train, lambda: forward(inputs), decode, mx.compile(decode))


def milliseconds(run: Callable[[], Any]) -> float:
    """Return how long a call and its evaluation take."""
    began = time.perf_counter()
    mx.eval(run())
    return (time.perf_counter() - began) * 1e3


def loop_ms(decode: Callable[[mx.array], mx.array], tokens: int = 64) -> float:
    """Return milliseconds a token of a loop that asks for one before it waits for the last."""
    token = mx.array([[1]])
    mx.eval(token)
    began = time.perf_counter()
    for _ in range(tokens):
        following = decode(token)
        mx.async_eval(following)
        mx.eval(token)
        token = following
    mx.eval(token)
    return (time.perf_counter() - began) / tokens * 1e3


def measure() -> dict[str, dict[str, float]]:
    """Return milliseconds of each configuration, the medians of runs in turns."""
    models = {c.name: make(c) for c in CONFIGURATIONS}
    runs = {name: runs_of(model) for name, model in models.items()}
    one = mx.array([[1]])

    def timed(r: Runs) -> dict[str, float]:
        return {
            "decode": loop_ms(r.decode),
            "decode compiled": loop_ms(r.decode_compiled),
            "alone": milliseconds(lambda: r.decode(one)),
            "alone compiled": milliseconds(lambda: r.decode_compiled(one)),
            "forward": milliseconds(r.forward),
            "step": milliseconds(r.step),
        }

    for r in runs.values():  # kernels are compiled on their first launch
        timed(r)
    rounds = [{name: timed(r) for name, r in runs.items()} for _ in range(9)]
    found = {}
    for name, model in models.items():
        arrays: list[Any] = tree_flatten(model.trainable_parameters())  # pyright: ignore
        found[name] = {"parameters": sum(array.size for _, array in arrays)}
        for key in rounds[0][name]:
            found[name][key] = statistics.median(times[name][key] for times in rounds)
    return found


def table(results: dict[str, dict]) -> str:
    """Return the table of docs/backends.md: the models below each GPU."""
    lines = [
        "| GPU | sparse layers | parameters | training step, ms | forward, ms "
        "| token, compiled, ms | token, ms |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for device, models in results.items():
        for name, times in models.items():
            cells = (f"{times[key]:.1f}" for key in ("step", "forward"))
            tokens = (f"{times[key]:.2f}" for key in ("decode compiled", "decode"))
            parameters = f"{times['parameters'] / 1e6:.0f} M"
            lines.append(f"| {' | '.join([device, name, parameters, *cells, *tokens])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readme", action="store_true", help="only make the table")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not args.readme:
        mx.set_default_device(mx.Device(mx.gpu))
        results = json.loads(args.output.read_text()) if args.output.exists() else {}
        results[str(mx.device_info()["device_name"])] = measure()
        args.output.write_text(json.dumps(results, indent=1) + "\n")
    write_table("gpt", table(json.loads(args.output.read_text())), "docs/backends.md")


if __name__ == "__main__":
    main()
