"""Time whole models, sparse and dense, with MLX's own BLAS and with OpenBLAS in its place.

    python -m benchmarks.models                some minutes
    python -m benchmarks.models --steps 1250   all of `make demo`'s training

The character model of ``examples/train_char_lm.py`` and its dense twin; a compiled step of the
README's small model; and one layer. Each time is that of a process of its own, and the two BLAS
take turns. Writes ``benchmarks/results/models.json`` and the tables of docs/backends.md
and benchmarks/README.md; with ``--readme`` alone only the tables.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from benchmarks.environments import ROOT, variables
from benchmarks.measure import describe_machine
from benchmarks.report import PAGE, fill, markdown

RESULTS = ROOT / "benchmarks/results/models.json"
BLAS = ("own", "openblas")
SECONDS = 2.0  # of repeated calls
SMALL = {  # what child() times, and its name in tables
    "linear": "`nn.Linear`, 1024 x 1024, 256 rows, ms",
    "sparse_linear": "`BlockSparseLinear` in its place, B = 32, density 0.1, ms",
    "dense_step": "README's small model, dense: a compiled step, ms",
    "plain_step": "the same, sparse in plain MLX, ms",
    "sparse_step": "the same, sparse, ms",
}
TRAINING = {
    "dense_training": ("`train_char_lm.py --dense`, {} steps, s", ["--dense"]),
    "sparse_training": ("`train_char_lm.py`, {} steps, s", []),
}
IN_BACKENDS = ("linear", "sparse_linear", "dense_training", "sparse_training")


def child(what: str) -> float:
    """Return the milliseconds of one call, the median of many, in this process."""
    import mlx.core as mx

    mx.set_default_device(mx.Device(mx.cpu))
    if what == "plain_step":
        from mlx_sparse_nn.core.backends import choose, plain

        choose.CPU = (plain,)
    call = step(what) if what.endswith("step") else layer(what)
    call()
    times = []
    while sum(times) < SECONDS or len(times) < 3:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2] * 1e3


def layer(what: str) -> Callable[[], None]:
    """Return a call of a layer with 256 rows."""
    import mlx.core as mx
    import mlx.nn as nn

    from mlx_sparse_nn import BlockSparseLinear

    sparse = what == "sparse_linear"
    module = (
        BlockSparseLinear(1024, 1024, block_size=32, density=0.1)
        if sparse
        else nn.Linear(1024, 1024)
    )
    x = mx.random.normal((256, 1024))
    mx.eval(module.parameters(), x)
    return lambda: mx.eval(module(x))


def step(what: str) -> Callable[[], None]:
    """Return a compiled step of the README's first model, with Adam."""
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim

    from mlx_sparse_nn import BlockSparseLinear

    def linear(inputs: int, outputs: int) -> nn.Module:
        if what == "dense_step":
            return nn.Linear(inputs, outputs)
        return BlockSparseLinear(inputs, outputs, block_size=32, density=0.25)

    model = nn.Sequential(linear(256, 1024), nn.ReLU(), linear(1024, 256))
    optimizer = optim.Adam(learning_rate=1e-3)
    x = mx.random.normal((64, 256))
    loss_and_grad = nn.value_and_grad(model, lambda x: ((model(x) - x) ** 2).mean())
    state = [model.state, optimizer.state]

    def train(x: mx.array) -> mx.array:
        loss, grads = loss_and_grad(x)
        optimizer.update(model, grads)
        return loss

    compiled = mx.compile(train, inputs=state, outputs=state)
    return lambda: mx.eval(compiled(x), state)


def train(arguments: list[str], steps: int, openblas: bool) -> float:
    """Return the seconds that the character model's training says it took."""
    with tempfile.TemporaryDirectory() as folder:
        script = ["examples/train_char_lm.py", *arguments, "--steps", str(steps)]
        others = ["--device", "cpu", "--sample", "0", "--checkpoint", folder]
        output = subprocess.run(
            [sys.executable, *script, *others],
            cwd=ROOT,
            env={**variables(openblas), "PYTHONPATH": str(ROOT)},
            check=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ).stdout
    (seconds,) = re.findall(r"^seconds +([\d.]+)", output, re.MULTILINE)
    return float(seconds)


def measure(steps: int) -> dict[str, Any]:
    """Return the times of all, and the machine."""
    times: dict[str, dict[str, float]] = {}
    with tqdm(total=len(BLAS) * (len(SMALL) + len(TRAINING)), unit="run") as bar:
        for name in (*SMALL, *TRAINING):
            times[name] = {}
            for blas in BLAS:
                bar.set_description(f"{name}, {blas}")
                openblas = blas == "openblas"
                if name in TRAINING:
                    seconds = train(TRAINING[name][1], steps, openblas)
                else:
                    command = [sys.executable, "-m", "benchmarks.models", "--child", name]
                    answer = subprocess.run(
                        command,
                        cwd=ROOT,
                        env=variables(openblas),
                        check=True,
                        stdout=subprocess.PIPE,
                        text=True,
                    )
                    seconds = float(answer.stdout)
                times[name][blas] = seconds
                bar.update()
    return {"machine": describe_machine("cpu"), "steps": steps, "times": times}


def table(results: dict[str, Any], names: tuple[str, ...] = (*SMALL, *TRAINING)) -> str:
    """Return the table of times."""
    labels = {
        **SMALL,
        **{name: text.format(results["steps"]) for name, (text, _) in TRAINING.items()},
    }
    lines = []
    for name in names:
        own, openblas = (results["times"][name][blas] for blas in BLAS)
        lines.append([labels[name], f"{own:.3g}", f"{openblas:.3g}", f"{own / openblas:.2g}"])
    machine = results["machine"]
    head = ["", "MLX's wheel", "with OpenBLAS", "times faster"]
    where = f"{machine['processor']}, cores: {machine['used_cores']}; float32."
    return f"{markdown(head, lines)}\n\n{where}"


MARKS = {
    ("docs/backends.md", "cpu_blas"): lambda results: table(results, IN_BACKENDS),
    (PAGE, "cpu_models"): table,
}


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m benchmarks.models", None, __doc__, formatter_class=form
    )
    parser.add_argument("--steps", type=int, default=250, help="of training (default: %(default)s)")
    parser.add_argument("--readme", action="store_true", help="measure nothing, write the tables")
    parser.add_argument("--child", choices=SMALL, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(child(args.child))
        return
    if not args.readme:
        RESULTS.write_text(json.dumps(measure(args.steps), indent=2) + "\n")
    results = json.loads(RESULTS.read_text())
    fill({key: made(results) for key, made in MARKS.items()})
    print(table(results))


if __name__ == "__main__":
    main()
