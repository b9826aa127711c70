"""What ``python -m mlx_sparse_nn check`` prints: what is wrong, and a table to paste."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import mlx.core as mx

from mlx_sparse_nn.core.backends import build, cpu, plain
from mlx_sparse_nn.diagnostics import check_cases, check_columns, check_strings
from mlx_sparse_nn.diagnostics.check_cases import Case
from mlx_sparse_nn.diagnostics.check_columns import ColumnsCase
from mlx_sparse_nn.diagnostics.check_speed import LayerTiming
from mlx_sparse_nn.diagnostics.check_strings import StringsCase

AnyCase: TypeAlias = Case | StringsCase | ColumnsCase
_MOST_NAMED = 10
_PRODUCTS = (*check_cases.PRODUCTS, *check_strings.PRODUCTS, *check_columns.PRODUCTS)


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

    case: AnyCase
    backend: str
    kernels: tuple[str, ...]
    part: float
    wrong: str = ""


def complaint(outcomes: Sequence[Outcome], options: str = "") -> str:
    """Return what is wrong: the first product in full, with the line that computes it again.

    Args:
        outcomes: Of which one at least is wrong.
        options: Of the command that found it, each with a space behind.
    """
    wrong = [outcome for outcome in outcomes if outcome.wrong]
    first, others = wrong[0], [outcome.case.name for outcome in wrong[1:]]
    lines = [
        f"[check] {len(wrong)} of {len(outcomes)} products wrong on {device_name()}; the first:",
        f"  {first.case.words}",
        f"  by {' and '.join(dict.fromkeys(first.kernels)) or first.backend}",
        f"  {first.wrong}",
        f"  again: python -m mlx_sparse_nn check {options}--only {first.case.name}",
    ]
    if others:
        more = f" and {len(others) - _MOST_NAMED} more" if len(others) > _MOST_NAMED else ""
        lines.append(f"  also wrong: {', '.join(others[:_MOST_NAMED])}{more}")
    return "\n".join(lines)


def markdown(outcomes: Sequence[Outcome], seconds: float, version: str) -> str:
    """Return what was computed by whom, as tables that a user can paste into an issue."""
    n_wrong = sum(bool(outcome.wrong) for outcome in outcomes)
    worst = max(outcomes, key=lambda outcome: outcome.part)
    facts = [
        ("machine", f"{device_name()}, {_system()}"),
        (
            "software",
            f"mlx_sparse_nn {version}, MLX {build.MLX_VERSION}, Python {platform.python_version()}",
        ),
        ("products", f"{len(outcomes)}, of which {n_wrong or 'none'} wrong, in {seconds:.0f} s"),
        ("computed by", "; ".join(_who(outcomes))),
        ("worst error", f"{worst.part:.2f} of its bound, {worst.case.name}"),
    ]
    return "\n\n".join([_table(["mlx_sparse_nn check", ""], facts), _by_kernel(outcomes)])


def markdown_times(features: int, timings: Mapping[str, Sequence[LayerTiming]]) -> str:
    """Return the times of layers as a table, with columns for each way to compute the sparse ones.

    Args:
        features: Of the layers.
        timings: By the words that its columns end with; of the same layers, in the same order.
    """
    header = ["B", "density", "dtype", "rows"]
    header += [f"{task}{words}" for words in timings for task in ("forward", "training")]
    rows = [
        [
            *(str(ways[0].block_size), f"{ways[0].density:.3g}", ways[0].dtype, str(ways[0].rows)),
            *(_beside(*pair) for way in ways for pair in (way.forward, way.training)),
        ]
        for ways in zip(*timings.values(), strict=True)
    ]
    unit = "Microseconds a call, medians: the layer / `nn.Linear` (times faster)"
    return f"{_table(header, rows)}\n\n{unit}, {features} x {features}."


def device_name() -> str:
    """Return the name of the chip that MLX computes on."""
    kind = "GPU" if mx.default_device().type == mx.gpu else "CPU"
    return f"{mx.device_info().get('device_name', platform.machine())} ({kind})"


def _system() -> str:
    mac = platform.mac_ver()[0]
    system = f"macOS {mac}" if mac else f"{platform.system()} {platform.release()}"
    return f"{system}, {platform.machine()}"


def _who(outcomes: Sequence[Outcome]) -> list[str]:
    """Return how many products each backend computed, and by how many kernels."""
    sentences = []
    for backend in dict.fromkeys(outcome.backend for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.backend == backend]
        variants = {kernel for outcome in mine for kernel in outcome.kernels}
        names = {_name(kernel) for kernel in variants}
        kernels = f" by {len(variants)} variants of {len(names)} kernels" if variants else ""
        why = ""
        if backend == plain.NAME and mx.default_device().type == mx.cpu:
            why = f" ({cpu.why_not()})" if cpu.why_not() else ""
        sentences.append(f"**{backend}** {len(mine)}{kernels}{why}")
    return sentences


def _by_kernel(outcomes: Sequence[Outcome]) -> str:
    """Return the table of the products, by what computed them."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        names = dict.fromkeys(_name(kernel) for kernel in outcome.kernels)
        by = " and ".join(names) or outcome.backend
        groups.setdefault((outcome.case.product, by), []).append(outcome)
    rows = [
        (
            f"`{product}`",
            by,
            str(len(mine)),
            str(len({kernel for outcome in mine for kernel in outcome.kernels}) or "-"),
            str(sum(bool(outcome.wrong) for outcome in mine)),
            f"{max(outcome.part for outcome in mine):.2f}",
        )
        for (product, by), mine in sorted(groups.items(), key=lambda g: _PRODUCTS.index(g[0][0]))
    ]
    header = ["product", "computed by", "products", "variants", "wrong", "worst error / bound"]
    return _table(header, rows)


def _name(kernel: str) -> str:
    """Return a kernel without its constants: ``metal/spmm_few``."""
    return kernel.partition("(")[0]


def _beside(sparse: float, dense: float) -> str:
    return f"{_short(sparse * 1e6)} / {_short(dense * 1e6)} ({_short(dense / sparse)})"


def _short(value: float) -> str:
    """Return two digits, or all that stand before the point."""
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
