"""Measure a layer beside ``nn.Linear`` over block sizes, dtypes, rows, shapes and densities.

Every cell is checked against an oracle. A run that was stopped goes on where it stopped: cells that
its file holds are not measured again.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.environments import ROOT, variables
from benchmarks.measure import Child, Stopped, describe_machine

AXES: dict[str, Sequence[Any]] = {
    "shape": ((1152, 1152), (4608, 1152), (4608, 4608)),  # every block size divides them
    "block_size": (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128),
    "density": (0.1, 0.5),
    "dtype": ("float32", "bfloat16", "float16", "float64"),
    "step": ("forward", "training"),
    "rows": (1, 4, 9, 16, 17, 33, 64, 129, 512, 1024, 4096),
}
QUICK = {
    "shape": AXES["shape"][:1],
    "dtype": ("float32", "bfloat16", "float16"),
    "rows": (1, 16, 129),
}
SECONDS, QUICK_SECONDS = 0.05, 0.03  # of a cell, sparse and dense
LIMIT, QUICK_LIMIT = 10.0, 2.0  # seconds of a dense call, beyond which it is not measured
SAVE_EVERY = 5.0  # seconds
OVERHEAD, RATE = 0.3, 1e10  # seconds of a cell, and its multiply-adds a second: for the time left


@dataclass(frozen=True)
class Cell:
    """A layer without bias, forward or in training.

    Args:
        outputs: Its output features.
        inputs: Its input features.
        block_size: Side of the blocks.
        density: Stored fraction, rounded to a whole number of blocks.
        dtype: Of values and x.
        step: "forward", or "training": the product, and the gradients of weight and x.
        rows: Rows of x.
    """

    outputs: int
    inputs: int
    block_size: int
    density: float
    dtype: str
    step: str
    rows: int

    @property
    def shape(self) -> tuple[int, int]:
        return (self.outputs, self.inputs)

    @property
    def dense(self) -> tuple:
        """What the dense layer's cost depends on."""
        return (self.outputs, self.inputs, self.dtype, self.step, self.rows)

    @property
    def cost(self) -> float:
        """About how many seconds it takes to measure."""
        products = 3 if self.step == "training" else 1
        work = self.outputs * self.inputs * self.density * self.rows * products
        return OVERHEAD + 3 * work / RATE


def grid(device: str, quick: bool = False, **chosen: Sequence[Any] | None) -> list[Cell]:
    """Return the cells, those that share operands side by side.

    Args:
        device: "cpu" or "gpu", which has no float64.
        quick: Whether it shall take two minutes.
        **chosen: Values of ``AXES`` in place of all.
    """
    axes = {**AXES, **(QUICK if quick else {}), **{k: v for k, v in chosen.items() if v}}
    dtypes = [d for d in axes["dtype"] if device == "cpu" or d != "float64"]
    cells = product(*({**axes, "dtype": dtypes}.values()))
    return [Cell(*shape, *others) for shape, *others in cells]


def run(
    cells: list[Cell], device: str, path: Path, quick: bool = False, openblas: bool = True
) -> dict[str, Any]:
    """Measure the cells that a file does not hold yet, and return all that it holds then.

    Args:
        cells: What to measure.
        device: "cpu" or "gpu".
        path: The file, JSON; written every few seconds and at the end, however it comes.
        quick: Whether calls are repeated for a shorter time.
        openblas: Whether OpenBLAS is loaded before MLX, on a CPU.

    Raises:
        SystemExit: The file is of another machine, package or MLX.
    """
    measuring = _Measuring(device, cells, quick, openblas)
    with measuring:
        results = resumed(path, measuring.machine)
        done = {Cell(**result["cell"]) for result in results["results"]}
        left = [cell for cell in cells if cell not in done]
        saved = time.monotonic()
        try:
            for result in _with_bar(left, measuring.measure):
                results["results"].append(result)
                if time.monotonic() - saved > SAVE_EVERY:
                    save(results, path)
                    saved = time.monotonic()
        finally:
            save(results, path)
    return results


class _Measuring:
    """The process that measures, begun anew where it ends.

    Dense layers are measured beside each cell, but slow ones once.
    """

    def __init__(self, device: str, cells: list[Cell], quick: bool, openblas: bool):
        self._device = device
        self._most_rows = max((cell.rows for cell in cells), default=0)
        self._seconds = QUICK_SECONDS if quick else SECONDS
        self._limit = QUICK_LIMIT if quick else LIMIT
        self._variables = variables(openblas and device == "cpu" and sys.platform == "linux")
        self._dense: dict[tuple, dict[str, Any]] = {}

    def __enter__(self) -> _Measuring:
        self._child = self._begin()
        self.machine = {
            **describe_machine(self._device),
            "sources": sources(),
            "versions": self._child.ask("versions"),
        }
        return self

    def __exit__(self, *exception: Any) -> None:
        self._child.__exit__()

    def _begin(self) -> Child:
        command = [sys.executable, "-m", "benchmarks.sweep_server", self._device]
        return Child("the sweep", command, self._variables)

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Return a cell and its times."""
        shared = {"cell": asdict(cell), "most_rows": self._most_rows, "seconds": self._seconds}
        known = self._dense.get(cell.dense)
        if known is None or (known["seconds"] is not None and known["seconds"] < self._seconds):
            self._dense[cell.dense] = self._ask("dense", **shared, limit=self._limit)
        return {
            "cell": asdict(cell),
            "sparse": self._ask("sparse", **shared),
            "dense": self._dense[cell.dense],
        }

    def _ask(self, request: str, **arguments: Any) -> dict[str, Any]:
        try:
            return self._child.ask(request, **arguments)
        except Stopped:
            self._child.__exit__()
            self._child = self._begin()
            return {"seconds": None, "wrong": "the process ended"}


def _with_bar(
    cells: list[Cell], measure: Callable[[Cell], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield each cell's result, with a bar of the time left by cost."""
    form = "{desc}: {percentage:3.0f}% |{bar}| {elapsed}, {remaining} left{postfix}"
    total = sum(cell.cost for cell in cells)
    with tqdm(total=total, bar_format=form, disable=not cells) as bar:
        for i, cell in enumerate(cells):
            bar.set_description(f"{cell.outputs} x {cell.inputs}, B = {cell.block_size}")
            bar.set_postfix_str(f"cell {i + 1} of {len(cells)}", refresh=False)
            yield measure(cell)
            bar.update(cell.cost)


def resumed(path: Path, machine: dict[str, Any]) -> dict[str, Any]:
    """Return what a file holds, or no results yet.

    Raises:
        SystemExit: Its results are of another machine, package or MLX.
    """
    if not path.exists():
        return {"machine": machine, "results": []}
    results = json.loads(path.read_text())
    for key in ("device", "processor", "used_cores", "sources", "versions"):
        if results["machine"][key] != machine[key]:
            raise SystemExit(
                f"[benchmarks] {path} has {key} {results['machine'][key]}, not {machine[key]}: "
                "move it away, or name another --output"
            )
    return results


def sources() -> str:
    """Return a hash of the package's files, which results of one run have in common."""
    files = sorted((ROOT / "mlx_sparse_nn").rglob("*.*"))
    contents = [path.read_bytes() for path in files if path.suffix != ".pyc" and path.is_file()]
    return hashlib.sha256(b"\0".join(contents)).hexdigest()[:12]


def save(results: dict[str, Any], path: Path) -> None:
    """Write the results, one a line: all, or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join(json.dumps(result) for result in results["results"])
    described = json.dumps(results["machine"], indent=1)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(f'{{"machine": {described},\n"results": [\n{rows}\n]}}\n')
    os.replace(unfinished, path)
