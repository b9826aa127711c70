"""Train a small character-level Transformer whose feed-forward layers are block-sparse.

It teaches a training loop with sparse layers: a compiled step, data by mlx.data, checkpoints with
patterns, and a run that goes on to the same end, bit for bit, wherever it was stopped.

The default text is Python's own manual, which every Python carries, and the default sizes suit two
CPU cores: a run takes about two minutes. --dense trains the same model with nn.Linear. A checkpoint
is written at every validation, and --resume goes on from it, however the run before ended.

  python examples/train_char_lm.py
  python examples/train_char_lm.py --resume --sample 2000
  python examples/train_char_lm.py --text book.txt --dims 512 --layers 6 --context 256 --batch 64
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.data as dx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from _common import Parser, add_common_arguments, start
from mlx.utils import tree_flatten, tree_unflatten
from tqdm import tqdm

from mlx_sparse_nn import BlockSparseLinear


class TransformerBlock(nn.Module):
    """Causal self-attention, then a feed-forward layer, each added to its input."""

    def __init__(self, args: argparse.Namespace):
        super().__init__()
        sparse = partial(BlockSparseLinear, block_size=args.block_size, density=args.density)
        feed_forward = nn.Linear if args.dense else sparse
        projection = feed_forward if args.sparse_attention else nn.Linear
        dims, self.heads = args.dims, args.heads
        self.attention_norm = nn.RMSNorm(dims)
        self.qkv = projection(dims, 3 * dims)
        self.out = projection(dims, dims)
        self.rope = nn.RoPE(dims // args.heads)
        self.feed_forward_norm = nn.RMSNorm(dims)
        self.up = feed_forward(dims, 4 * dims)
        self.down = feed_forward(4 * dims, dims)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(nn.relu(self.up(self.feed_forward_norm(x))))

    def attention(self, x: mx.array) -> mx.array:
        batch, length, dims = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3 * self.heads, -1).swapaxes(1, 2)
        q, k, v = mx.split(qkv, 3, axis=1)  # (batch, heads, length, dims / heads)
        q, k = self.rope(q), self.rope(k)
        scale = (dims // self.heads) ** -0.5
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")
        return self.out(y.swapaxes(1, 2).reshape(x.shape))


class CharLM(nn.Module):
    """A decoder-only Transformer: ids ``(B, T)`` -> logits ``(B, T, characters)``."""

    def __init__(self, characters: int, args: argparse.Namespace):
        super().__init__()
        self.embedding = nn.Embedding(characters, args.dims)
        self.blocks = [TransformerBlock(args) for _ in range(args.layers)]
        self.norm = nn.RMSNorm(args.dims)
        self.head = nn.Linear(args.dims, characters)

    def __call__(self, ids: mx.array) -> mx.array:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class NotFinite(ArithmeticError):
    """A loss is not finite."""


def loss_of(model: CharLM, windows: mx.array, reduction: Any = "mean") -> mx.array:
    """Return the cross-entropy in nats of windows ``(B, T + 1)``, each id given those before."""
    return nn.losses.cross_entropy(model(windows[:, :-1]), windows[:, 1:], reduction=reduction)


def read_text(path: str | None) -> str:
    """Return the text of a UTF-8 file, or Python's manual."""
    if path is not None:
        return Path(path).read_text(encoding="utf-8")
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def cut(ids: np.ndarray, context: int) -> np.ndarray:
    """Cut ids into windows ``(n, context + 1)``; the last id of one is the first of the next."""
    return np.lib.stride_tricks.sliding_window_view(ids, context + 1)[::context].copy()


def steps_per_epoch(n_ids: int, args: argparse.Namespace) -> int:
    """Return how many whole batches there are, wherever an epoch begins to cut."""
    return (n_ids - args.context) // args.context // args.batch


def batches(ids: np.ndarray, args: argparse.Namespace, step: int) -> Iterator[mx.array]:
    """Yield the batches ``(batch, context + 1)`` of an endless run, from that of ``step`` on.

    How an epoch cuts and shuffles the text follows from the seed and its own number alone, so a
    resumed run sees the very batches that it would have seen without the interruption.
    """
    per_epoch = steps_per_epoch(ids.size, args)
    epoch, skip = divmod(step, per_epoch)
    while True:
        rng = np.random.default_rng([args.seed, epoch])
        windows = cut(ids[rng.integers(args.context) :], args.context)
        # MLX Data's shuffle draws from a global generator.
        dx.core.set_state(int(rng.integers(2**31)))  # type: ignore[attr-defined]
        stream = (
            dx.buffer_from_vector([{"ids": window} for window in windows])  # type: ignore[attr-defined]
            .shuffle()
            .to_stream()
            .batch(args.batch)
            .prefetch(8, 1)  # one thread: several would hand out the batches in any order
        )
        for index, batch in zip(range(per_epoch), stream, strict=False):
            if index >= skip:
                yield mx.array(batch["ids"])
        epoch, skip = epoch + 1, 0


def evaluator(model: CharLM, ids: np.ndarray, context: int) -> Callable[[], float]:
    """Return a function that gives the mean loss over ``ids`` in nats per character."""
    windows = mx.array(cut(ids, context))
    loss = mx.compile(partial(loss_of, model, reduction="sum"), inputs=model.state)

    def evaluate() -> float:
        total = sum(float(loss(windows[i : i + 16])) for i in range(0, len(windows), 16))
        return total / windows[:, 1:].size

    return evaluate


def sample(model: CharLM, prompt: list[int], n: int, temperature: float) -> Iterator[int]:
    """Yield ``n`` more ids, each drawn given the ``len(prompt)`` ids before it."""
    forward = mx.compile(model, inputs=model.state)
    ids = list(prompt)
    for _ in range(n):
        last = forward(mx.array([ids[-len(prompt) :]]))[0, -1]
        drawn = mx.random.categorical(last / temperature) if temperature else last.argmax()
        ids.append(int(drawn))
        yield ids[-1]


def save_checkpoint(path: Path, model: CharLM, optimizer: optim.Optimizer, progress: dict) -> None:
    """Write all that a run needs to go on: whole, or not at all."""
    arrays = dict(tree_flatten({"model": model.parameters(), "optimizer": optimizer.state}))
    arrays["random"] = mx.random.state[0]  # type: ignore[index]
    unfinished = path.with_suffix(".tmp.safetensors")
    mx.save_safetensors(str(unfinished), arrays, {"progress": json.dumps(progress)})
    os.replace(unfinished, path)  # atomic: there is the old file or the new one, never a part


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict]:
    """Return the arrays and the ``progress`` that :func:`save_checkpoint` wrote."""
    loaded: Any = mx.load(str(path), return_metadata=True)
    return loaded[0], json.loads(loaded[1]["progress"])


def saved_step(path: Path) -> int:
    """Return the step from which a run that was stopped anywhere, within a save too, can go on."""
    return read_checkpoint(path)[1]["step"] if path.is_file() else 0


def load_checkpoint(path: Path, model: CharLM, optimizer: optim.Optimizer, settings: dict) -> dict:
    """Restore what :func:`save_checkpoint` wrote, and return its ``progress``.

    Raises:
        ValueError: There is no checkpoint, or it is of a run with other settings.
    """
    if not path.is_file():
        raise ValueError(f"there is no checkpoint to resume at {path}")
    try:
        arrays, progress = read_checkpoint(path)
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"{path} is no checkpoint of this script: {error}") from None
    for name, value in settings.items():
        if (other := progress["settings"].get(name)) != value:
            raise ValueError(f"{path} is of a run with {name} {other}, not {value}")
    high, low = arrays.pop("random").tolist()
    mx.random.seed(high << 32 | low)  # MLX's random state is its seed until a number is drawn
    state: Any = tree_unflatten(arrays)
    weights: Any = tree_flatten(state["model"])
    model.load_weights(weights)  # brings the patterns of the layers, too
    optimizer.state = state["optimizer"]
    return progress


def train(
    model: CharLM,
    optimizer: optim.Optimizer,
    data: Iterator[mx.array],
    evaluate: Callable[[], float],
    save: Callable[[], None],
    progress: dict,
    args: argparse.Namespace,
) -> float:
    """Train up to ``args.steps``, keeping ``progress``; return the validation loss.

    Raises:
        NotFinite: The loss is not finite. The checkpoint is the one before.
    """
    state = [model.state, optimizer.state, mx.random.state]
    loss_and_grad = nn.value_and_grad(model, loss_of)

    @partial(mx.compile, inputs=state, outputs=state)
    def step(windows: mx.array) -> mx.array:
        loss, grads = loss_and_grad(model, windows)
        grads, _ = optim.clip_grad_norm(grads, 1.0)
        optimizer.update(model, grads)
        return loss

    validation_loss = None
    began, first = time.perf_counter() - progress["seconds"], progress["step"] + 1
    with tqdm(
        total=args.steps,
        initial=progress["step"],
        unit="step",
        mininterval=0.5 if sys.stderr.isatty() else 10,  # seconds; a log file needs few lines
    ) as bar:
        for done in range(first, args.steps + 1):
            loss = step(next(data))
            mx.eval(state, loss)
            check_finite("loss", float(loss), done)
            if done == first:
                bar.unpause()  # the first step traces and compiles: it is no measure of the others
            bar.set_postfix_str(said(float(loss), bar, args), refresh=False)
            bar.update()
            if done % args.interval == 0 or done == args.steps:
                validation_loss = evaluate()
                check_finite("validation loss", validation_loss, done)
                progress.update(step=done, seconds=time.perf_counter() - began)
                save()
                with tqdm.external_write_mode():
                    print(f"step {done}: validation loss {validation_loss:.4f}", flush=True)
    return evaluate() if validation_loss is None else validation_loss


def check_finite(what: str, loss: float, step: int) -> None:
    """Raise if a loss is not finite."""
    if not math.isfinite(loss):
        raise NotFinite(f"the {what} is {loss} at step {step}")


def said(loss: float, bar: tqdm, args: argparse.Namespace) -> str:
    """Return what stands behind the bar."""
    characters = (bar.n - bar.initial) * args.batch * args.context
    speed = characters / max(bar.format_dict["elapsed"], 1e-9)
    return f"loss {loss:.3f}, {speed:,.0f} characters/s"


def report(model: CharLM, seconds: float, validation_loss: float, path: Path) -> None:
    """Print the summary of a run whose checkpoint is at ``path``."""
    layers = [layer for layer in model.modules() if isinstance(layer, BlockSparseLinear)]
    stored = sum(layer.weight.size for layer in layers)
    places = sum(layer.input_dims * layer.output_dims for layer in layers)
    sparse = f"{stored / places:.3f} in {len(layers)} block-sparse layers" if layers else "1, dense"
    trained: Any = tree_flatten(model.trainable_parameters())
    print(f"parameters       {sum(array.size for _, array in trained)}")
    print(f"density          {sparse}")
    print(f"seconds          {seconds:.1f}")
    print(f"validation loss  {validation_loss:.4f} nats per character")
    print(f"checkpoint       {path}")


def parse_arguments() -> tuple[Parser, argparse.Namespace]:
    parser = Parser(description=__doc__)
    natural, count, number = at_least(int, 0), at_least(int, 1), at_least(float, 0)

    def add(name: str, text: str, **options: Any) -> None:
        default = "" if options.get("default") is None else " (default: %(default)s)"
        parser.add_argument(name, help=text + default, **options)

    add("--text", "train on this UTF-8 file, not on Python's manual", metavar="FILE")
    add("--steps", "batches to train on", type=count, default=1250, metavar="N")
    add("--batch", "windows per batch", type=count, default=4, metavar="N")
    add("--context", "characters per window", type=count, default=64, metavar="N")
    add("--dims", "width of the model", type=count, default=96, metavar="N")
    add("--layers", "Transformer blocks", type=count, default=2, metavar="N")
    add("--heads", "attention heads", type=count, default=4, metavar="N")
    add("--density", "stored fraction of a sparse weight", type=float, default=0.25, metavar="P")
    add("--block-size", "side of the stored blocks", type=count, default=16, metavar="N")
    add("--sparse-attention", "sparse attention projections as well", action="store_true")
    add("--dense", "nn.Linear everywhere, to compare with", action="store_true")
    add("--learning-rate", "its peak", type=number, default=4e-3, metavar="X")
    add("--interval", "steps between validations", type=count, default=250, metavar="N")
    add("--checkpoint", "its folder", type=Path, default=Path("runs/char_lm"), metavar="DIR")
    add("--resume", "go on from the checkpoint, with its settings", action="store_true")
    add("--sample", "characters to write at the end", type=natural, default=400, metavar="N")
    add(
        "--temperature",
        "of the sample; 0 takes the likeliest",
        type=number,
        default=0.7,
        metavar="X",
    )
    add_common_arguments(parser)
    args = parser.parse_args()
    if args.dims % (2 * args.heads):
        parser.error(f"--dims {args.dims} is not a multiple of twice --heads {args.heads}")
    if args.dense and args.sparse_attention:
        parser.error("--dense has no sparse layers: leave out --sparse-attention")
    return parser, args


def at_least(kind: Callable[[str], Any], minimum: int) -> Callable[[str], Any]:
    """Return a parser of numbers, for argparse."""

    def convert(text: str) -> Any:
        if not minimum <= (value := kind(text)) < float("inf"):
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {text}")
        return value

    convert.__name__ = kind.__name__
    return convert


def main() -> None:
    parser, args = parse_arguments()
    start(parser, args)

    try:
        text = read_text(args.text)
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"--text {args.text}: {error}")
    vocabulary = sorted(set(text))
    id_of = {character: i for i, character in enumerate(vocabulary)}
    ids = np.array([id_of[character] for character in text], dtype=np.int32)
    training, validation = np.split(ids, [ids.size * 9 // 10])
    if steps_per_epoch(training.size, args) < 1 or validation.size <= args.context:
        sizes = f"--batch {args.batch} and --context {args.context}"
        parser.error(f"a text of {ids.size} characters is too short for {sizes}")

    try:
        model = CharLM(len(vocabulary), args)
    except ValueError as error:
        parser.error(str(error))
    peak, warm_up = args.learning_rate, max(1, args.steps // 20)
    rise = optim.linear_schedule(0, peak, warm_up)
    decay = optim.cosine_decay(peak, max(1, args.steps - warm_up), peak / 20)
    schedule = optim.join_schedules([rise, decay], [warm_up])
    optimizer = optim.AdamW(schedule, betas=[0.9, 0.99], bias_correction=True)

    names = ("dims", "layers", "heads", "density", "block_size", "sparse_attention", "dense")
    settings = {name: getattr(args, name) for name in (*names, "context", "batch", "seed")}
    settings["text"] = f"{ids.size} characters with CRC {zlib.crc32(text.encode()):08x}"
    progress = {"step": 0, "seconds": 0.0, "settings": settings}
    path = args.checkpoint / "checkpoint.safetensors"
    try:
        if args.resume:
            progress = load_checkpoint(path, model, optimizer, settings)
        path.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    optimizer.init(model.trainable_parameters())  # keeps what a checkpoint brought

    data = batches(training, args, progress["step"])
    evaluate = evaluator(model, validation, args.context)
    save = partial(save_checkpoint, path, model, optimizer, progress)
    try:
        validation_loss = train(model, optimizer, data, evaluate, save, progress, args)
    except KeyboardInterrupt:
        step = saved_step(path) if progress["step"] else 0
        sys.exit(f"stopped; --resume goes on from step {step}" if step else "stopped")
    except NotFinite as error:
        step = saved_step(path) if progress["step"] else 0
        kept = f"the checkpoint is that of step {step}" if step else "there is no checkpoint yet"
        sys.exit(f"{error}: {kept}; a lower --learning-rate may help")
    report(model, progress["seconds"], validation_loss, path)
    if args.sample:
        drawn = sample(model, validation[: args.context].tolist(), args.sample, args.temperature)
        print("\nAfter the first characters of the validation text, the model writes:\n")
        for i in drawn:
            print(vocabulary[i], end="", flush=True)
        print()


if __name__ == "__main__":
    main()
