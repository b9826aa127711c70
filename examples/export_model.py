"""Write a sparse model to a file, and run it in a process that does not have this package.

It teaches deployment, and takes some seconds: ``mx.exporter`` writes one file for several batch
sizes, which MLX reads from C++, Swift and Python. The file holds plain MLX if it is written on a
CPU, and this package's kernels if it is written on a GPU, for GPUs of the same kind
(docs/export.md). Another process loads it, runs it, and its results and times stand beside ours.

  python examples/export_model.py
  python examples/export_model.py --bits 4 --output model.mlxfn
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from _common import Parser, add_common_arguments, start
from mlx.utils import tree_flatten

from mlx_sparse_nn import BlockSparseLinear

RUNS = 20
# What deploys: MLX alone. It prints the seconds of a call, and saves what the model gave.
READER = """
import json, sys, time
import mlx.core as mx
file, device, rows, runs = sys.argv[1:]
mx.set_default_device(mx.Device(getattr(mx, device)))
inputs = mx.load(file + ".inputs.safetensors")["x"]
model = mx.import_function(file)
x = inputs[: int(rows)]
mx.eval(model(x))
began = time.perf_counter()
for _ in range(int(runs)):
    mx.eval(model(x))
seconds = (time.perf_counter() - began) / int(runs)
mx.save_safetensors(file + ".outputs.safetensors", {"y": model(x)[0]})
print(json.dumps({"seconds": seconds, "packages": sorted(p for p in sys.modules if "." not in p)}))
"""


def make_parser() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument("--dims", type=int, default=256, help="inputs (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=1024, help="hidden features (%(default)s)")
    parser.add_argument("--density", type=float, default=0.1, help="of the layers (%(default)s)")
    parser.add_argument("--block-size", type=int, default=32, help="of the layers (%(default)s)")
    parser.add_argument("--bits", type=int, choices=(2, 3, 4, 5, 6, 8), help="quantize the blocks")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32], help="batch sizes")
    parser.add_argument("--output", type=Path, help="keep the file here")
    add_common_arguments(parser)
    return parser


def make_model(args: argparse.Namespace) -> nn.Module:
    """Return the model to deploy; yours is trained."""
    options = dict(block_size=args.block_size, density=args.density)
    model = nn.Sequential(
        BlockSparseLinear(args.dims, args.hidden, **options),
        nn.GELU(),
        BlockSparseLinear(args.hidden, args.dims, **options),
    )
    if args.bits:
        nn.quantize(model, group_size=32, bits=args.bits)
    model.eval()
    mx.eval(model.parameters())  # a file holds numbers, or else how to draw them
    return model


def write(model: nn.Module, file: str, dims: int, rows: list[int]) -> None:
    """Write the model for each number of rows; the weights are in the file once."""
    with mx.exporter(file, model) as exporter:
        for n in sorted(set(rows)):
            exporter(mx.zeros((n, dims)))


def read_elsewhere(file: str, rows: int) -> tuple[mx.array, dict]:
    """Run the file in a process that has MLX alone; return its outputs, and what it said."""
    device = "gpu" if mx.default_device().type == mx.gpu else "cpu"
    command = [sys.executable, "-c", READER, file, device, str(rows), str(RUNS)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the file does not run: {done.stderr.strip()}")
    outputs: Any = mx.load(f"{file}.outputs.safetensors")
    return outputs["y"], json.loads(done.stdout)


def seconds_of(model: nn.Module, x: mx.array) -> float:
    """Return the seconds of a call, here."""
    mx.eval(model(x))
    began = time.perf_counter()
    for _ in range(RUNS):
        mx.eval(model(x))
    return (time.perf_counter() - began) / RUNS


def check(parser: Parser, args: argparse.Namespace) -> None:
    """End with a one-line error unless the arguments make sense."""
    for name in ("dims", "hidden", "block_size"):
        if (value := getattr(args, name)) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if min(args.rows) < 1:
        parser.error(f"--rows must be at least 1, got {min(args.rows)}")
    if not 0 < args.density <= 1:
        parser.error(f"--density must be in (0, 1], got {args.density:g}")
    if args.bits and args.block_size % 32:
        parser.error(f"--bits needs a --block-size of 32 or a multiple, got {args.block_size}")
    if args.output is not None and not args.output.parent.is_dir():
        parser.error(f"--output: there is no folder {args.output.parent}")


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    check(parser, args)
    start(parser, args)
    model = make_model(args)
    arrays: Any = tree_flatten(model.parameters())
    stored = sum(a.nbytes for name, a in arrays if not name.endswith(("indptr", "indices")))
    print(f"model     {model}")
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "model.mlxfn")
        write(model, file, args.dims, args.rows)
        size = Path(file).stat().st_size
        dense = 4 * 2 * args.dims * args.hidden
        print(f"file      {size:,} bytes; its values {stored:,}, dense {dense:,}")
        inputs = mx.random.normal((max(args.rows), args.dims))
        mx.save_safetensors(f"{file}.inputs.safetensors", {"x": inputs})
        for rows in sorted(set(args.rows)):
            expected = model(inputs[:rows])
            found, told = read_elsewhere(file, rows)
            if "mlx_sparse_nn" in told["packages"]:
                sys.exit("the other process imported mlx_sparse_nn: the file needs it")
            error = mx.abs(found - expected).max().item()
            if not mx.allclose(found, expected, rtol=1e-3, atol=1e-4).item():
                sys.exit(f"with {rows} rows the file is {error:.1e} from the model")
            here = seconds_of(model, inputs[:rows])
            times = f"{told['seconds'] * 1e3:.3g} ms there, {here * 1e3:.3g} ms here"
            print(f"{rows:<4} rows {times}, at most {error:.1e} apart")
        if args.output is not None:
            shutil.copyfile(file, args.output)
            print(f"kept      {args.output}")


if __name__ == "__main__":
    main()
