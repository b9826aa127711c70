"""What the example scripts share: one-line errors, ``--device``, ``--seed`` and ``--plot``."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import NoReturn

import mlx.core as mx

from mlx_sparse_nn import use_device


class Parser(argparse.ArgumentParser):
    """An ArgumentParser for a docstring, that reports a bad argument in one line, without usage."""

    def __init__(self, description: str | None):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=raw)

    def error(self, message: str) -> NoReturn:
        """Print ``<script>: error: <message>`` on stderr and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def add_common_arguments(parser: Parser) -> None:
    """Add ``--device`` and ``--seed``."""
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "gpu"),
        default="auto",
        help="where to run; auto takes the GPU if there is one (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=_seed, default=0, help="seed of all random numbers (default: %(default)s)"
    )


def start(parser: Parser, args: argparse.Namespace) -> None:
    """Select ``args.device`` and seed MLX with ``args.seed``, or end with a one-line error."""
    device = args.device
    if device == "auto":
        device = "gpu" if mx.metal.is_available() or mx.cuda.is_available() else "cpu"
    try:
        use_device(device)
    except RuntimeError as error:
        parser.error(f"--device {device}: {error}")
    mx.random.seed(args.seed)


def check_plot(parser: Parser, path: Path | None) -> None:
    """End with a one-line error unless a plot can be drawn to ``path``, if one is asked for."""
    if path is None:
        return
    if path.is_dir():
        parser.error(f"--plot: {path} is a folder")
    if not path.parent.is_dir():
        parser.error(f"--plot: there is no folder {path.parent}")
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.lower().removeprefix(".") not in {"", *kinds}:  # without one it becomes a PNG
        parser.error(f"--plot: {path.name} must end in one of .{', .'.join(kinds)}")


def _seed(text: str) -> int:
    seed = int(text) if text.isdecimal() else -1
    if not 0 <= seed < 2**32:
        raise argparse.ArgumentTypeError(f"must be an integer in [0, 2**32 - 1], got {text!r}")
    return seed
