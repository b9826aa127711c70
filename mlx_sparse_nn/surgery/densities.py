"""A density for all layers, or one for each by its path."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from mlx_sparse_nn.core.checks import check_density

Density: TypeAlias = float | Mapping[str, float]


def check_one_budget(owner: str, density: Density, scope: str) -> None:
    """Raise if densities by path come with a scope that shares out one density."""
    if isinstance(density, Mapping) and scope != "layer":
        raise ValueError(
            f"[{owner}] scope must be 'layer' with a density by path, got {scope!r}, which shares "
            "out one density among the layers"
        )


def density_by_path(
    owner: str,
    density: Density,
    kind: str,
    layers: Sequence[Sequence[str]],
    refused: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """Return the density of layers at each of their paths; what no path names is not in there.

    Args:
        owner: Who errors speak for.
        density: One number for all layers, or some of them by path. A layer that the model holds at
            several paths is named by any of them.
        kind: What these layers are, in words.
        layers: For each layer that can have a density, its paths.
        refused: Why each other layer can have none, by path.

    Raises:
        TypeError: A density is no number.
        ValueError: One is not in (0, 1], a path is unknown or that of a layer that can have none,
            two paths of one layer have different densities, or nothing is named.
    """
    if not isinstance(density, Mapping):
        check_density(owner, density)
        return {path: float(density) for paths in layers for path in paths}
    if not density:
        kind = type(density).__name__
        raise ValueError(f"[{owner}] density must name a layer, got an empty {kind}")
    known = {path: None for paths in layers for path in paths}
    for path, value in density.items():
        if refused and path in refused:
            raise ValueError(f"[{owner} {path}] density names it, but {refused[path]}")
        if path not in known:
            hint = _closest(str(path), known)
            raise ValueError(
                f"[{owner}] density names {path!r}, which is no {kind} of the model{hint}"
            )
        check_density(f"{owner} {path}".rstrip(), value)
    found: dict[str, float] = {}
    for paths in layers:
        named = {path: float(density[path]) for path in paths if path in density}
        if len(set(named.values())) > 1:
            raise ValueError(
                f"[{owner}] {' and '.join(named)} are one layer, to which density gives "
                f"{' and '.join(map(str, named.values()))}"
            )
        for value in named.values():
            found |= dict.fromkeys(paths, value)
    return found


def _closest(path: str, known: Iterable[str]) -> str:
    """Say which known path is the most like another."""
    from difflib import get_close_matches  # no other user needs it

    closest = get_close_matches(path, list(known), n=1, cutoff=0.0)
    return f"; the closest is {closest[0]!r}" if closest else ""
