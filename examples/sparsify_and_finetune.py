"""Make a trained dense network sparse and fine-tune it, beside networks that were sparse all along.

A small network learns to predict the next character of Python's own manual from the 16 before it.
At each density, four block-sparse ones are compared with the dense one:

  fine-tuned  the dense network with its weak blocks cut away at once, then trained on
  pruned      the same, but cut down gradually while it is trained on
  sparse      a random pattern from the first step
  regrown     the same, but weak blocks give way to ones where the gradient is large (RigL)

It teaches sparsify, prune, regrow and training that is sparse from the start. All networks see the
same number of batches. The default sizes suit two CPU cores: a run takes about two minutes.

  python examples/sparsify_and_finetune.py --plot sparsify.png
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from _common import Parser, add_common_arguments, check_plot, start
from tqdm import tqdm

from mlx_sparse_nn import (
    BlockSparseLinear,
    activations,
    cubic_density,
    prune,
    regrow,
    sparsify,
)

CONTEXT, EMBEDDING = 16, 16
METHODS = ("fine-tuned", "pruned", "sparse", "regrown")

Between = Callable[[int, optim.Optimizer], None]


class CharMLP(nn.Module):
    """Ids of the last characters ``(..., CONTEXT)`` -> logits of the next ``(..., characters)``.

    The neural language model of Bengio et al. (2003), with two hidden layers.
    """

    def __init__(self, characters: int, args: argparse.Namespace, density: float | None = None):
        super().__init__()
        sparse = partial(BlockSparseLinear, block_size=args.block_size)
        linear = nn.Linear if density is None else partial(sparse, density=density)
        self.embedding = nn.Embedding(characters, EMBEDDING)
        self.hidden = [linear(CONTEXT * EMBEDDING, args.width), linear(args.width, args.width)]
        self.head = nn.Linear(args.width, characters)

    def __call__(self, ids: mx.array) -> mx.array:
        x = self.embedding(ids).flatten(-2)
        for layer in self.hidden:
            x = nn.relu(layer(x))
        return self.head(x)


def loss_of(model: CharMLP, windows: mx.array) -> mx.array:
    """Return the mean cross-entropy in nats of windows ``(B, CONTEXT + 1)``."""
    return nn.losses.cross_entropy(model(windows[:, :-1]), windows[:, -1], reduction="mean")


class Data:
    """Windows of Python's manual: batches from its first nine tenths, validation on the rest."""

    def __init__(self, args: argparse.Namespace):
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[name] for name in sorted(topics))
        vocabulary, ids = np.unique(list(text), return_inverse=True)
        self.characters = vocabulary.size
        self.args = args
        windows = np.lib.stride_tricks.sliding_window_view(ids.astype(np.int32), CONTEXT + 1)
        self.training, validation = np.split(windows, [len(windows) * 9 // 10])
        self.validation = mx.array(validation[:: len(validation) // 4096])

    def batch(self, step: int) -> mx.array:
        """Return the batch of a step: the same one for every network."""
        rng = np.random.default_rng([self.args.seed, step])
        return mx.array(self.training[rng.integers(len(self.training), size=self.args.batch)])


def train(
    model: CharMLP,
    data: Data,
    bar: tqdm,
    first: int,
    last: int,
    between: Between | None = None,
) -> None:
    """Train from step ``first`` up to ``last``; ``between`` may change the model after a step."""
    args = data.args
    total, warm_up = args.steps + args.finetune, max(1, (args.steps + args.finetune) // 20)
    rise = optim.linear_schedule(0, args.learning_rate, warm_up)
    decay = optim.cosine_decay(args.learning_rate, total, args.learning_rate / 20)
    schedule = optim.join_schedules([rise, decay], [warm_up])
    optimizer = optim.Adam(lambda step: schedule(step + first), bias_correction=True)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]
    loss_and_grad = nn.value_and_grad(model, loss_of)

    @partial(mx.compile, inputs=state, outputs=state)
    def train_step(windows: mx.array) -> mx.array:
        loss, grads = loss_and_grad(model, windows)
        optimizer.update(model, grads)
        return loss

    for step in range(first, last):
        loss = train_step(data.batch(step))
        mx.eval(loss, state)
        if not math.isfinite(float(loss)):
            sys.exit(f"the loss is {float(loss)} at step {step + 1}; try a lower --learning-rate")
        if between is not None:
            between(step + 1, optimizer)
        bar.update()


def fine_tuned(dense: CharMLP, data: Data, density: float, bar: tqdm) -> CharMLP:
    """Keep the strongest blocks of a trained dense network, and train on."""
    args, model = data.args, copy.deepcopy(dense)
    sparsify(model, block_size=args.block_size, density=density, predicate=is_hidden)
    train(model, data, bar, args.steps, args.steps + args.finetune)
    return model


def pruned(dense: CharMLP, data: Data, density: float, bar: tqdm) -> CharMLP:
    """Come down from a trained dense network to the density over half of the fine-tuning."""
    args, model = data.args, copy.deepcopy(dense)
    sparsify(model, block_size=args.block_size, density=1.0, predicate=is_hidden)
    half = max(1, args.finetune // 2)
    schedule = cubic_density(1.0, density, steps=half, start=args.steps)
    interval = max(1, half // 10)

    def between(step: int, optimizer: optim.Optimizer) -> None:
        if step % interval == 0 or step == args.steps + half:
            prune(model, schedule(step), optimizer=optimizer)

    train(model, data, bar, args.steps, args.steps + args.finetune, between)
    return model


def sparse(dense: CharMLP, data: Data, density: float, bar: tqdm) -> CharMLP:
    """Train a sparse network from scratch; its pattern stays."""
    model = CharMLP(data.characters, data.args, density)
    train(model, data, bar, 0, data.args.steps + data.args.finetune)
    return model


def regrown(dense: CharMLP, data: Data, density: float, bar: tqdm) -> CharMLP:
    """Train a sparse network from scratch, and exchange blocks during three quarters of it."""
    args, model = data.args, CharMLP(data.characters, data.args, density)
    end = (args.steps + args.finetune) * 3 // 4
    interval = max(1, end // 20)
    fraction = optim.cosine_decay(0.3, max(1, end))

    def between(step: int, optimizer: optim.Optimizer) -> None:
        if step % interval == 0 and step < end:
            found = activations(model, loss_of, model, data.batch(step))
            regrow(model, fraction(step).item(), activations=found, optimizer=optimizer)

    train(model, data, bar, 0, args.steps + args.finetune, between)
    return model


def is_hidden(path: str, module: nn.Module) -> bool:
    return path.startswith("hidden")


def make_parser() -> Parser:
    parser = Parser(description=__doc__)

    def add(name: str, text: str, **options: Any) -> None:
        default = "" if options.get("default") is None else " (default: %(default)s)"
        parser.add_argument(name, help=text + default, **options)

    add(
        "--densities",
        "stored fractions of the hidden layers",
        type=float,
        nargs="+",
        default=[0.0625, 0.125, 0.25, 0.5],
        metavar="P",
    )
    add("--steps", "batches before the dense network is cut", type=int, default=300, metavar="N")
    add("--finetune", "batches after that", type=int, default=300, metavar="N")
    add("--batch", "windows per batch", type=int, default=64, metavar="N")
    add("--width", "hidden features", type=int, default=256, metavar="N")
    add("--block-size", "side of the stored blocks", type=int, default=16, metavar="N")
    add("--learning-rate", "its peak", type=float, default=4e-3, metavar="X")
    add("--plot", "draw the validation loss against the density", type=Path, metavar="FILE")
    add_common_arguments(parser)
    return parser


def check(parser: Parser, args: argparse.Namespace) -> None:
    """End with a one-line error unless the arguments make sense."""
    for name in ("steps", "finetune", "batch", "width", "block_size"):
        if (value := getattr(args, name)) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not (math.isfinite(args.learning_rate) and args.learning_rate > 0):
        parser.error(f"--learning-rate must be above 0, got {args.learning_rate}")
    # A random pattern with a block in every block-row and block-column is no sparser than this.
    least = 1 / math.ceil(min(args.width, CONTEXT * EMBEDDING) / args.block_size)
    for density in args.densities:
        if not least <= density <= 1:
            parser.error(f"--densities must be in [{least:g}, 1], got {density}")
    check_plot(parser, args.plot)


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    start(parser, args)
    check(parser, args)
    data = Data(args)
    began = time.perf_counter()

    def validation_loss(model: CharMLP) -> float:
        return loss_of(model, data.validation).item()  # type: ignore[return-value]

    total, n = args.steps + args.finetune, len(args.densities)
    rows: list[dict[str, float]] = []
    with tqdm(
        total=total * (1 + 2 * n) + args.finetune * 2 * n,
        unit="step",
        mininterval=0.5 if sys.stderr.isatty() else 10,  # seconds; a log file needs few lines
    ) as bar:
        bar.set_description("dense", refresh=False)
        dense = CharMLP(data.characters, args)
        train(dense, data, bar, 0, args.steps)
        reference = copy.deepcopy(dense)
        train(reference, data, bar, args.steps, total)
        dense_loss = validation_loss(reference)
        for density in sorted(args.densities):
            row = {"density": density}
            for name, method in zip(METHODS, (fine_tuned, pruned, sparse, regrown), strict=True):
                bar.set_description(f"{name}, density {density:g}", refresh=False)
                mx.random.seed(args.seed)
                row[name] = validation_loss(method(dense, data, density, bar))
            rows.append(row)

    print(f"validation loss in nats per character after {total} steps; dense {dense_loss:.3f}")
    print("density   " + "".join(f"{name:>12}" for name in METHODS))
    for row in rows:
        print(f"{row['density']:<10.4g}" + "".join(f"{row[name]:>12.3f}" for name in METHODS))
    print(f"seconds   {time.perf_counter() - began:.1f}")
    if args.plot:
        draw(args.plot, rows, dense_loss)
        print(f"plot      {args.plot}")


def draw(path: Path, rows: list[dict[str, float]], dense_loss: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.8), layout="constrained")
    densities = [row["density"] for row in rows]
    for name, style in zip(METHODS, ("o-", "s-", "o--", "s--"), strict=True):
        color = "tab:blue" if name in METHODS[:2] else "tab:orange"
        axis.semilogx(densities, [row[name] for row in rows], style, color=color, label=name)
    axis.axhline(dense_loss, color="tab:gray", linewidth=1, label="dense")
    axis.set(
        xlabel="density of the hidden layers",
        ylabel="validation loss (nats per character)",
        title="Sparse from a dense network, and sparse all along",
    )
    axis.set_xticks(densities, [f"{density:g}" for density in densities])
    axis.minorticks_off()
    axis.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
