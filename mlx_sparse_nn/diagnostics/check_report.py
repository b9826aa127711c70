"""What ``python -m mlx_sparse_nn check`` prints: what is wrong, and a table to paste."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_sparse_nn.core.backends import build, cpu, plain
from mlx_sparse_nn.diagnostics.check_cases import PRODUCTS, Case
from mlx_sparse_nn.diagnostics.check_speed import LayerTiming

_MOST_NAMED = 10


@dataclass(frozen=True)
class Outcome:
    """What became of a product.

    Attributes:
        case: Which one.
        backend: What the rule chose to compute it: ``"metal"``, for example.
        kernels: What was launched, with its constants; empty unless on a GPU.
        part: The largest error as a part of its bound; infinite where the result is none.
        wrong: What is wrong, in words; empty if nothing is.
    """

    case: Case
    backend: str
    kernels: tuple[str, ...]
    part: float
    wrong: str = ""


def complaint(outcomes: Sequence[Outcome]) -> str:
    """Return what is wrong: the first product in full, with the line that computes it again."""
    wrong = [outcome for outcome in outcomes if outcome.wrong]
    first, others = wrong[0], [outcome.case.name for outcome in wrong[1:]]
    case = first.case
    quantized = f", {case.bits} bits in groups of {case.group_size}" if case.bits else ""
    lines = [
        f"[check] {len(wrong)} of {len(outcomes)} products wrong on {device_name()}; the first:",
        f"  {case.product}, block_size {case.block_size}, {case.dtype}{quantized}, {case.rows} "
        f"row{'s' * (case.rows > 1)} of x, pattern {case.pattern}{', bias' * case.bias}",
        f"  by {' and '.join(dict.fromkeys(first.kernels)) or first.backend}",
        f"  {first.wrong}",
        f"  again: python -m mlx_sparse_nn check --only {case.name}",
    ]
    if others:
        more = f" and {len(others) - _MOST_NAMED} more" if len(others) > _MOST_NAMED else ""
        lines.append(f"  also wrong: {', '.join(others[:_MOST_NAMED])}{more}")
    return "\n".join(lines)


def markdown(
    outcomes: Sequence[Outcome], timings: Sequence[LayerTiming], features: int, seconds: float
) -> str:
    """Return the tables that a user can paste into an issue."""
    n_wrong = sum(bool(outcome.wrong) for outcome in outcomes)
    worst = max(outcomes, key=lambda outcome: outcome.part)
    facts = [
        ("machine", f"{device_name()}, {_system()}"),
        ("software", f"{_versions()}, Python {platform.python_version()}"),
        ("products", f"{len(outcomes)}, of which {n_wrong or 'none'} wrong, in {seconds:.0f} s"),
        ("computed by", "; ".join(_who(outcomes))),
        ("worst error", f"{worst.part:.2f} of its bound, {worst.case.name}"),
    ]
    parts = [_table(["mlx_sparse_nn check", ""], facts), _table(*_by_product(outcomes))]
    if timings:
        parts.append(_table(*_by_layer(timings)))
        parts.append(
            f"Microseconds a call, medians: the layer / `nn.Linear` (how many times faster), "
            f"{features} x {features}."
        )
    return "\n\n".join(parts)


def device_name() -> str:
    """Return the name of the chip that MLX computes on."""
    kind = "GPU" if mx.default_device().type == mx.gpu else "CPU"
    return f"{mx.device_info().get('device_name', platform.machine())} ({kind})"


def _system() -> str:
    mac = platform.mac_ver()[0]
    system = f"macOS {mac}" if mac else f"{platform.system()} {platform.release()}"
    return f"{system}, {platform.machine()}"


def _versions() -> str:
    from mlx_sparse_nn import __version__

    return f"mlx_sparse_nn {__version__}, MLX {build.MLX_VERSION}"


def _who(outcomes: Sequence[Outcome]) -> list[str]:
    """Return how many products each backend computed, and by how many kernels."""
    sentences = []
    for backend in dict.fromkeys(outcome.backend for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.backend == backend]
        variants = {kernel for outcome in mine for kernel in outcome.kernels}
        names = {kernel.partition("(")[0] for kernel in variants}
        kernels = f" by {len(variants)} variants of {len(names)} kernels" if variants else ""
        why = ""
        if backend == plain.NAME and mx.default_device().type == mx.cpu:
            why = f" ({cpu.why_not()})" if cpu.why_not() else ""
        sentences.append(f"**{backend}** {len(mine)}{kernels}{why}")
    return sentences


def _by_product(outcomes: Sequence[Outcome]) -> tuple[list[str], list[tuple[str, ...]]]:
    rows = []
    for product in PRODUCTS:
        mine = [outcome for outcome in outcomes if outcome.case.product == product]
        for backend in dict.fromkeys(outcome.backend for outcome in mine):
            by_it = [outcome for outcome in mine if outcome.backend == backend]
            variants = {kernel for outcome in by_it for kernel in outcome.kernels}
            n_wrong = sum(bool(outcome.wrong) for outcome in by_it)
            rows.append(
                (
                    f"`{product}`",
                    backend,
                    str(len(by_it)),
                    str(len(variants) or "-"),
                    str(n_wrong),
                    f"{max(outcome.part for outcome in by_it):.2f}",
                )
            )
    header = ["product", "computed by", "products", "kernels", "wrong", "worst error / bound"]
    return header, rows


def _by_layer(timings: Sequence[LayerTiming]) -> tuple[list[str], list[tuple[str, ...]]]:
    rows = [
        (
            str(t.block_size),
            f"{t.density:.0%}",
            t.dtype,
            str(t.rows),
            *(
                f"{_short(sparse * 1e6)} / {_short(dense * 1e6)} ({_short(dense / sparse)})"
                for sparse, dense in (t.forward, t.training)
            ),
        )
        for t in timings
    ]
    return ["B", "density", "dtype", "rows", "forward", "training"], rows


def _short(value: float) -> str:
    """Return two digits, or all that stand before the point."""
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
